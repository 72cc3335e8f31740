"""Which candidates are trained, and which of them go on: by what they promise to add to what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from autocomp.front.goals import Judge
from autocomp.front.pareto import gains, promising
from autocomp.records.evaluation import Evaluation, untrained
from autocomp.study.useful import BEYOND, tolerated, useful_divergence

if TYPE_CHECKING:
    from autocomp.run.found import Found

# Chosen by hand. What a short training leaves of a divergence, and of a drop that is still there: on the built-in tasks between nothing and a
# third.
LEFT = 0.15
STILL = 0.5
WORTH = 0.02  # of the divergence up to which a front is of use: what has lost less has nothing to regain
LOST = 2.0  # nats: past it nothing of the model is left that training could start from


def relative(found: Found, evaluations: Sequence[Evaluation]) -> Mapping[int, float]:
    """Seconds over dense's by trial, the mean over the profiles: as measured where all were, and the run follows a clock; else as predicted.

    Times that were measured at different moments of a busy machine and predicted ones would be told apart by more than candidates are.
    """
    if found.prepared.settings.deterministic or any(not e.latency for e in evaluations):
        ratios = found.costs.relative([e.candidate for e in evaluations]).values()
        return {e.trial: float(np.mean([profile[k] for profile in ratios])) for k, e in enumerate(evaluations)}
    dense = found.dense().latency
    return {
        e.trial: float(np.mean([e.latency[name].seconds / its.seconds for name, its in dense.items()]))
        for e in evaluations
    }


def trainable(found: Found) -> list[Evaluation]:
    """Told candidates that have something to regain, and something left to start from."""
    told = [untrained(e) for e in found.told if e.kl is not None and e.state != "failed" and e.source != "dense"]
    useful = useful_divergence(found.measured(), found.judge())
    return [e for e in told if e.kl is not None and WORTH * useful < e.kl < LOST and e.predicted]


def entrants(found: Found, count: int) -> list[Evaluation]:
    """Told candidates that would add the most to the front if training left `LEFT` of their divergence, most promising first.

    With a goal on the objective those that are thought to miss it as they are: what meets it needs no training.
    """
    told, measured, judge = trainable(found), found.measured(), found.judge()
    useful = useful_divergence(measured, judge)
    if judge.objective in judge.max_drops:
        told = [e for e in told if (e.kl or 0.0) > useful / BEYOND] or told
    times = relative(found, [*told, *measured])
    points = np.array([(LEFT * (e.kl or 0.0), math.log(times[e.trial])) for e in told]).reshape(-1, 2)
    known = np.array([(e.kl or 0.0, math.log(times[e.trial])) for e in measured]).reshape(-1, 2)
    worth = np.flatnonzero(gains(points, known, (useful, 0.0)) > 0)
    return [told[worth[index]] for index in promising(points[worth], known, count, (useful, 0.0))]


def survivors(
    found: Found, judge: Judge, drops: Mapping[int, float], evaluations: Sequence[Evaluation], count: int, rounds: int
) -> list[Evaluation]:
    """Those of the trained candidates that go on: what they lost by now, of which ``rounds`` more of training leave `STILL` each."""
    kept = [e for e in evaluations if e.trial in drops and math.isfinite(drops[e.trial])]
    measured = [e for e in found.told if e.state == "measured" and e.metrics]
    times = relative(found, [*kept, *measured])
    expected = {e.trial: drops[e.trial] * STILL**rounds if drops[e.trial] > 0 else drops[e.trial] for e in kept}
    points = np.array([(expected[e.trial], math.log(times[e.trial])) for e in kept]).reshape(-1, 2)
    known = np.array([(judge.drop(e), math.log(times[e.trial])) for e in measured]).reshape(-1, 2)
    return [kept[index] for index in promising(points, known, count, (tolerated(judge), 0.0))]


def drafted(
    found: Found,
    expected: Mapping[int, float],
    evaluations: Sequence[Evaluation],
    drops: Mapping[int, float],
    count: int,
) -> list[Evaluation]:
    """More candidates to train, by what is ``expected`` of their loss after it: those that would add the most to what is measured, and to what
    the ones trained so far (``drops``, by trial) came to."""
    judge = found.judge()
    measured = [e for e in found.told if e.state == "measured" and e.metrics]
    trained = [e for e in found.told if e.trial in drops]
    times = relative(found, [*evaluations, *measured, *trained])
    points = np.array([(expected[e.trial], math.log(times[e.trial])) for e in evaluations]).reshape(-1, 2)
    pairs = [(judge.drop(e), math.log(times[e.trial])) for e in measured]
    pairs += [(drops[e.trial], math.log(times[e.trial])) for e in trained]
    known, corner = np.array(pairs).reshape(-1, 2), (tolerated(judge), 0.0)
    worth = np.flatnonzero(gains(points, known, corner) > 0)
    return [evaluations[worth[index]] for index in promising(points[worth], known, count, corner)]
