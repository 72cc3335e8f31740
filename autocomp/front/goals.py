"""Goals: which evaluations are good enough, and which of them is the one to take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from autocomp.config.quantities import (
    format_bytes,
    format_joules,
    format_milliseconds,
    parse_factor,
    parse_share,
    told_apart,
)
from autocomp.config.settings import Goals
from autocomp.errors import InfeasibleError, UsageError, shown, suggest
from autocomp.front.pareto import knee, pareto_set, settled
from autocomp.records.evaluation import Evaluation
from autocomp.records.run import Run, comparable, speedup


class Held(NamedTuple):
    """One limit and what an evaluation comes to: ``subject`` is a metric or a profile, empty for a size; ``slack`` is what rounding may add."""

    goal: Literal["max_drop", "max_latency", "max_energy", "max_size", "max_memory"]
    subject: str
    limit: float
    value: float
    slack: float = 0.0

    @property
    def met(self) -> bool:
        return self.value <= self.limit + self.slack

    @property
    def excess(self) -> float:
        """The share of the limit by which it is over; of a drop that may be none, the drop."""
        return (self.value - self.limit) / (self.limit or 1.0)

    def __str__(self) -> str:
        value, limit = told_apart(_WRITTEN[self.goal], self.value, self.limit, 4 if self.goal == "max_drop" else 3)
        if self.goal == "max_drop":
            return f"{self.subject} drops by {value}, more than max_drop {limit}"
        if self.goal in ("max_latency", "max_energy"):
            return f"{value} on {self.subject}, more than {self.goal} {limit}"
        where = f" of memory on {self.subject}" if self.goal == "max_memory" else ""
        return f"{value}{where}, more than {self.goal} {limit}"


_WRITTEN: dict[str, Callable[[float, int], str]] = {
    "max_drop": lambda value, digits: f"{value:.{digits}g}",
    "max_latency": format_milliseconds,
    "max_energy": format_joules,
    "max_size": format_bytes,
    "max_memory": format_bytes,
}


class Miss(NamedTuple):
    """A goal that an evaluation does not meet: in words, and the share of the limit by which it is over (infinite: never measured)."""

    text: str
    excess: float


@dataclass(frozen=True)
class Judge:
    """What evaluations are held against: the uncompressed model, the goals, and which metric decides.

    Goals that are stated against the uncompressed model are worked out from ``dense``.
    """

    dense: Evaluation
    goals: Goals
    objective: str
    higher_is_better: bool = True

    @classmethod
    def of(cls, run: Run, goals: Goals) -> Judge:
        """The judge of a run that has ended."""
        return cls(run.dense.evaluation, goals, run.task.objective, run.task.higher_is_better)

    @cached_property
    def max_drops(self) -> dict[str, float]:
        """What each metric may lose at most, in its own units."""
        return {
            metric: parse_share(limit) * abs(self.dense.metrics.get(metric, 0.0)) if isinstance(limit, str) else limit
            for metric, limit in self.goals.drops(self.objective).items()
        }

    @cached_property
    def max_size(self) -> float | None:
        limit = self.goals.max_size
        return self.dense.bytes / parse_factor(limit) if isinstance(limit, str) else limit

    def max_latency(self, profile: str) -> float | None:
        """The limit on a profile, in seconds as the uncompressed model was timed."""
        limit = self.goals.latency(profile)
        if isinstance(limit, str):
            there = self.dense.latency.get(profile)
            return there.seconds / parse_factor(limit) if there else None
        return limit

    def max_energy(self, profile: str) -> float | None:
        """The limit on a profile, in joules as the uncompressed model was timed; None where its energy is not known."""
        limit, there = self.goals.energy(profile), self.dense.latency.get(profile)
        if isinstance(limit, str):
            return there.energy / parse_factor(limit) if there and there.energy else None
        return limit

    def max_seconds(self, profile: str) -> float | None:
        """What both limits leave of time on a profile: energy follows it."""
        limits = (self.max_latency(profile), self.energy_seconds(profile))
        return min((limit for limit in limits if limit is not None), default=None)

    def energy_seconds(self, profile: str) -> float | None:
        """The seconds in which an inference takes as much energy as it may on a profile; None without a limit, or where that is not known."""
        there, energy = self.dense.latency.get(profile), self.max_energy(profile)
        return energy / there.watts if energy is not None and there and there.watts else None

    def max_memory(self, profile: str) -> float | None:
        """The limit on a profile, in bytes; None where there is none, or the uncompressed model's memory is not known."""
        limit, there = self.goals.max_memory, self.dense.latency.get(profile)
        if isinstance(limit, str):
            return there.memory / parse_factor(limit) if there and there.memory else None
        return limit

    def that_allow_nothing(self) -> list[str]:
        """The limits on drops that are shares of a metric of which the uncompressed model has nothing, each as it was stated."""
        return [
            f"max_drop {limit} of {metric}"
            for metric, limit in self.goals.drops(self.objective).items()
            if isinstance(limit, str) and parse_share(limit) > 0 and self.max_drops[metric] <= 0
        ]

    def met_by_dense(self) -> list[str]:
        """The goals on latency, energy, size and memory that the uncompressed model meets already: they steer nothing."""
        met = [
            f"max_latency ({format_milliseconds(latency.seconds)} on {profile})"
            for profile, latency in self.dense.latency.items()
            if (limit := self.max_latency(profile)) is not None and latency.seconds <= limit
        ]
        for profile, latency in self.dense.latency.items():
            if (most := self.max_energy(profile)) is not None and latency.energy and latency.energy <= most:
                met.append(f"max_energy ({format_joules(latency.energy)} on {profile})")
        if self.max_size is not None and self.dense.bytes <= self.max_size:
            met.append(f"max_size ({format_bytes(self.dense.bytes)})")
        for profile, latency in self.dense.latency.items():
            if (most := self.max_memory(profile)) is not None and latency.memory and latency.memory <= most:
                met.append(f"max_memory ({format_bytes(latency.memory)} on {profile})")
        return met

    def drop(self, evaluation: Evaluation, metric: str | None = None) -> float:
        """How much worse than dense a metric (the objective) is, in its own units; negative: better, infinite: not read."""
        metric = metric or self.objective
        if metric not in evaluation.metrics or metric not in self.dense.metrics:
            return float("inf")
        loss = settled(self.dense.metrics[metric]) - settled(evaluation.metrics[metric])
        return loss if self.higher_is_better else -loss

    def slowest(self, evaluation: Evaluation) -> float:
        """Seconds on the slowest of its measured profiles, as dense was timed; infinite where nothing was measured."""
        return max((comparable(evaluation, self.dense, p) for p in evaluation.latency), default=float("inf"))

    def joules(self, evaluation: Evaluation, profile: str) -> float | None:
        """What an inference takes on a profile: counted, or estimated from its time, as dense was timed; None where neither is known."""
        latency = evaluation.latency[profile]
        if latency.joules is not None or latency.watts is None:
            return latency.joules
        return latency.watts * comparable(evaluation, self.dense, profile)

    def held(self, evaluation: Evaluation) -> list[Held]:
        """Each limit beside what an evaluation comes to; of latencies those of the profiles that were measured."""
        found = [
            Held("max_drop", metric, limit, self.drop(evaluation, metric), self._rounding(metric, limit))
            for metric, limit in self.max_drops.items()
        ]
        for profile in evaluation.latency:
            if (most := self.max_latency(profile)) is not None:
                seconds = comparable(evaluation, self.dense, profile)
                found.append(Held("max_latency", profile, most, seconds, most * 1e-9))
        for profile in evaluation.latency:
            joules = self.joules(evaluation, profile)
            if (most := self.max_energy(profile)) is not None and joules is not None:
                found.append(Held("max_energy", profile, most, joules, most * 1e-9))
        if self.max_size is not None:
            found.append(Held("max_size", "", self.max_size, evaluation.bytes))
        for profile, latency in evaluation.latency.items():
            if (most := self.max_memory(profile)) is not None and latency.memory is not None:
                found.append(Held("max_memory", profile, most, latency.memory))
        return found

    def _rounding(self, metric: str, limit: float) -> float:
        """What a drop may be off by, in the last digits of what is subtracted: 0.98 - 0.97 is a little more than 0.01 in binary."""
        return 1e-12 * max(abs(self.dense.metrics.get(metric, 0.0)), abs(limit))

    def misses(self, evaluation: Evaluation) -> list[Miss]:
        """The goals an evaluation misses; none if it is feasible. What was never measured is a miss."""
        found = []
        if evaluation.state == "failed":
            found.append(Miss(f"it failed: {evaluation.failure or 'no reason recorded'}", float("inf")))
        found += [Miss(str(held), held.excess) for held in self.held(evaluation) if not held.met]
        if self.goals.max_latency is not None and not evaluation.latency:
            found.append(Miss("its latency was not measured", float("inf")))
        for profile in dict.fromkeys([*self.dense.latency, *evaluation.latency]):
            latency = evaluation.latency.get(profile)
            if self.goals.energy(profile) is not None and (latency is None or latency.energy is None):
                found.append(Miss(f"its energy on {profile} is not known: the profile states no power", float("inf")))
            if self.goals.max_memory is not None and (latency is None or latency.memory is None):
                found.append(Miss(f"its memory on {profile} is not known", float("inf")))
        return found

    def violations(self, evaluation: Evaluation) -> list[str]:
        """Say which goals an evaluation misses and by what; empty if it is feasible."""
        return [miss.text for miss in self.misses(evaluation)]

    def feasible(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation meets every goal."""
        return not self.misses(evaluation)

    def lost(self, before: Evaluation, after: Evaluation) -> list[str]:
        """The goals that a candidate met before something was done to it and misses after."""
        return self.violations(after) if self.feasible(before) else []

    def best(self, evaluations: Sequence[Evaluation]) -> Evaluation:
        """The evaluation to take: what is not limited is optimised.

        With a limit on the drop the fastest feasible one; with a limit on latency (or bytes) alone the most accurate; with
        none the knee of drop against latency, within the standard errors of drops. Ties go to the smaller model. One whose latency is noisy is
        taken only where all are.
        InfeasibleError names what the nearest one misses.
        """
        met = undisturbed([e for e in evaluations if self.feasible(e)])
        if not met:
            raise InfeasibleError(self.nearest(evaluations))
        losses = {e.trial: self.drop(e) for e in met}
        if self.goals.max_drop is not None:
            return min(met, key=lambda e: (self.slowest(e), losses[e.trial], e.bytes))
        if self.goals.any:
            return min(met, key=lambda e: (losses[e.trial], self.slowest(e), e.bytes))
        errors = [e.drop_errors.get(self.objective, 0.0) for e in met]
        at = knee([(losses[e.trial], self.slowest(e)) for e in met], errors)
        return met[at] if at is not None else min(met, key=lambda e: (losses[e.trial], e.bytes))

    def member(self, evaluations: Sequence[Evaluation], profile: str, factor: float) -> Evaluation | None:
        """The most accurate feasible evaluation that is ``factor`` times faster than dense on a profile; None if there is none."""
        fast = [
            e
            for e in evaluations
            if profile in e.latency and speedup(e, self.dense, profile) >= factor and self.feasible(e)
        ]
        return min(undisturbed(fast), key=lambda e: (self.drop(e), self.slowest(e), e.bytes), default=None)

    def nearest(self, evaluations: Sequence[Evaluation]) -> str:
        """What the evaluation nearest to the goals misses, and what to do."""
        advice = "relax the goals, allow more trials or measurements, or widen the search space"
        usable = [e for e in evaluations if e.state != "failed"]
        if not usable:
            return f"no candidate was measured, so none meets the goals; {advice}"

        def excess(e: Evaluation) -> tuple[int, float]:
            missed = self.misses(e)
            return len(missed), sum(miss.excess for miss in missed)

        near = min(usable, key=excess)
        who = f"the nearest, trial {near.trial}"
        return f"none of {len(evaluations)} candidates meets the goals; {who}: {'; '.join(self.violations(near))}. To do: {advice}"


def check_drops(goals: Goals, objective: str, metrics: Collection[str], whose: str) -> None:
    """UsageError if a limit on a drop is of none of these metrics, or of one of which nobody says which way is better."""
    for name in goals.drops(objective):
        if name not in metrics:
            raise UsageError(f"max_drop names {shown(name)}, but {whose} {', '.join(metrics)}.{suggest(name, metrics)}")
        if name != objective and not name.startswith(f"{objective}/"):
            raise UsageError(
                f"max_drop names {shown(name)}, of which nobody says whether higher is better: name the objective {shown(objective)} "
                f"or a slice of it ('{objective}/…')"
            )


def family(
    judge: Judge, evaluations: Sequence[Evaluation], factors: Sequence[float], profiles: Sequence[str]
) -> dict[str, Evaluation | None]:
    """The member of each speed-up on each profile, by name: ``2x``, or ``2x on cortex-a76`` where there are several profiles."""
    several = len(profiles) > 1
    return {
        f"{factor:g}x on {profile}" if several else f"{factor:g}x": judge.member(evaluations, profile, factor)
        for factor in factors
        for profile in profiles
    }


def undisturbed(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those whose latencies were measured without noise; all of them where none was."""
    return [e for e in evaluations if not e.noisy] or list(evaluations)


def delivered(
    measured: Sequence[Evaluation], judge: Judge, factors: Sequence[float], profiles: Sequence[str]
) -> list[Evaluation]:
    """What a run hands over: the front, and what the goals ask for that is not on it.

    A front knows the objective and latencies alone; a goal on size, on a slice or on several targets may be met by a dominated one only.
    """
    front = choose_front(measured, judge.objective, judge.higher_is_better)
    wanted = [member for member in family(judge, measured, factors, profiles).values() if member is not None]
    if judge.goals.any and any(judge.feasible(e) for e in measured):
        wanted.append(judge.best(measured))
    known = {e.trial for e in front}
    for evaluation in wanted:
        if evaluation.trial not in known:
            known.add(evaluation.trial)
            front.append(evaluation)
    return sorted(front, key=lambda e: next(iter(e.latency.values())).seconds)


def choose_front(measured: Sequence[Evaluation], objective: str, higher_is_better: bool) -> list[Evaluation]:
    """Measured evaluations that no other dominates in (objective, latency) on at least one profile, fast to slow."""
    sign = -1.0 if higher_is_better else 1.0
    chosen: dict[int, Evaluation] = {}
    profiles = list(measured[0].latency) if measured else []
    for profile in profiles:
        points = np.array([(sign * settled(e.metrics[objective]), e.latency[profile].seconds) for e in measured])
        for index in pareto_set(points):
            chosen[measured[index].trial] = measured[index]
    return sorted(chosen.values(), key=lambda e: e.latency[profiles[0]].seconds)
