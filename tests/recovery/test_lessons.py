"""Training data: what a loader, a loss and an augmentation do to their tensors reaches no other lesson; what changed since is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import tiny_task
import torch
from torch import Tensor, nn

from autocomp.errors import UsageError
from autocomp.recovery.lessons import Teaching, owned
from autocomp.recovery.losses import Features
from autocomp.recovery.objective import batch_loss
from autocomp.recovery.recipe import load_recipe
from autocomp.run.taught import taught, taught_otherwise
from autocomp.tasks.task import Task


class OneBuffer:
    """Six batches in the same tensors, filled anew for each."""

    def __init__(self) -> None:
        self.inputs, self.labels = tiny_task.data(64, 0)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for seed in range(100, 106):
            inputs, labels = tiny_task.data(64, seed)
            self.inputs.copy_(inputs)
            self.labels.copy_(labels)
            yield (self.inputs,), self.labels


class Writes(tiny_task.Batches):
    """Training data that write to the task's own."""

    def __init__(self, task: Task) -> None:
        self.calibration = task.calibration

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for batch in super().__iter__():
            self.calibration[0][0].mul_(1.01)
            yield batch


def drawn(task: Task) -> Teaching:
    teaching = Teaching.of(task)
    teaching.lessons.draw()
    return teaching


def in_place(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    batch[0].add_(0.3 * torch.randn_like(batch[0]))
    return batch


def test_a_loader_may_fill_one_buffer_again_and_again() -> None:
    task = tiny_task.learning()
    expected = drawn(task).lessons.pool
    task.train = OneBuffer()
    teaching = drawn(task)
    found = teaching.lessons.pool
    assert len(found) == len(expected) == 6
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.inputs, theirs.inputs, rtol=0, atol=0)
        torch.testing.assert_close(ours.target, theirs.target, rtol=0, atol=0)
        torch.testing.assert_close(ours.rows, theirs.rows, rtol=0, atol=0)


def test_an_augmentation_may_write_to_its_batch() -> None:
    task = tiny_task.task()
    task.augment = in_place
    before = task.calibration[0][0].clone()
    teaching = drawn(task)
    torch.testing.assert_close(task.calibration[0][0], before, rtol=0, atol=0)
    assert teaching.lessons.passes > 1, "every pass is another"
    for lesson in teaching.lessons.pool[:3]:
        rows = teaching.comparison.rows(teaching.teacher(*lesson.inputs), lesson.samples)
        torch.testing.assert_close(rows, lesson.rows)


def test_a_loss_may_write_to_its_target() -> None:
    task = tiny_task.learning()

    def smoothed(answer: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(answer, target.mul_(0).add_(1))

    task.loss = smoothed
    teaching = drawn(task)
    before = teaching.lessons.pool[0].target.clone()
    stage = load_recipe("default").stages[0].model_copy(update={"labels": 1.0})

    batch_loss(
        teaching.teacher, teaching, Features(teaching.teacher, {}), stage, 0.0, teaching.lessons.pool[0], nullcontext
    )
    torch.testing.assert_close(teaching.lessons.pool[0].target, before, rtol=0, atol=0)


def test_training_data_that_write_to_the_task_s_own_are_refused() -> None:
    task = tiny_task.learning()
    task.train = Writes(task)
    with pytest.raises(UsageError, match=r"Task\.train changed Task\.calibration\[0\]\[0\] in place"):
        drawn(task)


def test_what_is_owned_is_the_same_and_shares_nothing() -> None:
    tensor = torch.arange(4.0)
    found: Any = owned({"a": (tensor, [tensor, 3]), "b": None})
    assert found["b"] is None
    assert found["a"][1][1] == 3
    tensor.zero_()
    torch.testing.assert_close(found["a"][0], torch.arange(4.0))
    torch.testing.assert_close(found["a"][1][0], torch.arange(4.0))


class Zeros(tiny_task.Batches):
    """The same inputs, every label 0."""

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for inputs, labels in super().__iter__():
            yield inputs, torch.zeros_like(labels)


class Shuffled(tiny_task.Batches):
    """The same batches in another order at each pass."""

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        batches = list(super().__iter__())
        return iter([batches[k] for k in torch.randperm(len(batches)).tolist()])


def without_iter(_: Task) -> None: ...


def other_labels(task: Task) -> None:
    task.train = Zeros()


def other_loss(task: Task) -> None:
    task.loss = lambda answer, target: 2 * nn.functional.cross_entropy(answer, target)


def augmented(task: Task) -> None:
    task.augment = in_place


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_iter, []),
        (other_labels, ["the source of train", "the training data"]),
        (other_loss, ["the source of loss", "the training data"]),
        (augmented, ["the source of augment"]),
    ],
)
def test_what_a_training_is_taught_with_is_known_again(change: Callable[[Task], None], words: list[str]) -> None:
    before, task = tiny_task.learning(), tiny_task.learning()
    change(task)
    found = taught_otherwise(taught(before, drawn(before)), taught(task, drawn(task)))
    assert [name for name in words if name not in found] == []
    assert bool(found) == bool(words)


def test_another_order_of_the_same_data_is_no_change() -> None:
    task = tiny_task.learning()
    task.train = Shuffled()
    for _ in range(4):
        one = drawn(task)
        assert not one.lessons.still
        assert one.lessons.each_pass == 6
        assert taught_otherwise(taught(task, one), taught(task, drawn(task))) == []
