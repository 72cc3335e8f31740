"""What to try next: changes of the front's points, screened by a model fitted to what was told.

A change is cheap to think of, and most are bad in ways that the told trials already show. Simulated on made-up additive
problems with interactions (12 to 24 layers, 3 to 6 problems each, 300 trials of which about 40 solver seeds), the screened
changes gained over the seeds 1.3 to 4 times the hypervolume that multivariate TPE did. Unscreened changes were near TPE;
NSGA-II (2 problems) gained next to nothing. One proposal in ten of TPE among them, as it was at first, gained nothing at 34 parameters
(digits, 200 trials, three seeds: .9450 with and without) and lost at 100 (the saved tables of ViT-Ti: .473 with, .490 without).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from autocomp.front.pareto import Floats, pareto_set

Levels = npt.NDArray[np.int64]
Estimate = Callable[[Levels], Floats]

# Both from the simulation described above, when this was written (commit fb42d90); its program and its figures were not kept.
MUTANTS = 128  # 400 gave .001 more hypervolume over 5 simulated problems, for more time
RIDGE = 3.0  # 1 to 10: hypervolume within .0015 over 5 simulated problems


# Points of a space that is walked through whole, so that none is missed; and rows drawn at random in a larger one before it counts as
# exhausted. Both chosen by hand, not measured.
SMALL, DRAWN = 20_000, 1000


def walk(sizes: Levels, rng: np.random.Generator) -> Iterator[Sequence[int] | Levels]:
    """Every row of levels of a small space, some at random of a larger one: for when nothing better comes to mind."""
    if np.prod(sizes, dtype=np.float64) <= SMALL:
        return itertools.product(*map(range, sizes.tolist()))
    return (rng.integers(sizes) for _ in range(DRAWN))


def propose(
    levels: Levels,
    values: Floats,
    sizes: Levels,
    rng: np.random.Generator,
    estimate: Estimate | None,
) -> Levels:
    """Rows of new levels ``[MUTANTS, columns]``, the most promising first.

    ``levels`` and ``values`` (error, seconds) are what was told; ``estimate`` gives additive (error, seconds) of rows.
    Mutations and crossovers of the front are ordered by what each would add to the dominated area if the fitted model
    were true: of log error, ridge regression over one-hot levels plus the log of the estimate; of seconds, a line
    through the estimate.
    """
    front = pareto_set(values)  # fast to slow
    mutants = _mutants(levels[front], sizes, rng, MUTANTS)
    told, new = _one_hot(levels, sizes), _one_hot(mutants, sizes)
    floor = max(1e-3 * float(np.median(values[:, 0])), 1e-12)
    log_error = np.log(np.maximum(values[:, 0], 0) + floor)
    if estimate is None:
        predicted = _ridge(told, log_error, new)
        seconds = _ridge(told, values[:, 1], new, strength=0.05)
    else:
        known, thought = estimate(levels), estimate(mutants)
        predicted = _ridge(*_with_log(told, log_error, new, known[:, 0], thought[:, 0]))
        slope, base = np.polyfit(known[:, 1], values[:, 1], 1) if np.ptp(known[:, 1]) > 0 else (1.0, 0.0)
        seconds = slope * thought[:, 1] + base
    gain = _gain(np.log(values[front, 0] + floor), values[front, 1], predicted, seconds)
    return mutants[np.argsort(-gain, kind="stable")]


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna from telling users of a new study, or that multivariate sampling is experimental."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _mutants(front: Levels, sizes: Levels, rng: np.random.Generator, count: int) -> Levels:
    """Points of the front, half of them crossed with a near point of it, each changed in at least one column.

    How near, how often and how much: chosen by hand; the simulation above compared the whole with TPE, not these numbers with others.
    """
    shape = (count, front.shape[1])
    at = rng.integers(len(front), size=count)
    mate = np.clip(at + rng.integers(-3, 4, size=count), 0, len(front) - 1)
    crossed = (rng.random((count, 1)) < 0.5) & (rng.random(shape) < 0.5)
    start = np.where(crossed, front[mate], front[at])
    changed = rng.random(shape) < rng.choice([1, 2, 4], size=(count, 1)) / shape[1]
    changed[np.arange(count), rng.integers(shape[1], size=count)] = True
    step = np.clip(start + rng.choice([-1, 1], size=shape), 0, sizes - 1)
    anything = rng.integers(sizes, size=shape)
    return np.where(changed, np.where(rng.random(shape) < 0.5, step, anything), start).astype(np.int64)


def _one_hot(levels: Levels, sizes: Levels) -> Floats:
    """A column for every level but the first, and one of ones."""
    firsts = np.cumsum([1, *(sizes - 1)])
    found = np.zeros((len(levels), int(firsts[-1])))
    found[:, 0] = 1.0
    rows, columns = np.nonzero(levels)
    found[rows, firsts[columns] + levels[rows, columns] - 1] = 1.0
    return found


def _with_log(
    told: Floats, target: Floats, new: Floats, known: Floats, thought: Floats
) -> tuple[Floats, Floats, Floats]:
    """Append the log of the estimate to the features; what is far below the rest (dense: 0) is held near it."""
    floor = max(1e-3 * float(np.median(known)), 1e-30)
    log_known, log_thought = np.log(known + floor), np.log(thought + floor)
    low = np.sort(log_known)[len(log_known) // 20] - 2
    # Scaled up, so that the penalty hardly touches this one feature.
    known_column, thought_column = (30 * np.maximum(x, low)[:, None] for x in (log_known, log_thought))
    return np.concatenate([told, known_column], axis=1), target, np.concatenate([new, thought_column], axis=1)


def _ridge(told: Floats, target: Floats, new: Floats, strength: float = RIDGE) -> Floats:
    """Predict ``new`` by ridge regression; the first column, of ones, goes unpenalised."""
    penalty = np.full(told.shape[1], strength)
    penalty[0] = 1e-6
    if len(told) < told.shape[1]:  # the same weights by as many equations as there are trials
        scaled = told / penalty
        weights = scaled.T @ np.linalg.solve(scaled @ told.T + np.eye(len(told)), target)
    else:
        weights = np.linalg.solve(told.T @ told + np.diag(penalty), told.T @ target)
    result: Floats = new @ weights
    return result


def _gain(front_error: Floats, front_seconds: Floats, error: Floats, seconds: Floats) -> Floats:
    """Area each (error, seconds) would add under the staircase of the front (fast to slow), up to its slowest point."""
    left, right = front_seconds[:-1], front_seconds[1:]
    width = np.maximum(right, seconds[:, None]) - np.maximum(left, seconds[:, None])
    result: Floats = (width * np.maximum(0.0, front_error[:-1] - error[:, None])).sum(axis=1)
    return result
