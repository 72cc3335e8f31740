"""How far from the uncompressed model a candidate is still of use: the divergence at which too much of the metric is lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocomp.front.goals import Judge
from autocomp.records.evaluation import Evaluation

# Nats a sample, where nothing measured says more: past it a front holds what nobody would take. Every divergence is about 1 where nothing is
# left of what the model knew, so this is about a quarter of it. Chosen by hand; the search of easyocr's reader, where it was the only limit,
# measured 20 candidates and none within a point of the metric (commit 8c85374), which is why it is the last resort.
UNKNOWN = 0.25
# The others are chosen by hand, not measured.
MOST = 1.0  # nats: about where nothing is left of what the model knew, however slowly the metric falls before
LEAST = 1e-3  # nats: what an objective that is perfect, or nearly so, leaves to be looked at
BEYOND = 1.5  # times the drop that a goal allows: the front is wanted on both sides of it
# without a goal: the shares of the metric, or of an error, that a candidate may lose and still be looked at first
METRIC, ERROR = 0.05, 0.5


def useful_divergence(measured: Sequence[Evaluation], judge: Judge) -> float:
    """The divergence at which the objective is thought to have dropped by as much as anyone would accept; in nats a sample.

    The drop is taken to be proportional to the divergence, which small ones are; the rate is the median of what
    was measured. `UNKNOWN` where nothing measured lost anything.
    """
    most = tolerated(judge)
    rate = float(np.median(rates)) if (rates := loss_rates(measured, judge, judge.objective)) else 0.0
    return min(MOST, max(LEAST, most / rate)) if rate > 0 and most > 0 else UNKNOWN


def of_use(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that still know something of what the model knew: not farther from it than `MOST`, or all where none is so near.

    Measuring another would put what answers by chance on the front, as the fastest of all.
    """
    known = [e for e in evaluations if e.kl is not None and np.isfinite(e.kl)]
    return [e for e in known if e.kl is not None and e.kl <= MOST] or known


def tolerated(judge: Judge) -> float:
    """The drop of the objective, in its units, up to which a front is of use."""
    allowed = judge.max_drops.get(judge.objective)
    if allowed is not None:
        return BEYOND * allowed
    return (METRIC if judge.higher_is_better else ERROR) * abs(judge.dense.metrics[judge.objective])


def loss_rates(measured: Sequence[Evaluation], judge: Judge, metric: str) -> list[float]:
    """What a metric lost, in its units, for each nat that the measured candidates diverge."""
    pairs = [(e.kl, judge.drop(e, metric)) for e in measured if e.kl]
    return [lost / divergence for divergence, lost in pairs if np.isfinite(lost)]
