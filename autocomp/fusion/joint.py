"""Several tasks as one: a model with all their inputs and outputs, whose metrics are theirs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
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
    """Models side by side: takes the inputs of the first, then of the second, and so on; returns a tuple of what each returns."""

    def __init__(self, models: Sequence[nn.Module], inputs: Sequence[int]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.inputs = tuple(inputs)

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        given = iter(inputs)
        return tuple(
            model(*itertools.islice(given, take)) for model, take in zip(self.models, self.inputs, strict=True)
        )


class Alone(nn.Module):
    """One of the models in a joint one: the others get their example inputs, as many samples as it gets itself."""

    def __init__(
        self, whole: nn.Module, index: int, examples: Sequence[tuple[Tensor, ...]], axes: Sequence[Axes | None]
    ) -> None:
        super().__init__()
        self.whole, self.index, self.examples, self.axes = whole, index, tuple(examples), tuple(axes)

    def forward(self, *inputs: Tensor) -> Any:
        samples = count(inputs, self.axes[self.index])
        each = [
            inputs if index == self.index else _so_many(example, axes, samples)
            for index, (example, axes) in enumerate(zip(self.examples, self.axes, strict=True))
        ]
        return self.whole(*itertools.chain(*each))[self.index]


def joint(tasks: Sequence[Task], names: Sequence[str], model: nn.Module | None = None) -> Task:
    """The task of all of these at once, by ``model`` or the tasks' own side by side.

    Its metrics are named ``NAME/METRIC``, its objective is ``mean``, of their objectives. It has training data and a held-out test where all of
    them have. UsageError where the metrics cannot be averaged.
    """
    refuse_unlike(tasks, names)
    first = tasks[0]
    trains, losses, tests = ([getattr(task, name) for task in tasks] for name in ("train", "loss", "test"))
    labelled = all(value is not None for value in (*trains, *losses))
    axes = [axes_of(task.example_inputs, task.batch_axes) for task in tasks]
    return Task(
        model=Together([task.model for task in tasks], _inputs(tasks)) if model is None else model,
        example_inputs=tuple(itertools.chain(*(task.example_inputs for task in tasks))),
        calibration=list(_side_by_side([task.calibration for task in tasks], tasks)),
        evaluate=partial(_evaluated, tasks=tasks, names=names, split="validation"),
        test=partial(_evaluated, tasks=tasks, names=names, split="test") if all(tests) else None,
        train=Training(tasks) if labelled else None,
        loss=partial(_loss, losses=losses) if labelled else None,
        objective=MEAN,
        higher_is_better=first.higher_is_better,
        unit=first.unit,
        name="+".join(names),
        description=f"{', '.join(names)} by one model",
        batch_axes=tuple(itertools.chain(*axes)),
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


@dataclass
class Training:
    """Batches of all tasks side by side, as many as the task with the fewest has in a pass."""

    tasks: Sequence[Task]

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        for drawn in zip(*(task.train for task in self.tasks if task.train is not None), strict=False):
            inputs = [tuple(batch) for batch, _ in drawn]
            samples = [count(batch, task.batch_axes) for batch, task in zip(inputs, self.tasks, strict=True)]
            if len(set(samples)) > 1:
                least = min(samples)
                inputs = [
                    part(batch, 0, least, task.batch_axes) for batch, task in zip(inputs, self.tasks, strict=True)
                ]
                drawn = [(None, _first_of(target, least)) for _, target in drawn]  # type: ignore[assignment]
            yield tuple(itertools.chain(*inputs)), tuple(target for _, target in drawn)


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


def _evaluated(model: nn.Module, tasks: Sequence[Task], names: Sequence[str], split: str) -> dict[str, Any]:
    examples, axes = [task.example_inputs for task in tasks], [task.batch_axes for task in tasks]
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


def _side_by_side(
    calibrations: Sequence[Sequence[tuple[Tensor, ...]]], tasks: Sequence[Task]
) -> Iterator[tuple[Tensor, ...]]:
    """Batches of all tasks side by side, as many samples of each as of the one with the fewest."""
    for batches in zip(*calibrations, strict=False):
        least = min(count(batch, task.batch_axes) for batch, task in zip(batches, tasks, strict=True))
        yield tuple(
            itertools.chain(
                *(part(batch, 0, least, task.batch_axes) for batch, task in zip(batches, tasks, strict=True))
            )
        )


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


def _inputs(tasks: Sequence[Task]) -> list[int]:
    return [len(task.example_inputs) for task in tasks]
