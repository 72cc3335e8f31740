"""Training data with the uncompressed model's answers. Drawn once and gone through by every student, where it fits into memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from autocomp.errors import AutocompError, UsageError, last_line
from autocomp.graph.batches import Axes, Batch, count, first, split
from autocomp.processes import interrupt
from autocomp.tasks.divergence import Comparison, compare
from autocomp.tasks.guess import describe
from autocomp.tasks.task import checked_batch
from autocomp.tasks.untouched import unwritten

if TYPE_CHECKING:
    from autocomp.tasks.task import Task

# Chosen by hand, not measured.
POOL_BYTES = 1 << 29  # of lessons kept at most
PASSES = 40  # through the data at most that are kept; augmented data differ in each
BLOCKED = 120.0  # seconds that a loader may take for a batch
BATCH = 64  # samples, where calibration data stand in for training data
LOOKED_AT = 256  # samples that say how outputs are compared


class Lesson(NamedTuple):
    """A batch: inputs, what `Task.loss` takes beside the answer (None: no labels), rows of the teacher's answers, samples."""

    inputs: Batch
    target: Any
    rows: list[Tensor]
    samples: int


@dataclass(frozen=True)
class Teaching:
    """What students of one task are trained with. ``calibration`` is what BatchNorm statistics are taken of at the end."""

    teacher: nn.Module
    comparison: Comparison
    loss: Callable[[Any, Tensor], Tensor] | None
    axes: Axes | None
    calibration: Sequence[Batch]
    lessons: Lessons

    @classmethod
    def of(cls, task: Task, samples: int = LOOKED_AT, seed: int = 0) -> Teaching:
        """That of a task, whose model is the teacher; ``samples`` of its calibration data are looked at. UsageError as `describe`."""
        teacher, axes = task.model.eval(), task.batch_axes
        batches = first(task.calibration, samples, axes)
        outputs = describe(teacher, list(batches), axes, task.outputs)
        if all(output.kind in ("decisions", "ignored") for output in outputs) and (
            task.loss is None or task.train is None
        ):
            raise UsageError(
                "there is nothing to train towards: the outputs are decisions, which have no gradient, and the task has no labels: "
                "give Task.train and Task.loss, or outputs before the decision"
            )
        with torch.no_grad():
            known = [(teacher(*batch), count(batch, axes)) for batch in batches]
        comparison, _ = compare(outputs, known, sum(n for _, n in known))
        # places left out while comparing whole sets of samples need not be left out of a batch
        comparison = Comparison(comparison.outputs, (1,) * len(comparison.counted), comparison.scales)
        labelled = task.loss is not None and task.train is not None
        lessons = Lessons(task, teacher, comparison, seed)
        return cls(teacher, comparison, task.loss if labelled else None, axes, batches, lessons)


class Lessons:
    """Batches of a task's training data, or of its calibration data where it has none, with the teacher's answers.

    Where a pass through the data fits into memory, lessons are drawn at the beginning (`draw`) and gone through in an order of each pass's
    own; else they are drawn as they are needed. In both cases lesson ``n`` of a task is always the same, as far as `Task.train` is.
    """

    def __init__(self, task: Task, teacher: nn.Module, comparison: Comparison, seed: int = 0) -> None:
        self.seed = seed  # of the order of each pass
        self.axes, self.example = task.batch_axes, task.example_inputs
        self.teacher, self.comparison = teacher, comparison
        self.labelled = task.train is not None and task.loss is not None
        self.source: Iterable[Any] = task.train if task.train is not None else _Unlabelled(task)
        self.where = "Task.train" if task.train is not None else "Task.calibration"
        self.calibration = task.calibration
        self.pool: list[Lesson] = []
        self.passes = 0  # whole ones that the pool holds
        self.still = False  # whether a second pass was as the first: nothing is drawn at random
        self.seconds = 0.0  # that a lesson took to draw, on average

    def draw(self, seconds: float = float("inf"), most: int = 1 << 30) -> None:
        """Fill the pool, for so many seconds and lessons at most. It stays empty where not even one pass fits.

        UsageError if there is no batch, or one that cannot be used, or the task's other data were written to meanwhile.
        """
        with unwritten(self.where, self.example, self.calibration):
            self._fill(seconds, most)

    def _fill(self, seconds: float, most: int) -> None:
        start, size, complete = time.monotonic(), 0, 0
        for passes in range(PASSES):
            before = len(self.pool)
            for lesson in self._pass():
                self.pool.append(lesson)
                size += _bytes(lesson)
                self.seconds = (time.monotonic() - start) / len(self.pool)
                if size > POOL_BYTES or time.monotonic() - start > seconds or len(self.pool) >= most:
                    break
            else:
                self.passes, complete = passes + 1, len(self.pool)
                if self.passes == 2 and _alike(
                    self.pool[:before], self.pool[before:]
                ):  # nothing is drawn at random: one pass says all
                    complete, self.passes, self.still = before, 1, True
                    break
                continue
            break
        if complete or len(self.pool) >= most:
            self.pool = self.pool[: complete or most]
        else:
            self.pool = []

    @property
    def each_pass(self) -> int:
        """Lessons in a pass; 0 where that is not known."""
        return len(self.pool) // self.passes if self.passes else 0

    def begin(self, step: int) -> Iterator[Lesson]:
        """Lessons from number ``step`` on, for ever."""
        if self.pool:
            while True:
                # a prime: torch takes 32 bits of a seed, and passes of one seed meet no other's
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step // len(self.pool))
                order = torch.randperm(len(self.pool), generator=generator)
                for place in order[step % len(self.pool) :].tolist():
                    yield self.pool[place]
                    step += 1
        skip = step
        while True:
            for inputs, target in self._batches():
                if skip:
                    skip -= 1
                else:
                    yield self._lesson(inputs, target)

    def _pass(self) -> Iterator[Lesson]:
        for inputs, target in self._batches():
            yield self._lesson(inputs, target)

    def _batches(self) -> Iterator[tuple[Batch, Any]]:
        """One pass of the task's own data, checked."""
        index = -1
        try:
            with interrupt.limited(BLOCKED):
                source = iter(self.source)
            while True:
                with interrupt.limited(BLOCKED):
                    item = next(source, None)
                if item is None:
                    break
                index += 1
                yield self._checked(item, index)
        except interrupt.OutOfTime:
            raise UsageError(
                f"{self.where} gave no batch within {BLOCKED:.0f} s after batch {index}: does its loader block?"
            ) from None
        except AutocompError:
            raise
        except Exception as error:
            raise UsageError(
                f"{self.where} raised {type(error).__name__} after batch {index}: {last_line(error)}"
            ) from error
        if index < 0:
            raise UsageError(
                f"{self.where} yields no batch: it must give (inputs, target) pairs afresh each time it is gone through"
            )

    def _checked(self, item: Any, index: int) -> tuple[Batch, Any]:
        where = f"{self.where} batch {index}"
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise UsageError(
                f"{where} must be a pair (inputs, target), inputs a tuple of tensors; got {type(item).__name__}"
            )
        inputs = checked_batch(item[0], f"{where}, its inputs")
        if len(inputs) != len(self.example):
            raise UsageError(
                f"{where} must have {len(self.example)} input(s), as Task.example_inputs has; it has {len(inputs)}"
            )
        return inputs, item[1]

    def _lesson(self, inputs: Batch, target: Any) -> Lesson:
        """One lesson, of memory of its own: a loader may fill the same tensors again and again."""
        samples, inputs, target = count(inputs, self.axes), owned(inputs), owned(target)
        with torch.no_grad():
            rows = [row.clone() for row in self.comparison.rows(self.teacher(*inputs), samples)]
        return Lesson(inputs, target if self.labelled else None, rows, samples)


class _Unlabelled:
    """Calibration data as training data without labels, and augmented where the task says how."""

    def __init__(self, task: Task) -> None:
        self.batches, self.axes, self.augment = task.calibration, task.batch_axes, task.augment

    def __iter__(self) -> Iterator[tuple[Batch, None]]:
        for batch in self.batches:
            for piece in split(batch, BATCH, self.axes):
                yield (piece if self.augment is None else tuple(self.augment(owned(piece)))), None


def owned(value: Any) -> Any:
    """The same value in memory of its own, whatever tensors and arrays are in it: what others do to theirs, or to this, concerns nobody."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: owned(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(owned(item) for item in value)
    return copy.deepcopy(value)


def _bytes(lesson: Lesson) -> int:
    return sum(tensor.nbytes for tensor in (*lesson.inputs, *lesson.rows))


def _alike(first: Sequence[Lesson], second: Sequence[Lesson]) -> bool:
    """Whether two passes have the same inputs in the same order."""
    return len(first) == len(second) and all(
        a.shape == b.shape and bool((a == b).all())
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one.inputs, other.inputs, strict=True)
    )
