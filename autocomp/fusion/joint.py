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
from autocomp.tasks.task import Task, evaluate_task, objective_of

MEAN = "mean"  # the objective of a joint task: of the objectives of its parts


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

    Its metrics are named ``NAME/METRIC``, its objective is ``mean``, of their objectives. It has training data and a held-out test where all of
    them have. Of the same inputs nobody knows all labels: it is trained without. UsageError where the metrics cannot be averaged.
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
    read = partial(_evaluated, tasks=tasks, names=names, same_inputs=same_inputs)
    return Task(
        model=Together([task.model for task in tasks], inputs).eval() if model is None else model,
        example_inputs=first.example_inputs if same_inputs else _row(task.example_inputs for task in tasks),
        calibration=_in_turn(tasks) if same_inputs else _side_by_side(tasks),
        evaluate=partial(read, split="validation"),
        test=partial(read, split="test") if all(task.test for task in tasks) else None,
        train=Training(tasks, same_inputs) if taught and (labelled or same_inputs) else None,
        loss=partial(_loss, losses=losses) if labelled else None,
        objective=MEAN,
        higher_is_better=first.higher_is_better,
        unit=first.unit,
        name="+".join(names),
        description=f"{', '.join(names)} by one model",
        batch_axes=axes[0] if same_inputs else _row(axes),
    )


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
    """Batches of all tasks side by side, as many as the task with the fewest has in a pass; of the ``same_inputs`` in turn."""

    tasks: Sequence[Task]
    same_inputs: bool = False

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        for drawn in zip(*(task.train for task in self.tasks if task.train is not None), strict=False):
            if self.same_inputs:
                yield from drawn
                continue
            inputs = [tuple(batch) for batch, _ in drawn]
            samples = [count(batch, task.batch_axes) for batch, task in zip(inputs, self.tasks, strict=True)]
            least = min(samples)
            inputs = [part(batch, 0, least, task.batch_axes) for batch, task in zip(inputs, self.tasks, strict=True)]
            targets = [
                target if have == least else _first_of(target, least)
                for (_, target), have in zip(drawn, samples, strict=True)
            ]
            yield _row(inputs), tuple(targets)


def _first_of(target: Any, samples: int) -> Any:
    if isinstance(target, Tensor):
        return target[:samples]
    if isinstance(target, tuple | list):
        return type(target)(_first_of(item, samples) for item in target)
    return target


def _loss(outputs: Sequence[Any], targets: Sequence[Any], losses: Sequence[Callable[[Any, Any], Tensor]]) -> Tensor:
    """The mean of the tasks' losses."""
    each = [loss(output, target) for loss, output, target in zip(losses, outputs, targets, strict=True)]
    return torch.stack([one.reshape(()) for one in each]).mean()


def _evaluated(
    model: nn.Module, tasks: Sequence[Task], names: Sequence[str], same_inputs: bool, split: str
) -> dict[str, Any]:
    examples, axes = [] if same_inputs else [task.example_inputs for task in tasks], [task.batch_axes for task in tasks]
    found: dict[str, Any] = {}
    objectives = []
    for index, (task, name) in enumerate(zip(tasks, names, strict=True)):
        metrics = evaluate_task(task, Alone(model, index, examples, axes), split)
        objective = objective_of(task, metrics)
        for metric, value in metrics.items():
            known = metrics.samples.get(metric)
            found[f"{name}/{metric}"] = value if known is None else known.tolist()
        found[MEAN] = found.get(MEAN, 0.0) + metrics[objective] / len(tasks)
        if objective in metrics.samples:
            objectives.append(metrics.samples[objective])
    if len(objectives) == len(tasks):
        total = sum(map(len, objectives))
        # weighed so that their mean is that of the tasks' means
        found[MEAN] = [float(value) * total / (len(tasks) * len(values)) for values in objectives for value in values]
    return {MEAN: found.pop(MEAN), **found}


def _side_by_side(tasks: Sequence[Task]) -> list[tuple[Tensor, ...]]:
    """Calibration batches of all tasks side by side, as many samples of each as of the one with the fewest."""
    found = []
    for batches in zip(*(task.calibration for task in tasks), strict=False):
        least = min(count(batch, task.batch_axes) for batch, task in zip(batches, tasks, strict=True))
        found.append(_row(part(batch, 0, least, task.batch_axes) for batch, task in zip(batches, tasks, strict=True)))
    return found


def _in_turn(tasks: Sequence[Task]) -> list[tuple[Tensor, ...]]:
    """Calibration batches of one task after those of another."""
    return [batch for batches in zip(*(task.calibration for task in tasks), strict=False) for batch in batches]


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
