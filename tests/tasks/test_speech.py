"""The built-in task ``speech``: batches, metrics, model and splits, with few utterances. The recordings of people are stood in for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from autocomp.errors import CorruptError
from autocomp.progress import Progress
from autocomp.tasks.speech import corpus, recordings, task, train, trained, words
from autocomp.tasks.speech.batches import Augmentation, SpeechBatches, gains, mask
from autocomp.tasks.speech.corpus import HeldOut, held_out
from autocomp.tasks.speech.espeak import Order, synthesised
from autocomp.tasks.speech.features import BANDS, FRAMES, STEPS
from autocomp.tasks.speech.metrics import ctc_loss, error_rates, transcribed
from autocomp.tasks.task import evaluate_task

torch.set_num_threads(1)
FEW = {"human": 6, "synthetic": 6, "accent": 4}


@pytest.fixture(scope="module", autouse=True)
def own_recordings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of its own, where Menardi and June say two words each; nobody in the test split does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOCOMP_CACHE", str(tmp_path_factory.mktemp("speech")))
        alpha, nine = synthesised([Order("gmw/en+f3", "alpha"), Order("gmw/en+f3", "nine")])
        said = {
            f"{name}/{word}": [clip]
            for name in ("menardi", "june")
            for word, clip in (("alpha", alpha), ("nine", nine))
        }
        recordings.write(said)
        yield


@pytest.fixture(scope="module")
def validation() -> HeldOut:
    return held_out("validation", FEW, Progress())


class Answers(torch.nn.Module):
    """Says for each window of a split what it is told to, by the window's place in it."""

    def __init__(self, split: HeldOut, texts: list[str]) -> None:
        super().__init__()
        self.known = {
            self._name(frames): text for some in split.frames.values() for frames, text in zip(some, texts, strict=True)
        }

    def _name(self, frames: torch.Tensor) -> str:
        return hashlib.sha256(frames.numpy().tobytes()).hexdigest()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(len(x), 2 * STEPS, words.CLASSES)
        for row, frames in zip(scores, x, strict=True):
            classes = [c for found in words.encoded(self.known[self._name(frames)]) for c in (found, words.BLANK)]
            row[torch.arange(2 * STEPS), torch.tensor(classes + [words.BLANK] * (2 * STEPS - len(classes)))] = 1
        return scores


def test_a_split_has_its_kinds_and_conditions_and_is_the_same_every_time(validation: HeldOut) -> None:
    assert {kind: validation.kinds.count(kind) for kind in corpus.KINDS} == FEW
    assert {name: tuple(frames.shape) for name, frames in validation.frames.items()} == {
        name: (16, FRAMES, BANDS) for name in corpus.CONDITIONS
    }
    assert {"alpha", "nine"} <= set(validation.texts)
    again = held_out("validation", FEW, Progress())
    assert again.texts == validation.texts
    for name, frames in validation.frames.items():
        assert torch.equal(frames, again.frames[name])
    assert not torch.equal(validation.frames["clean"], validation.frames["10 dB"])


def test_who_says_every_word_right_has_no_errors(validation: HeldOut) -> None:
    rates = error_rates(Answers(validation, validation.texts), validation)
    slices = ("", "/human", "/synthetic", "/accent", "/10 dB", "/0 dB")
    assert list(rates) == [f"{name}{part}" for name in ("cer", "wer") for part in slices]
    assert all(float(values.sum()) == 0 for values in rates.values())
    assert [len(rates[f"cer{part}"]) for part in slices] == [16, 6, 6, 4, 16, 16]


def test_errors_count_in_the_slice_of_their_utterance(validation: HeldOut) -> None:
    texts = list(validation.texts)
    place = next(
        n
        for n, (kind, text) in enumerate(zip(validation.kinds, texts, strict=True))
        if (kind, text) == ("human", "alpha")
    )
    texts[place] = "alfa"  # two edits of five characters
    rates = error_rates(Answers(validation, texts), validation)
    assert float(rates["cer"][place]) == float(rates["cer"].sum()) == pytest.approx(2 / 5)
    assert float(rates["cer/human"].sum()) == pytest.approx(2 / 5)
    assert float(rates["wer/human"].sum()) == 1
    assert float(rates["cer/accent"].sum()) == float(rates["cer/synthetic"].sum()) == 0


def test_batches_repeat_with_their_seed_and_differ_from_pass_to_pass() -> None:
    first, second = (SpeechBatches(30, 8, 2, seed=5) for _ in range(2))
    one, again, two = list(first), list(second), list(first)
    assert len(one) == len(first) == 2
    (frames,), target = one[0]
    assert frames.shape == (8, FRAMES, BANDS)
    assert torch.isfinite(frames).all()
    assert torch.equal(frames, again[0][0][0])
    assert torch.equal(target, again[0][1])
    assert not torch.equal(frames, two[0][0][0])
    texts = [words.decoded(torch.stack([row, torch.zeros_like(row)], 1).flatten().tolist()) for row in target]
    assert all(word in words.WORDS for text in texts for word in text.split())


def test_without_augmentation_an_utterance_is_what_was_said() -> None:
    nothing = Augmentation(**dict.fromkeys(("speed", "warp", "masks", "noise", "microphone"), False))
    (frames,), _ = next(iter(SpeechBatches(30, 4, 1, seed=5, augmentation=nothing)))
    assert float(frames.amax((1, 2)).min()) == 1
    assert ((frames == -1).all(2).sum(1) > 10).all()  # silence around it
    for name in ("warp", "noise", "microphone", "masks"):
        (other,), _ = next(
            iter(SpeechBatches(30, 4, 1, seed=5, augmentation=dataclasses.replace(nothing, **{name: True})))
        )
        assert not torch.equal(frames, other)


def test_masks_silence_whole_frames_and_bands() -> None:
    frames = torch.ones(4, FRAMES, BANDS)
    mask(frames, np.random.default_rng(0))
    silent = frames == -1
    assert silent.any()
    assert torch.equal(silent, silent.all(2)[:, :, None] | silent.all(1)[:, None])
    assert silent.float().mean() < 0.5


def test_gains_stay_within_their_limit() -> None:
    found = gains(50, np.random.default_rng(0))
    assert found.shape == (50, 1, BANDS)
    assert float(found.log10().abs().max()) <= 0.6 + 1e-6


def test_loss_is_that_of_each_utterance_by_itself_and_can_be_learnt() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, STEPS, words.CLASSES, requires_grad=True)
    target = torch.tensor([words.encoded("nine one"), [*words.encoded("six"), *[words.BLANK] * 5]])
    loss = ctc_loss(logits, target)
    each = [ctc_loss(logits[:1], target[:1]), ctc_loss(logits[1:], target[1:, :3])]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    optimizer = torch.optim.Adam([logits], 0.2)
    for _ in range(60):
        optimizer.zero_grad()
        ctc_loss(logits, target).backward()
        optimizer.step()
    assert [words.decoded(row.tolist()) for row in logits.argmax(-1)] == ["nine one", "six"]


def test_training_changes_the_model_and_what_is_written_reads_back(tmp_path: Path, validation: HeldOut) -> None:
    recipe = train.Recipe(steps=50, batch=4, utterances=30)
    model = train.train(recipe, SpeechBatches(30, 4, 2, seed=5), Progress())
    train.write(model, recipe, {"validation": validation}, tmp_path)
    again = trained.load(tmp_path)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-3, rtol=1e-3)
    facts = json.loads((tmp_path / trained.SCORES).read_text())
    assert facts["recipe"]["steps"] == 50
    assert facts["recordings"] == {"menardi": 2, "june": 2}
    assert facts["scores"]["validation"]["cer/human"]["utterances"] == 6
    assert set(facts["decoded"]) == {"beam", "words"}
    assert set(facts["decoded"]["words"]["validation"]) == set(facts["scores"]["validation"])


def test_training_that_was_cut_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "EVERY", 4)
    recipe = train.Recipe(steps=10, batch=2, utterances=30, warm_up=0.3)

    class Cut(SpeechBatches):
        def _drawn(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
            if self.state()["batches"] == 6:
                raise KeyboardInterrupt
            return super()._drawn()

    def batches(kind: type[SpeechBatches] = SpeechBatches) -> SpeechBatches:
        return kind(30, 2, recipe.steps, seed=5, gentle=4)

    whole = train.train(recipe, batches(), Progress())
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe, batches(Cut), Progress(), tmp_path)
    kept = torch.load(tmp_path / train.CHECKPOINT, weights_only=True)
    assert kept["step"] == 4
    resumed = train.train(recipe, batches(), Progress(), tmp_path)
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name])
    other = train.train(dataclasses.replace(recipe, seed=1), batches(), Progress(), tmp_path)
    assert not torch.equal(other.head.weight, resumed.head.weight)


def test_another_model_than_the_scored_one_is_refused(tmp_path: Path) -> None:
    trained.save(trained.new_model(), {}, tmp_path)
    trained.load(tmp_path)
    path = tmp_path / trained.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptError, match=r"its checksum differs; install autocomp again"):
        trained.load(tmp_path)


def test_model_is_of_the_size_stated_and_heads_can_go() -> None:
    model = trained.load()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_321_468
    assert (trained.FOLDER / trained.WEIGHTS).stat().st_size <= 3_000_000
    attention = model.blocks[0].attention
    for layer in (attention.query, attention.key, attention.value):
        layer.weight = torch.nn.Parameter(layer.weight[:32])
        layer.bias = torch.nn.Parameter(layer.bias[:32])
    attention.out.weight = torch.nn.Parameter(attention.out.weight[:, :32])
    assert model(torch.zeros(2, FRAMES, BANDS)).shape == (2, STEPS, words.CLASSES)


def test_the_task_says_which_slice_is_missing_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "COUNTS", FEW)
    monkeypatch.setattr(task, "CALIBRATION_BATCH", 16)
    monkeypatch.setattr(task, "UTTERANCES", 30)
    progress = Progress()
    found = task.load_speech_task(progress=progress)
    (warning,) = progress.warnings
    assert warning.startswith("no recordings of people for test: its slice 'human' is left out; `python -m")
    metrics = evaluate_task(found, found.model)
    assert next(iter(metrics)) == "cer"
    assert "cer/human" in metrics
    assert metrics.errors()["cer/synthetic"] >= 0
    assert "cer/human" not in evaluate_task(found, found.model, "test")
    inputs, target = next(iter(found.train))
    assert torch.isfinite(found.loss(found.model(*inputs), target))
    assert "6 utterances human, 6 utterances synthetic, 4 utterances accent" in found.description


def test_another_length_has_the_same_weights_and_hears_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "COUNTS", {"human": 0, "synthetic": 6, "accent": 0})
    monkeypatch.setattr(task, "CALIBRATION_BATCH", 4)
    monkeypatch.setattr(task, "UTTERANCES", 30)
    four = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "speech" / "lengths.py"))["four_seconds"]()
    assert four.example_inputs[0].shape == (1, 2 * FRAMES, BANDS)
    assert four.model(*four.example_inputs).shape == (1, 2 * STEPS, words.CLASSES)
    clean = held_out("validation", task.COUNTS, Progress())
    rates = four.evaluate(four.model)
    ours = error_rates(trained.load(), clean)
    assert float(rates["cer/synthetic"].mean()) <= float(ours["cer/synthetic"].mean()) + 0.15
    (frames,), target = next(iter(four.train))
    assert torch.isfinite(four.loss(four.model(frames), target))


def test_the_shipped_model_hears_what_a_new_voice_says() -> None:
    """Of voices that it has not been trained on: half of the words at least, whatever version of espeak-ng this is."""
    split = held_out("test", {"human": 0, "synthetic": 10, "accent": 0}, Progress())
    heard = transcribed(trained.load(), split.frames["clean"])
    right = sum(one == other for one, other in zip(split.texts, heard, strict=True))
    assert right >= 5


def test_the_page_tells_what_the_shipped_model_scores() -> None:
    page = (Path(__file__).parents[2] / "docs" / "speech.md").read_text()
    scores = json.loads((trained.FOLDER / trained.SCORES).read_text())["scores"]
    for name, validated in scores["validation"].items():
        cells = [
            f"{one['percent']:.1f} ± {one['error']:.1f} ({one['utterances']})"
            for one in (validated, scores["test"][name])
        ]
        assert f"| `{name}` | {' | '.join(cells)} |" in page


def test_the_page_tells_what_each_decoding_scores() -> None:
    page = (Path(__file__).parents[2] / "docs" / "speech.md").read_text()
    stored = json.loads((trained.FOLDER / trained.SCORES).read_text())
    tests = [stored["scores"]["test"], stored["decoded"]["beam"]["test"], stored["decoded"]["words"]["test"]]
    for name in tests[0]:
        cells = [f"{one[name]['percent']:.1f} ± {one[name]['error']:.1f}" for one in tests]
        assert f"| `{name}` | {' | '.join(cells)} |" in page
