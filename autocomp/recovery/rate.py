"""Which learning rate a compressed model bears: short trainings at rates over a range, from the same weights on the same batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from autocomp.recovery.lessons import Teaching
from autocomp.recovery.recipe import Recipe
from autocomp.recovery.schedules import Span
from autocomp.recovery.train import losses

STEPS = 12  # of each short training
FEWEST = 4  # of it, where time is short
LOOK = 2  # steps that say how long one takes
SEARCHING = 0.15  # of the seconds of a training, for this search. These four chosen by hand, not measured
ALIKE = 0.02  # of the least loss: what noise alone tells apart
FINER = math.sqrt(10.0)  # between the best rate of the first look and those beside it


@dataclass(frozen=True)
class Rates:
    """The rate taken, the mean loss at the end of each short training (infinite where it diverged), and the seconds of a step."""

    taken: float
    tried: dict[float, float]
    step_seconds: float = 0.0

    def __str__(self) -> str:
        if not self.tried:
            return f"{self.taken:.1e}, the middle of the range: there was no time to try others"
        if len(self.tried) == 1:
            return f"{self.taken:.1e}, as stated"
        return f"{self.taken:.1e} (of {len(self.tried)} from {min(self.tried):.0e} to {max(self.tried):.0e})"


def search_rate(model: nn.Module, teaching: Teaching, recipe: Recipe, seconds: float = math.inf) -> Rates:
    """Return the rate of the least loss after `STEPS` steps: one in each decade of the recipe's range, then those beside the best.

    Within about so many ``seconds`` fewer steps are taken and those beside left out; where they do for no more than a look, the middle of the
    range is taken. Where the recipe states a rate, that one, and nothing is tried. After the range test of Smith (2017, arXiv:1506.01186),
    with a training for each rate in the place of one that goes through all: what it finds does not depend on the rates before.
    """
    if recipe.learning_rate is not None:
        return Rates(recipe.learning_rate, {recipe.learning_rate: 0.0})
    low, high = recipe.learning_rates
    count = max(2, round(math.log10(high / low)) + 1)
    tried = [low * (high / low) ** (k / (count - 1)) for k in range(count)]
    begun = time.monotonic()
    losses(model, teaching, recipe, Span(steps=LOOK), low)
    step = (time.monotonic() - begun) / LOOK
    each = int(min(STEPS, (seconds - step * LOOK) / (count + 2) / max(step, 1e-9)))  # steps for each rate
    if each < FEWEST and count * FEWEST * step > seconds:
        return Rates(math.sqrt(low * high), {}, step)
    steps, spent, beside = max(FEWEST, each), 0, each >= FEWEST
    begun = time.monotonic()

    def loss(rate: float) -> float:
        nonlocal spent
        found = losses(model, teaching, recipe, Span(steps=steps), rate)
        spent += max(1, len(found))
        last = found[-max(1, steps // 4) :]
        return sum(last) / len(last) if len(found) == steps else math.inf

    taken = lowest(loss, tried, high, beside)
    return replace(taken, step_seconds=(time.monotonic() - begun) / spent)


def lowest(loss: Callable[[float], float], rates: list[float], high: float, finer: bool = True) -> Rates:
    """The rate of the least loss among some and (``finer``) those between the best and its neighbours; of those alike the highest, since so
    few steps favour low ones; the lowest one if all diverge."""
    tried = {rate: loss(rate) for rate in rates}
    best = min(tried, key=lambda rate: tried[rate])
    for beside in (best / FINER, best * FINER) if finer else ():
        if rates[0] < beside <= high:
            tried[beside] = loss(beside)
    least = min(tried.values())
    best = max(rate for rate, found in tried.items() if found <= least + ALIKE * abs(least))
    return Rates(best if math.isfinite(tried[best]) else rates[0], dict(sorted(tried.items())))
