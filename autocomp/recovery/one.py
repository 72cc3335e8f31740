"""One compressed model recovered: trained, judged on validation, and handed back only where that made it better."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from autocomp.errors import UsageError
from autocomp.recovery.forms.whole import frozen
from autocomp.recovery.lessons import Teaching
from autocomp.recovery.rate import SEARCHING, search_rate
from autocomp.recovery.recipe import Recipe
from autocomp.recovery.schedules import DRAWING, Span
from autocomp.recovery.train import train
from autocomp.recovery.weights import search_weights, steps_within
from autocomp.tasks.task import Task, evaluate_task, objective_of

# Shares: of a model's weights that are 0 by intent, of those that training leaves so. Chosen by hand.
MANY_ZEROS, KEPT_ZEROS = 0.2, 0.9
LEAST_STEPS = 20  # of a training, or a pass through the data where that is less: fewer learn nothing


@dataclass(frozen=True)
class Recovered:
    """A model after its training, in evaluation mode, and how it went.

    ``model`` is the one that was given where training made it no better on validation (``better`` is false). ``before`` and ``after`` are its
    metrics, ``rate`` the learning rate taken, ``frozen`` the layers that did not train, ``curve`` (share of the training, loss).
    """

    model: nn.Module
    better: bool
    before: Mapping[str, float]
    after: Mapping[str, float]
    rate: float
    steps: int
    seconds: float
    recipe: str
    curve: list[tuple[float, float]]
    frozen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def recovered(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    span: Span,
    shared: dict[str, Tensor | None] | None = None,
    teaching: Teaching | None = None,
    checkpoint: Path | None = None,
    epochs: int | None = None,
) -> Recovered:
    """Train a compressed model of a task for a span, or so many ``epochs``, against the task's own model.

    Raises:
        UsageError: Nothing can be trained, the task's data or loss cannot be used, or the span is too short.
    """
    if recipe.refreshes:
        raise UsageError(
            f"recipe {recipe.name} chooses channels while training: that is for points of a search (autocomp recover RUN --recipe …)"
        )
    model = in_evaluation_mode(model)
    before = evaluate_task(task, model)
    if teaching is None:
        teaching = Teaching.of(task)
        teaching.lessons.draw(
            DRAWING * span.seconds if span.seconds else float("inf"), max(LEAST_STEPS, span.steps or 1 << 30)
        )
    if epochs is not None:
        span = Span(steps=epochs * (teaching.lessons.each_pass or LEAST_STEPS))
    most = SEARCHING * span.seconds if span.seconds is not None else math.inf
    rates = search_rate(model, teaching, recipe, most)
    refuse_too_short(span, rates.step_seconds, teaching)
    steps = steps_within(recipe, most, rates.step_seconds)
    weights = search_weights(model, teaching, recipe, rates.taken, shared, lambda one: reading(task, one), steps)
    if weights is not None:
        recipe = recipe.weighed(weights.taken)
    done = train(model, teaching, recipe, span, rates.taken, shared, checkpoint)
    after = before if done.failure else evaluate_task(task, done.model, names=before)
    better = not done.failure and is_better(task, after, before)
    found = [f"learning rate {rates}", *([f"weights: {weights}"] if weights is not None else [])]
    notes = (
        *done.notes,
        *found,
        *(unkept(model, done.model) if better else []),
        *([done.failure] if done.failure else []),
    )
    return Recovered(
        done.model if better else model, better, before, after if better else before, rates.taken, done.steps, done.seconds,
        recipe.name, done.curve, tuple(frozen(model)), notes,
    )  # fmt: skip


def in_evaluation_mode(model: nn.Module) -> nn.Module:
    """The model, or a copy where it is to be trained: that is what it would be judged in, and handed back in."""
    return copy.deepcopy(model).eval() if any(module.training for module in model.modules()) else model


def unkept(model: nn.Module, trained: nn.Module) -> list[str]:
    """What training did not keep of the model that it was given: parameters that were fixed, weights that were 0."""
    parameters = list(model.parameters())
    fixed = sum(not parameter.requires_grad for parameter in parameters)
    zeros, left = (sum(int((p == 0).sum()) for p in of.parameters() if p.dim() > 1) for of in (model, trained))
    found = []
    if 0 < fixed < len(parameters):
        found.append(
            f"{fixed} of {len(parameters)} parameters were fixed (requires_grad=False) in the model given; they are trained like all others"
        )
    if zeros > MANY_ZEROS * sum(p.numel() for p in parameters if p.dim() > 1) and left < KEPT_ZEROS * zeros:
        found.append(
            f"{zeros} weights were 0 in the model given, {left} are: zeros are kept by recipes with masks alone"
        )
    return found


def reading(task: Task, model: nn.Module) -> tuple[float, float]:
    """The objective of a model on validation, turned so that higher is better, and its standard error (0: not known)."""
    metrics = evaluate_task(task, model)
    name = objective_of(task, metrics)
    return (1.0 if task.higher_is_better else -1.0) * metrics[name], metrics.errors().get(name, 0.0)


def is_better(task: Task, after: Mapping[str, float], before: Mapping[str, float]) -> bool:
    """Whether the objective is better, not only as good."""
    name = objective_of(task, before)
    return after[name] > before[name] if task.higher_is_better else after[name] < before[name]


def refuse_too_short(span: Span, step: float, teaching: Teaching) -> None:
    """UsageError where the span has time for less than a pass through the data, or for `LEAST_STEPS`; it says what that takes."""
    lessons = teaching.lessons
    wanted = min(LEAST_STEPS, lessons.each_pass or LEAST_STEPS)
    if span.steps is not None and span.steps < wanted:
        raise UsageError(f"{span.steps} steps are too few to learn anything: give {wanted} at least")
    if span.seconds is not None and span.seconds < wanted * step:
        raise UsageError(
            f"{span.seconds:.3g} s are too short: a step takes {step:.2g} s here, {wanted} of them {wanted * step:.2g} s; a pass through the "
            f"data {(lessons.each_pass or wanted) * step:.2g} s"
        )
