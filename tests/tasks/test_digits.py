"""The built-in task: its splits, slices, model and cache. One or two epochs stand for thirty."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autocomp.progress import Progress
from autocomp.tasks import digits
from autocomp.tasks.task import evaluate_task


@pytest.fixture(autouse=True)
def _cache_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def keys(split: digits.Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_splits_are_apart_whole_and_in_proportion() -> None:
    splits = digits.load_splits()
    assert [len(split.targets) for split in splits] == [997, 400, 400]
    images = [keys(split) for split in splits]
    # The data holds no image twice, so sets count them and must not meet.
    assert sum(map(len, images)) == 1797
    assert images[0].isdisjoint(images[1] | images[2])
    assert images[1].isdisjoint(images[2])
    for split in splits:
        shares = torch.bincount(split.targets) / len(split.targets)
        assert (shares - 0.1).abs().max() < 0.01


def test_slices_are_the_same_every_time_and_differ_from_each_other() -> None:
    validation = digits.load_splits()[1]
    first, second = digits.slices(validation, 1), digits.slices(validation, 1)
    assert list(first) == ["clean", "noisy", "rotated"]
    for name in first:
        assert torch.equal(first[name].images, second[name].images)
        assert first[name].images.shape == (400, 1, 16, 16)
    noise = (first["noisy"].images - validation.images).std()
    assert noise == pytest.approx(digits.NOISE, rel=0.02)
    assert not torch.equal(first["rotated"].images, validation.images)


def test_rotation_by_nothing_changes_nothing_and_by_a_right_angle_turns() -> None:
    images = digits.load_splits()[1].images[:5]
    still = torch.zeros(5, 2)
    assert torch.allclose(digits.rotate(images, torch.zeros(5), still), images, atol=1e-5)
    turned = digits.rotate(images, torch.full((5,), 90.0), still)
    assert torch.allclose(turned, torch.rot90(images, 1, (2, 3)), atol=1e-4)


def test_two_epochs_learn_and_repeat_themselves() -> None:
    progress = Progress()
    task = digits.load_digits_task(epochs=2, cache=False, progress=progress)
    metrics = evaluate_task(task, task.model)
    assert list(metrics) == ["accuracy", "accuracy/clean", "accuracy/noisy", "accuracy/rotated"]
    assert metrics["accuracy"] == pytest.approx(sum(list(metrics.values())[1:]) / 3)
    assert metrics["accuracy"] > 0.6  # chance is 0.1
    assert "train digits" in progress.seconds
    again = digits.load_digits_task(epochs=2, cache=False)
    for first, second in zip(task.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_callers_random_numbers_stay_as_they_were() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digits.load_digits_task(epochs=1, cache=False)
    assert torch.equal(torch.rand(3), expected)


def test_model_is_of_the_size_stated_and_exports() -> None:
    model = digits.new_model().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 400_618
    example = torch.zeros(1, 1, 16, 16)
    exported = torch.export.export(model, (example,)).module()
    assert torch.allclose(exported(example), model(example), atol=1e-5)


def test_calibration_is_training_data_of_all_conditions() -> None:
    training, validation, _ = digits.load_splits()
    batches = digits.calibration_batches(training, seed=0)
    assert all(batch.shape == (64, 1, 16, 16) for (batch,) in batches)
    assert sum(len(batch) for (batch,) in batches) >= 512
    images = torch.cat([batch for (batch,) in batches])
    known, held_out = keys(training), keys(validation)
    clean = [image.numpy().tobytes() in known for image in images]
    assert 0.3 < sum(clean) / len(clean) < 0.37
    assert not any(image.numpy().tobytes() in held_out for image in images)


def test_training_batches_can_be_gone_through_again() -> None:
    task = digits.load_digits_task(epochs=1, cache=False)
    (inputs, targets), *_ = task.train
    assert inputs[0].shape == (64, 1, 16, 16)
    assert targets.shape == (64,)
    assert not torch.equal(next(iter(task.train))[0][0], inputs[0])
    assert torch.isfinite(task.loss(task.model(*inputs), targets))


def test_trained_once_then_cached(tmp_path: Path) -> None:
    first, second = Progress(), Progress()
    task = digits.load_digits_task(epochs=1, progress=first)
    again = digits.load_digits_task(epochs=1, progress=second)
    assert "train digits" in first.seconds
    assert second.seconds == {}
    assert not again.model.training
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    assert not [path for path in (tmp_path / "cache" / "tasks").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_cache_is_said_and_trained_again(tmp_path: Path, damage: str) -> None:
    task = digits.load_digits_task(epochs=1)
    (path,) = (tmp_path / "cache" / "tasks").glob("*.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:1000]), "empty": b""}[damage])
    progress = Progress()
    again = digits.load_digits_task(epochs=1, progress=progress)
    assert len(progress.warnings) == 1
    assert "cannot be used" in progress.warnings[0]
    assert "trained again" in progress.warnings[0]
    assert torch.equal(again.model.classifier.weight, task.model.classifier.weight)
    quiet = Progress()
    digits.load_digits_task(epochs=1, progress=quiet)
    assert quiet.warnings == []


@pytest.mark.slow
def test_full_recipe_reaches_its_accuracy() -> None:
    task = digits.load_digits_task(cache=False)
    assert evaluate_task(task, task.model)["accuracy/clean"] >= 0.985
