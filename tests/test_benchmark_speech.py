"""The speech benchmark: its front end in layers, its candidates, its tables, and what it makes of the Czech corpus's scripts."""

from __future__ import annotations

from types import SimpleNamespace

import fillets
import numpy as np
import pytest
import speech
import torch

from autocomp.records.candidate import Candidate
from autocomp.tasks.speech.features import log_mel

torch.set_num_threads(1)

SCRIPT = """
dialogId("hlava", "font_small", "Oh, \\"no\\" (not) again!")
dialogStr("Jej, už \\"zase\\"!")

dialogId("cas", "", "It is 7.")
dialogStr("Je 7 hodin.")
"""


def rates(cer: float) -> dict[str, list[float]]:
    return {"cer": [cer, 1.0], "cer/human": [2 * cer, 1.5]}


def test_the_front_end_in_layers_is_that_of_the_task() -> None:
    audio = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0)) * torch.hann_window(16_000)
    with torch.no_grad():
        torch.testing.assert_close(speech.LogMel()(audio), log_mel(audio), atol=1e-5, rtol=0)


def test_one_block_alone_is_compressed() -> None:
    names = ("blocks.1.before.into", "blocks.10.before.into", "blocks.2.out")
    dense = Candidate(dict.fromkeys(names, 64), {name: "dense" for name in names})
    strong = Candidate(dict.fromkeys(names, 16), {name: "strong" for name in names})
    space = SimpleNamespace(dense=lambda: dense, normalise=lambda candidate: candidate)
    found = speech.only(space, strong, 1)
    assert list(found.widths.values()) == [16, 64, 64]
    assert list(found.methods.values()) == ["strong", "dense", "dense"]


def test_every_part_has_its_rows_and_notes() -> None:
    parts = {
        "augmentation": {"steps": 7, "ways": {"none": {"cer": [40.0, 50.0], "cer/human": [60.0, 70.0]}}},
        "depth": {"dense": rates(8), "kinds": {"8 bits": {"bottom": rates(9)}}},
        "windows": {"2 s": {"seconds": {"module": 1e-3, "front end": 3e-3}, "memory": 2**20, "cer": [5.0, 1.0]}},
        "frontend": {"seconds": {"model": 1e-3, "torch": 2e-3, "inside": 4e-3}, "difference": 1e-6},
        "fillets-cs": {
            "steps": 9, "hours": 0.8, "lines": {"training": 5}, "dense": {"cer": [70.0, 2.0], "cer/known": [60.0, 3.0]},
            "front": [{"milliseconds": 10.0, "bytes": 2**20, "rates": {"cer": 71.0, "cer/known": 61.0}}],
        },
    }  # fmt: skip
    rows, notes = speech.table(parts)
    assert rows == [
        ["augmentation", "none", "45.0 ± 7.1", "human 65.0 ± 7.1", "", ""],
        ["depth", "dense", "8.0 ± 1.0", "human 16.0 ± 1.5", "", ""],
        ["depth", "8 bits, bottom", "9.0 ± 1.0", "human 18.0 ± 1.5", "", ""],
        ["windows", "2 s, 1.0 MiB at work", "5.0 ± 1.0", "", "4.00", "0.0020"],
        ["frontend", "outside, in torch", "", "", "3.00", "0.0015"],
        ["frontend", "inside, as a convolution", "", "", "4.00", "0.0020"],
        ["fillets-cs", "as trained", "70.0 ± 2.0", "cer/known 60.0", "", ""],
        ["fillets-cs", "compressed, 1.00 MiB", "71.0", "cer/known 61.0", "10.00", "0.0020"],
    ]
    assert len(notes) == 4
    assert speech.table({}) == ([], [])


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, speech.PROBE), (1e9, None)])
def test_steps_are_those_that_fit(monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int | None) -> None:
    monkeypatch.setattr(speech, "trained", lambda *_: None)
    found = speech.steps_within(seconds, SimpleNamespace())
    assert found == steps if steps else found > speech.PROBE


def test_lines_of_a_script_are_written_in_letters_or_left_out() -> None:
    found = fillets.LINE.findall(SCRIPT)
    assert [(name, role) for name, role, _ in found] == [("hlava", "font_small"), ("cas", "")]
    assert [fillets.written(text) for _, _, text in found] == ["jej už zase", None]
    assert fillets.written("…") is None
    assert fillets.greedy(torch.eye(1 + len(fillets.LETTERS))[fillets.encoded("už")]) == "už"


def test_levels_and_roles_are_held_out_whole() -> None:
    silence = np.zeros(80, np.int16)
    found = [
        fillets.Line(f"level{n:02}", role, "ano", silence) for n in range(20) for role in ("font_big", "font_crab")
    ]
    parts = fillets.split(found)
    levels = {name: {line.level for line in some} for name, some in parts.items() if name != "unseen"}
    assert levels["validation"] == {"level00", "level10"}
    assert levels["known"] == {"level01", "level11"}
    assert len(levels["training"]) == 16
    assert {line.role for line in parts["unseen"]} == {"font_crab"}
    assert {line.role for name in levels for line in parts[name]} == {"font_big"}


def test_batches_of_lines_are_as_the_network_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fillets, "Noises", lambda *_: SimpleNamespace(kinds=[0], drawn=lambda *_: np.ones(16_000)))
    tone = np.round(9000 * np.sin(np.arange(12_000))).astype(np.int16)
    (frames,), target = next(iter(fillets.Batches([fillets.Line("a", "b", "ano ne", tone)], 1, seed=0)))
    assert frames.shape == (fillets.BATCH, fillets.FRAMES, 40)
    assert torch.isfinite(frames).all()
    assert target[0].tolist() == fillets.encoded("ano ne")
