"""How much each thing a student learns from counts, where a recipe does not say: short trainings over a small grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from autocomp.recovery.lessons import Teaching
from autocomp.recovery.recipe import FOUND, Recipe
from autocomp.recovery.schedules import Span
from autocomp.recovery.train import train

# Of each short training, and where time is short. Chosen by hand, not measured.
STEPS, FEWEST = 40, 8


def steps_within(recipe: Recipe, seconds: float, step: float) -> int:
    """Steps for each set of weights, where all of them may take so many seconds and a step takes ``step``."""
    sets = math.prod(len(FOUND[name]) for name in recipe.left_open)
    return int(max(FEWEST, min(STEPS, seconds / sets / max(step, 1e-9))))


Reading = tuple[float, float]  # of the objective, higher being better, and its standard error


@dataclass(frozen=True)
class Weights:
    """The weights taken, by the recipe's names for them, and what each set of the grid came to on validation (None: it diverged)."""

    taken: Mapping[str, float]
    tried: tuple[tuple[Mapping[str, float], float | None], ...] = ()

    def __str__(self) -> str:
        said = ", ".join(f"{name} {value:g}" for name, value in self.taken.items())
        return f"{said} (of {len(self.tried)} sets)"


def search_weights(
    model: nn.Module,
    teaching: Teaching,
    recipe: Recipe,
    rate: float,
    shared: dict[str, Tensor | None] | None,
    read: Callable[[nn.Module], Reading],
    steps: int = STEPS,
) -> Weights | None:
    """Train a compressed model for some steps by each set of weights that the recipe leaves open; None where it leaves none open.

    ``read`` gives the objective of a trained model on validation. Of the sets within a standard error of the best the first is taken: it has
    the fewest things to learn from. The first of all is taken if every one diverged.
    """
    grid = {name: values for name, values in FOUND.items() if name in recipe.left_open}
    if "labels" in grid and teaching.loss is None:
        grid["labels"] = (0.0,)
    if not grid:
        return None
    recipe = recipe.on_chosen_channels()
    tried: list[tuple[Mapping[str, float], float | None]] = []
    errors: dict[int, float] = {}
    sets = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for weights in sorted(sets, key=lambda one: sum(value > 0 for value in one.values())):
        done = train(model, teaching, recipe.weighed(weights), Span(steps=steps), rate, shared)
        value = None
        if not done.failure:
            value, errors[len(tried)] = read(done.model)
        tried.append((weights, value))
    values = {index: value for index, (_, value) in enumerate(tried) if value is not None}
    if not values:
        return Weights(tried[0][0], tuple(tried))
    best = max(values, key=lambda index: values[index])
    taken = next(index for index, value in values.items() if value >= values[best] - errors[best])
    return Weights(tried[taken][0], tuple(tried))
