"""From a recording to text: decoding, windows and their seams, what is opened, and the command of ``examples/speech``."""

from __future__ import annotations

import importlib
import importlib.util
import json
import runpy
import sys
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from autocomp.errors import UsageError
from autocomp.export.onnx import export_onnx
from autocomp.tasks.speech import words
from autocomp.tasks.speech.audio import RATE
from autocomp.tasks.speech.decoding import DECODERS, beam, greedy
from autocomp.tasks.speech.features import BANDS
from autocomp.tasks.speech.runner import Module, chosen, joined, transcribe, window_starts

torch.set_num_threads(1)
COMMAND = Path(__file__).parents[2] / "examples" / "speech" / "transcribe.py"


def sure(text: str, steps: int) -> torch.Tensor:
    """Logits of one who is sure of a text, a blank after each character."""
    classes = [c for found in words.encoded(text) for c in (found, words.BLANK)]
    return 9 * torch.eye(words.CLASSES)[classes + [words.BLANK] * (steps - len(classes))]


# Decoding


def test_who_is_sure_is_understood_by_all() -> None:
    for decode in DECODERS.values():
        assert decode(sure("nine three", 30)) == "nine three"
        assert decode(sure("", 10)) == ""


def test_beam_finds_what_all_ways_together_make_most_probable() -> None:
    """Against the sum over all ways, one by one."""
    random = np.random.default_rng(0)
    for _ in range(20):
        logits = torch.full((4, words.CLASSES), -1e9)
        kinds = [words.BLANK, *words.encoded("an")]
        logits[:, kinds] = torch.from_numpy(random.normal(0, 2, (4, 3))).float()
        p = logits.softmax(-1)
        sums: dict[str, float] = {}
        for way in product(kinds, repeat=4):
            text = words.decoded(way)
            sums[text] = sums.get(text, 0) + float(p[range(4), way].prod())
        assert beam(logits, width=100) == max(sums, key=lambda text: sums[text])


def test_words_alone_are_written_where_that_is_asked_for() -> None:
    logits = sure("thre papa", 30)
    logits[2:8:2] += torch.eye(words.CLASSES)[words.encoded("e")[0]]
    assert greedy(logits) == "thre papa"
    assert set(DECODERS["words"](logits).split()) <= set(words.WORDS)
    assert DECODERS["words"](sure("nine thr", 30)) == "nine three"
    assert DECODERS["words"](100 * sure("nine thr", 30)) == "nine"  # what can be no word is left out


# Windows


def test_windows_hold_every_sample_and_share_half_or_more() -> None:
    for samples in (1, 16_000, 16_001, 40_000, 99_999):
        starts = window_starts(samples, 16_000)
        assert starts[0] == 0
        assert starts[-1] + 16_000 >= samples
        assert all(start % 320 == 0 for start in starts)
        assert all(0 < other - one <= 8000 for one, other in pairwise(starts))
        assert len(starts) == 1 or starts[-2] + 16_000 < samples


def test_seams_are_where_nothing_is_heard() -> None:
    whole = sure("alpha", 20)
    whole = torch.cat([whole, sure("", 10), sure("bravo", 20)])
    parts = [whole[:40], whole[20:]]  # they share steps 20 to 40; quiet are 10 to 30
    damaged = [parts[0].clone(), parts[1].clone()]
    damaged[0][-5:] = sure("x", 5)  # a word that was cut is heard as another
    damaged[1][:3] = sure("y", 3)
    assert greedy(joined(parts, [0, 20])) == greedy(joined(damaged, [0, 20])) == "alphabravo"
    assert len(joined(parts, [0, 20])) == len(whole)


def test_the_shortest_module_that_holds_the_audio_is_run() -> None:
    modules = [Module(frames, torch.zeros_like) for frames in (400, 100, 200)]
    assert [chosen(modules, seconds * RATE).frames for seconds in (1, 2, 3, 9)] == [100, 200, 400, 400]


def test_a_long_recording_is_heard_once_and_silence_not_at_all() -> None:
    asked: list[torch.Tensor] = []

    def run(frames: torch.Tensor) -> torch.Tensor:
        asked.append(frames)
        return sure("", 50)[None]

    audio = np.zeros(6 * RATE, np.float32)
    audio[: RATE // 2] = 0.3 * np.sin(np.arange(RATE // 2))
    found = transcribe(audio, [Module(200, run)], greedy)
    assert len(asked) == 1
    assert asked[0].shape == (1, 200, BANDS)
    assert (found.text, found.windows, found.window, found.audio) == ("", 5, 2.0, 6.0)
    assert 0 < found.first <= found.work
    assert found.real_time_factor == found.work / 6


# What is opened, and the command


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported point of a recogniser that says nothing but "nine" at the start of each window."""

    class Nine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.said = torch.nn.Parameter(sure("nine", 50)[None])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.said + 0 * x.mean((1, 2), keepdim=True)

    folder = tmp_path_factory.mktemp("point")
    export_onnx(Nine().eval(), (torch.zeros(1, 200, BANDS),), folder / "model.onnx")
    (folder / "manifest.json").write_text(json.dumps({"inputs": [{"shape": [1, 200, BANDS], "dtype": "float32"}]}))
    return folder


@pytest.fixture(autouse=True)
def beside_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(COMMAND.parent))


def spoken(path: Path, rate: int = RATE, change: object = None) -> Path:
    tone = (0.3 * np.sin(2 * np.pi * 300 * np.arange(rate) / rate)).astype(np.float32)
    wavfile.write(path, rate, tone if change is None else change(tone))  # type: ignore[operator]
    return path


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [str(COMMAND), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(COMMAND), run_name="__main__")
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_a_recording_of_another_rate_is_written_down(
    point: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = spoken(tmp_path / "a.wav", 16_000)
    code, out, err = run(monkeypatch, capsys, point, recording, "--onnx", "--expect", "nine")
    assert (code, out) == (0, "nine\n")
    assert "1.00 s of audio in 1 window(s) of 2 s: first result after" in err
    assert "CER 0.0%, WER 0.0%" in err


def test_bad_recordings_and_folders_end_with_one_message(
    point: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nan(tone: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(tone)) == 5, np.nan, tone).astype(np.float32)

    good = spoken(tmp_path / "good.wav")
    cases = [
        ((point, spoken(tmp_path / "low.wav", 4000)), "low.wav has 4000"),
        ((point, spoken(tmp_path / "stereo.wav", change=lambda x: np.stack([x, x], 1))), "must be mono"),
        ((point, spoken(tmp_path / "empty.wav", change=lambda x: x[:0])), "is empty"),
        ((point, spoken(tmp_path / "clipped.wav", change=np.sign)), "must not be clipped"),
        ((point, spoken(tmp_path / "nan.wav", change=nan)), "NaN or infinite"),
        ((point, tmp_path / "none.wav"), "none.wav cannot be read"),
        ((tmp_path, good), "is no exported model, give RUN/models/ID"),
        ((point, good, "--expect", "nine 9"), "'nine 9' has '9'"),
    ]
    for arguments, said in cases:
        code, out, err = run(monkeypatch, capsys, *arguments, "--onnx")
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert said in err
    code, _, err = run(monkeypatch, capsys, point, good)
    assert code == 2
    assert "there is no model.so in" in err


def test_models_of_another_kind_and_missing_packages_are_named(
    point: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered = importlib.import_module("delivered")
    opened = delivered.opened
    (tmp_path / "manifest.json").write_text(json.dumps({"inputs": [{"shape": [1, 3, 224, 224], "dtype": "float32"}]}))
    with pytest.raises(UsageError, match=r"reads frames of the shape \(1, frames, 40\).*reads \[\(1, 3, 224, 224\)\]"):
        opened(tmp_path)
    monkeypatch.setattr(delivered, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"model\.onnx is run by ONNX Runtime, which is not installed: pip install"):
        opened(point, onnx=True)
    (point / "model.so").touch()
    with pytest.raises(UsageError, match=r"model\.so is run by Apache TVM, which is not installed"):
        opened(point)
    monkeypatch.setattr(delivered, "find_spec", importlib.util.find_spec)
    with pytest.raises(UsageError, match=r"model\.so is not a compiled model"):
        opened(point)
    (point / "model.so").unlink()
