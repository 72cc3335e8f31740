"""What a search aims at, where goals are set: which told candidates are worth measuring, for the goals and each member of a family.

Whether a candidate will meet a limit is not known before it is measured. What was measured tells how surely: what metrics lost for each nat
of divergence, and how far predicted seconds were off. A candidate is worth the chance that it meets the limits times what it would gain then
[constrained expected improvement: Gardner et al. 2014], so measurements go where the best feasible point is still uncertain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import erf, sqrt

import numpy as np

from autocomp.front.goals import Judge
from autocomp.front.pareto import Floats
from autocomp.records.evaluation import Evaluation
from autocomp.study.useful import loss_rates

WIDTH = 0.7  # in log divergence: measured candidates nearer than that say most of what one will lose. Chosen by hand, not measured
LEAST_ERROR = 0.03  # of predicted seconds, however well they fit
EARLY = 1.0  # how many measured candidates the rate of all of them is worth
SPREAD = 0.7  # of that rate, in its log. Chosen by hand, not measured
NEAR = 0.15  # in log seconds and log divergence: two so alike tell little more than one. Chosen by hand, not measured


@dataclass(frozen=True)
class Aim:
    """A point that is looked for: the fastest within the goals, or, with ``factor``, the most accurate that is so many times faster."""

    profile: str
    factor: float | None = None


@dataclass(frozen=True)
class Known:
    """What is known of candidates: divergence, bytes, and log seconds over dense's by profile; arrays of one length."""

    divergence: Floats
    bytes: Floats
    seconds: Mapping[str, Floats]

    @classmethod
    def of(cls, evaluations: Sequence[Evaluation], relative: Mapping[str, Sequence[float]]) -> Known:
        return cls(
            np.array([e.kl for e in evaluations], dtype=np.float64),
            np.array([e.bytes for e in evaluations], dtype=np.float64),
            {profile: np.log(np.asarray(values, dtype=np.float64)) for profile, values in relative.items()},
        )


def aims(judge: Judge, profiles: Sequence[str], family: Sequence[float]) -> list[Aim]:
    """The aims of a search: none where there is neither a goal nor a family."""
    goals = [Aim(profile) for profile in profiles] if judge.goals.any else []
    return goals + [Aim(profile, factor) for factor in family for profile in profiles]


def worth(
    aim: Aim,
    judge: Judge,
    waiting: Known,
    measured: Sequence[Evaluation],
    known: Known,
    predicted: Mapping[str, Floats],
) -> Floats:
    """What measuring each waiting candidate is worth to an aim, ``[n]``; 0 where it can gain nothing.

    ``known`` holds the measured seconds of ``measured``, ``predicted`` what was predicted of them, both in logs over dense's.
    """
    chance = _within_drops(judge, waiting.divergence, measured, known.divergence)
    if judge.max_size is not None:
        chance = chance * (waiting.bytes <= judge.max_size)
    limits = {profile: judge.max_seconds(profile) for profile in waiting.seconds}
    bounds = {p: float(np.log(most / judge.dense.latency[p].seconds)) for p, most in limits.items() if most is not None}
    if aim.factor is not None:
        bounds[aim.profile] = min(bounds.get(aim.profile, 0.0), -float(np.log(aim.factor)))
    for profile, bound in bounds.items():
        chance = chance * _below(bound, waiting.seconds[profile], known.seconds[profile] - predicted[profile])
    feasible = np.array([judge.feasible(e) for e in measured], dtype=bool)
    for profile, bound in bounds.items():
        feasible &= known.seconds[profile] <= bound + 1e-9
    if aim.factor is None and judge.goals.max_drop is not None:  # the fastest
        best = float(known.seconds[aim.profile][feasible].min(initial=0.0))
        gain = best - waiting.seconds[aim.profile]
    else:  # the most accurate
        best = float(known.divergence[feasible].min(initial=np.inf))
        floor = 1e-6
        reach = np.log(max(float(np.nanmax(waiting.divergence)), floor)) if np.isinf(best) else np.log(best + floor)
        gain = reach - np.log(waiting.divergence + floor)
    result: Floats = chance * np.maximum(gain, 0.0)
    return result


def choose(worths: Sequence[Floats], waiting: Known, count: int) -> list[int]:
    """Choose ``count`` candidates, each aim in turn; one near a chosen one is worth less. Fewer if none is of worth."""
    chosen: list[int] = []
    place = np.stack([np.log(waiting.divergence + 1e-6), *waiting.seconds.values()], axis=1)
    left = [np.array(worth, dtype=np.float64) for worth in worths]
    turn = 0
    while len(chosen) < count and any(values.max(initial=0.0) > 0 for values in left):
        values = left[turn % len(left)]
        turn += 1
        if values.max(initial=0.0) <= 0:
            continue
        best = int(values.argmax())
        chosen.append(best)
        apart = np.abs(place - place[best]).max(axis=1)
        for other in left:
            other *= np.minimum(apart / NEAR, 1.0)
            other[best] = 0.0
    return chosen


def thought_misses(evaluation: Evaluation, judge: Judge, measured: Sequence[Evaluation]) -> dict[str, float]:
    """By how much, as a share of each limit, a told evaluation is thought to miss the goals; 0 or less where it meets one.

    Seconds are the predicted ones; what a metric loses follows from the divergence, at the median rate of what was measured.
    """
    found: dict[str, float] = {}
    for profile, seconds in evaluation.predicted.items():
        dense, there = judge.dense.predicted.get(profile), judge.dense.latency.get(profile)
        if not dense or there is None:
            continue
        if (limit := judge.max_latency(profile)) is not None:
            found[f"max_latency {profile}"] = seconds / dense * there.seconds / limit - 1
        if (limit := judge.max_energy(profile)) is not None and there.energy:
            found[f"max_energy {profile}"] = seconds / dense * there.energy / limit - 1
    if judge.max_size is not None:
        found["max_size"] = evaluation.bytes / judge.max_size - 1
    for metric, allowed in judge.max_drops.items():
        if (rates := loss_rates(measured, judge, metric)) and evaluation.kl is not None:
            found[f"max_drop {metric}"] = float(np.median(rates)) * evaluation.kl / max(allowed, 1e-12) - 1
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _within_drops(judge: Judge, divergence: Floats, measured: Sequence[Evaluation], known: Floats) -> Floats:
    """The chance that each candidate loses no more of any metric than it may, by what measured ones of like divergence lost."""
    chance = np.ones(len(divergence))
    use = known > 0
    distance = np.log(divergence[:, None] + 1e-9) - np.log(known[use][None] + 1e-9)
    weight = np.exp(-0.5 * (distance / WIDTH) ** 2)
    for metric, limit in judge.max_drops.items():
        lost = np.array([judge.drop(e, metric) for e in measured])[use]
        rate = np.where(np.isfinite(lost), lost / known[use], np.inf)
        met = rate[None] * divergence[:, None] <= limit + 1e-12
        usual = float(np.median(rate)) if len(rate) else 0.0
        room = np.log((limit + 1e-12) / (max(usual, 1e-12) * divergence + 1e-12))
        chance *= (EARLY * _normal(room / SPREAD) + (weight * met).sum(axis=1)) / (EARLY + weight.sum(axis=1))
    return chance


def _below(bound: float, predicted: Floats, residuals: Floats) -> Floats:
    """The chance that log seconds come out at most at ``bound``, the prediction's error being as it was for the measured ones."""
    sigma = max(LEAST_ERROR, float(np.sqrt(np.mean(residuals**2))) if len(residuals) else 0.0)
    return _normal((bound - predicted) / sigma)


def _normal(values: Floats) -> Floats:
    """The normal distribution's share below each value."""
    return np.array([0.5 * (1 + erf(value / sqrt(2))) for value in values])
