"""Goals: which evaluations are good enough, and which of them is the one to take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from autocomp.config.quantities import format_bytes, format_milliseconds
from autocomp.errors import InfeasibleError
from autocomp.front.pareto import knee, pareto_set
from autocomp.records.evaluation import Evaluation

if TYPE_CHECKING:
    from collections.abc import Sequence


class Limits(Protocol):
    """The limits of ``autocomp.config.settings.Goals``: metric units, seconds, bytes; None: no limit."""

    @property
    def max_drop(self) -> float | None: ...
    @property
    def max_latency(self) -> float | None: ...
    @property
    def max_bytes(self) -> int | None: ...


def drop(evaluation: Evaluation, dense: Evaluation, objective: str, higher_is_better: bool = True) -> float:
    """How much worse than dense the objective is, in its own units (negative: better); infinite if it was not read."""
    if objective not in evaluation.metrics or objective not in dense.metrics:
        return float("inf")
    loss = dense.metrics[objective] - evaluation.metrics[objective]
    return loss if higher_is_better else -loss


def slowest(evaluation: Evaluation) -> float:
    """Seconds on the slowest of its measured profiles; infinite where nothing was measured."""
    seconds = [latency.seconds for latency in evaluation.latency.values()]
    return max(seconds) if seconds else float("inf")


def violations(
    evaluation: Evaluation, dense: Evaluation, goals: Limits, objective: str, higher_is_better: bool = True
) -> list[str]:
    """Say which goals an evaluation misses and by what; empty if it is feasible. What was never measured is a miss."""
    found = []
    if evaluation.state == "failed":
        found.append(f"it failed: {evaluation.failure or 'no reason recorded'}")
    if goals.max_drop is not None:
        loss = drop(evaluation, dense, objective, higher_is_better)
        if loss > goals.max_drop + 1e-12:  # 0.98 - 0.97 is a little more than 0.01 in binary
            found.append(f"{objective} drops by {loss:.4g}, more than max_drop {goals.max_drop:.4g}")
    if goals.max_latency is not None:
        for profile, latency in evaluation.latency.items():
            if latency.seconds > goals.max_latency:
                limit = format_milliseconds(goals.max_latency)
                found.append(f"{format_milliseconds(latency.seconds)} on {profile}, more than max_latency {limit}")
        if not evaluation.latency:
            found.append("its latency was not measured")
    if goals.max_bytes is not None and evaluation.bytes > goals.max_bytes:
        found.append(f"{format_bytes(evaluation.bytes)}, more than max_bytes {format_bytes(goals.max_bytes)}")
    return found


def feasible(
    evaluation: Evaluation, dense: Evaluation, goals: Limits, objective: str, higher_is_better: bool = True
) -> bool:
    """Whether an evaluation meets every goal."""
    return not violations(evaluation, dense, goals, objective, higher_is_better)


def undisturbed(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those whose latencies were measured without noise; all of them where none was."""
    return [e for e in evaluations if not e.noisy] or list(evaluations)


def best(
    evaluations: Sequence[Evaluation], dense: Evaluation, goals: Limits, objective: str, higher_is_better: bool = True
) -> Evaluation:
    """The evaluation to take: what is not limited is optimised.

    With a limit on the drop the fastest feasible one; with a limit on latency (or bytes) alone the most accurate; with
    none the knee of drop against latency. Ties go to the smaller model. One whose latency is noisy is taken only where all are.
    InfeasibleError names what the nearest one misses.
    """
    met = undisturbed([e for e in evaluations if feasible(e, dense, goals, objective, higher_is_better)])
    if not met:
        raise InfeasibleError(_nearest(evaluations, dense, goals, objective, higher_is_better))
    losses = {e.trial: drop(e, dense, objective, higher_is_better) for e in met}
    if goals.max_drop is not None:
        return min(met, key=lambda e: (slowest(e), losses[e.trial], e.bytes))
    if goals.max_latency is not None or goals.max_bytes is not None:
        return min(met, key=lambda e: (losses[e.trial], slowest(e), e.bytes))
    at = knee([(losses[e.trial], slowest(e)) for e in met])
    return met[at] if at is not None else min(met, key=lambda e: (losses[e.trial], e.bytes))


def _nearest(
    evaluations: Sequence[Evaluation], dense: Evaluation, goals: Limits, objective: str, higher_is_better: bool
) -> str:
    advice = "relax the goals, allow more trials or measurements, or widen the search space"
    usable = [e for e in evaluations if e.state != "failed"]
    if not usable:
        return f"no candidate was measured, so none meets the goals; {advice}"

    def excess(e: Evaluation) -> tuple[int, float]:
        misses = violations(e, dense, goals, objective, higher_is_better)
        over = (
            max(0.0, drop(e, dense, objective, higher_is_better) - goals.max_drop)
            if goals.max_drop is not None
            else 0.0
        )
        if goals.max_latency is not None:
            over += max(0.0, slowest(e) / goals.max_latency - 1)
        if goals.max_bytes is not None:
            over += max(0.0, e.bytes / goals.max_bytes - 1)
        return len(misses), over

    near = min(usable, key=excess)
    missed = "; ".join(violations(near, dense, goals, objective, higher_is_better))
    who = f"the nearest, trial {near.trial}"
    return f"none of {len(evaluations)} candidates meets the goals; {who}: {missed}. To do: {advice}"


def choose_front(measured: Sequence[Evaluation], objective: str, higher_is_better: bool) -> list[Evaluation]:
    """Measured evaluations that no other dominates in (objective, latency) on at least one profile, fast to slow."""
    sign = -1.0 if higher_is_better else 1.0
    chosen: dict[int, Evaluation] = {}
    profiles = list(measured[0].latency) if measured else []
    for profile in profiles:
        points = np.array([(sign * e.metrics[objective], e.latency[profile].seconds) for e in measured])
        for index in pareto_set(points):
            chosen[measured[index].trial] = measured[index]
    return sorted(chosen.values(), key=lambda e: e.latency[profiles[0]].seconds)
