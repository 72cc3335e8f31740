"""Several tasks as one: a model with all their inputs and outputs, whose metrics are theirs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.errors import UsageError
from autocomp.graph.batches import Axes, axes_of, count, part
from autocomp.tasks.guess import describe
from autocomp.tasks.task import Task, evaluate_task, objective_of

MEAN = "mean"  # the objective of a joint task whose parts have objectives of different names


class Together(nn.Module):
    """Models side by side: takes the inputs of the first, then of the second, and so on; returns a tuple of what each returns.

    Without ``inputs``, how many each takes, all take the same ones.
    """

    def __init__(self, models: Sequence[nn.Module], inputs: Sequence[int] | None) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.inputs = inputs

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        if self.inputs is None:
            return tuple(model(*inputs) for model in self.models)
        given = iter(inputs)
        return tuple(
            model(*itertools.islice(given, take)) for model, take in zip(self.models, self.inputs, strict=True)
        )


class Alone(nn.Module):
    """One of the models in a joint one: the others get their ``examples``, as many samples as it gets itself; without these the same."""

    def __init__(
        self, whole: nn.Module, index: int, examples: Sequence[tuple[Tensor, ...]], axes: Sequence[Axes | None]
    ) -> None:
        super().__init__()
        self.whole, self.index, self.examples, self.axes = whole, index, tuple(examples), tuple(axes)

    def forward(self, *inputs: Tensor) -> Any:
        if not self.examples:
            return self.whole(*inputs)[self.index]
        samples = count(inputs, self.axes[self.index])
        each = [
            inputs if index == self.index else _so_many(example, axes, samples)
            for index, (example, axes) in enumerate(zip(self.examples, self.axes, strict=True))
        ]
        return self.whole(*itertools.chain(*each))[self.index]


def joint(
    tasks: Sequence[Task], names: Sequence[str], model: nn.Module | None = None, same_inputs: bool = False
) -> Task:
    """The task of all of these at once, by ``model`` or the tasks' own side by side; with ``same_inputs`` all answer about the same.

    Its objective is the mean of theirs, under their name where they have one in common (else `MEAN`); each task's own is a slice of it, named
    ``OBJECTIVE/TASK``, the task's slices ``OBJECTIVE/TASK/SLICE``. It has training data and a held-out test where all of them have. Of the same
    inputs nobody knows all labels: it is trained without. UsageError where the metrics cannot be averaged.
    """
    refuse_unlike(tasks, names)
    if same_inputs:
        _refuse_other_inputs(tasks, names)
    first, inputs = tasks[0], None if same_inputs else [len(task.example_inputs) for task in tasks]
    taught, losses = (
        all(task.train is not None for task in tasks),
        [task.loss for task in tasks if task.loss is not None],
    )
    labelled = taught and len(losses) == len(tasks) and not same_inputs
    axes = [axes_of(task.example_inputs, task.batch_axes) for task in tasks]
    most = max(count(task.example_inputs, task.batch_axes) for task in tasks)
    examples = [_so_many(task.example_inputs, task.batch_axes, most) for task in tasks]
    read = partial(_evaluated, tasks=tasks, names=names, same_inputs=same_inputs)
    return Task(
        model=Together([task.model for task in tasks], inputs).eval() if model is None else model,
        example_inputs=first.example_inputs if same_inputs else _row(examples),
        calibration=_in_turn(tasks) if same_inputs else _side_by_side(tasks),
        evaluate=partial(read, split="validation"),
        test=partial(read, split="test") if all(task.test for task in tasks) else None,
        train=Training(tasks, names, same_inputs) if taught and (labelled or same_inputs) else None,
        loss=partial(_loss, losses=losses) if labelled else None,
        augment=partial(_augmented, tasks=tasks, same_inputs=same_inputs)
        if any(task.augment for task in tasks)
        else None,
        higher_is_better=first.higher_is_better,
        unit=first.unit,
        outputs=_outputs(tasks),
        name="+".join(names),
        description=f"{', '.join(names)} by one model",
        batch_axes=axes[0] if same_inputs else _row(axes),
    )


def _outputs(tasks: Sequence[Task]) -> tuple[str, ...] | None:
    """What the outputs are, of all tasks in a row; None where none of them states it."""
    if all(task.outputs is None for task in tasks):
        return None
    return tuple(
        str(output)
        for task in tasks
        for output in describe(task.model, task.calibration, task.batch_axes, task.outputs)
    )


def _augmented(batch: tuple[Tensor, ...], tasks: Sequence[Task], same_inputs: bool) -> tuple[Tensor, ...]:
    """A batch changed anew by the tasks that say how: each its own inputs; of the same inputs by the first that does."""
    if same_inputs:
        return next(task.augment for task in tasks if task.augment)(batch)
    given, found = iter(batch), []
    for task in tasks:
        own = tuple(itertools.islice(given, len(task.example_inputs)))
        found.append(own if task.augment is None else tuple(task.augment(own)))
    return _row(found)


def refuse_unlike(tasks: Sequence[Task], names: Sequence[str]) -> None:
    """UsageError where two tasks are not judged alike."""
    for task, name in zip(tasks, names, strict=True):
        for what in ("higher_is_better", "unit"):
            ours, theirs = getattr(tasks[0], what), getattr(task, what)
            if ours != theirs:
                raise UsageError(
                    f"tasks are fused whose metrics can be averaged: {what} is {ours!r} of {names[0]}, {theirs!r} of {name}"
                )


def _refuse_other_inputs(tasks: Sequence[Task], names: Sequence[str]) -> None:
    kinds = [[(tuple(tensor.shape), tensor.dtype) for tensor in task.example_inputs] for task in tasks]
    for kind, name in zip(kinds, names, strict=True):
        if kind != kinds[0]:
            raise UsageError(
                f"the same inputs are asked for, but {name} and {names[0]} take others: {kind} and {kinds[0]}"
            )


def _row(each: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(itertools.chain(*each))


@dataclass
class Training:
    """Batches of all tasks side by side, until the first has no more in this pass; of the ``same_inputs`` in turn.

    Where batches are of different sizes the larger are gone through in parts. UsageError where labels cannot be taken apart.
    """

    tasks: Sequence[Task]
    names: Sequence[str]
    same_inputs: bool = False

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        trains = [task.train for task in self.tasks if task.train is not None]
        if self.same_inputs:
            for drawn in zip(*trains, strict=False):
                yield from drawn
            return
        for parts in _walk([iter(train) for train in trains], [self._taken(k) for k in range(len(trains))]):
            yield _row(inputs for inputs, _ in parts), tuple(target for _, target in parts)

    def _taken(self, index: int) -> Callable[[Any, int, int | None], Any]:
        """What counts the samples of a batch of one task, or takes some of them."""
        task, name = self.tasks[index], self.names[index]

        def take(drawn: Any, start: int, length: int | None) -> Any:
            inputs, target = tuple(drawn[0]), drawn[1]
            samples = count(inputs, task.batch_axes)
            if length is None:
                return samples
            if (start, length) == (0, samples):
                return inputs, target
            return part(inputs, start, length, task.batch_axes), _labels(target, start, length, samples, name)

        return take


def _labels(target: Any, start: int, length: int, samples: int, name: str) -> Any:
    if isinstance(target, Tensor) and target.dim() and len(target) == samples:
        return target[start : start + length]
    if isinstance(target, tuple | list):
        return type(target)(_labels(item, start, length, samples, name) for item in target)
    raise UsageError(
        f"Task.train of {name} and of another task have batches of different sizes, and its labels cannot be taken apart by samples: give "
        "batches of the same size"
    )


def _walk(
    sources: Sequence[Iterator[Any]], take: Sequence[Callable[[Any, int, int | None], Any]]
) -> Iterator[list[Any]]:
    """As many samples of each source at a time as all have left of their batch; ends where one has no more batches."""
    held: list[Any] = [None] * len(sources)
    start = [0] * len(sources)
    while True:
        for index, source in enumerate(sources):
            if held[index] is None:
                held[index] = next(source, None)
                if held[index] is None:
                    return
        left = [taken(batch, 0, None) - begun for taken, batch, begun in zip(take, held, start, strict=True)]
        least = min(left)
        yield [taken(batch, begun, least) for taken, batch, begun in zip(take, held, start, strict=True)]
        for index, rest in enumerate(left):
            start[index] += least
            if rest == least:
                held[index], start[index] = None, 0


def _loss(outputs: Sequence[Any], targets: Sequence[Any], losses: Sequence[Callable[[Any, Any], Tensor]]) -> Tensor:
    """The mean of the tasks' losses."""
    each = [loss(output, target) for loss, output, target in zip(losses, outputs, targets, strict=True)]
    return torch.stack([one.reshape(()) for one in each]).mean()


def _evaluated(
    model: nn.Module, tasks: Sequence[Task], names: Sequence[str], same_inputs: bool, split: str
) -> dict[str, Any]:
    examples, axes = [] if same_inputs else [task.example_inputs for task in tasks], [task.batch_axes for task in tasks]
    every = [evaluate_task(task, Alone(model, k, examples, axes), split) for k, task in enumerate(tasks)]
    own = [objective_of(task, metrics) for task, metrics in zip(tasks, every, strict=True)]
    whole = own[0] if len(set(own)) == 1 else MEAN
    mean = sum(metrics[name] for name, metrics in zip(own, every, strict=True)) / len(tasks)
    found: dict[str, Any] = {}
    for task, objective, metrics in zip(names, own, every, strict=True):
        for name, value in metrics.items():
            inside = name == objective or name.startswith(f"{objective}/")
            label = f"{whole}/{task}{name.removeprefix(objective)}" if inside else f"{task}/{name}"
            known = metrics.samples.get(name)
            found[label] = value if known is None else known.tolist()
    return {whole: _pooled([m.samples.get(o) for m, o in zip(every, own, strict=True)], mean), **found}


def _pooled(samples: Sequence[Any], mean: float) -> list[float] | float:
    """Values whose mean is that of the tasks' means, and whose standard error is its own: what tasks differ by is no error of either."""
    known = [values for values in samples if values is not None]
    if len(known) < len(samples):
        return mean
    total = sum(map(len, known))
    return [
        mean + float(value - values.mean()) * total / (len(known) * len(values)) for values in known for value in values
    ]


def _side_by_side(tasks: Sequence[Task]) -> list[tuple[Tensor, ...]]:
    """Calibration samples of all tasks side by side: all of the one with the most, those of the others again and again."""

    def taken(task: Task) -> Callable[[Any, int, int | None], Any]:
        return lambda batch, start, length: (
            count(batch, task.batch_axes) if length is None else part(batch, start, length, task.batch_axes)
        )

    totals = [sum(count(batch, task.batch_axes) for batch in task.calibration) for task in tasks]
    longest = totals.index(max(totals))
    sources = [
        iter(task.calibration) if k == longest else itertools.cycle(task.calibration) for k, task in enumerate(tasks)
    ]
    return [_row(parts) for parts in _walk(sources, [taken(task) for task in tasks])]


def _in_turn(tasks: Sequence[Task]) -> list[tuple[Tensor, ...]]:
    """Calibration batches of one task after those of another, until none has any."""
    rows = itertools.zip_longest(*(task.calibration for task in tasks))
    return [batch for batches in rows for batch in batches if batch is not None]


def _so_many(example: tuple[Tensor, ...], axes: Axes | None, samples: int) -> tuple[Tensor, ...]:
    """An example of one batch brought to so many samples, by repeating them."""
    have = count(example, axes)
    if have == samples:
        return example
    index = torch.arange(samples) % have
    return tuple(
        tensor if axis is None else tensor.index_select(axis, index)
        for tensor, axis in zip(example, axes_of(example, axes), strict=True)
    )
