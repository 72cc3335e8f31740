"""What was asked of a run and what came of it: each goal beside the recommended point, each member of the family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from autocomp.config.quantities import format_bytes, format_joules, format_milliseconds, told_apart
from autocomp.front.goals import Held, Judge, family
from autocomp.records.evaluation import Evaluation
from autocomp.records.run import comparable, speedup
from autocomp.report.figures import Metric


def goal_rows(judge: Judge, evaluation: Evaluation | None, metric: Metric) -> list[dict[str, Any]]:
    """Each goal of a run: what it is, the limit, what the point came to, and whether that is within it."""
    if evaluation is None:
        return []
    rows = []
    for held in judge.held(evaluation):
        name, write, digits = _told(held, metric, evaluation)
        value, limit = told_apart(write, held.value, held.limit, digits)
        rows.append({"goal": name, "limit": f"at most {limit}", "came_to": value, "met": held.met})
    return rows


def _told(held: Held, metric: Metric, evaluation: Evaluation) -> tuple[str, Callable[[float, int], str], int]:
    """What a limit is called, how its values are written, and with how many digits."""
    if held.goal == "max_latency":
        return f"latency on {held.subject}", format_milliseconds, 3
    if held.goal == "max_energy":
        how = "estimated" if evaluation.latency[held.subject].joules is None else "counted"
        return f"energy of one inference on {held.subject}, {how}", format_joules, 3
    if held.goal == "max_size":
        return "size of the weights", format_bytes, 3
    if held.goal == "max_memory":
        return f"memory on {held.subject}", format_bytes, 3
    if metric.percent and (held.subject == metric.name or held.subject.startswith(f"{metric.name}/")):
        return f"drop of {held.subject}", lambda value, digits: f"{value * 100:.{digits}g} pt", 2
    return f"drop of {held.subject}", lambda value, digits: f"{value:.{digits}g}", 3


def family_rows(
    judge: Judge, evaluations: Sequence[Evaluation], factors: Sequence[float], profiles: Sequence[str], metric: Metric
) -> list[dict[str, Any]]:
    """Each member of a family: its point, how much faster it is, and its metric; or that no point reaches it."""
    rows = []
    for (name, member), profile in zip(
        family(judge, evaluations, factors, profiles).items(), list(profiles) * len(factors), strict=True
    ):
        row: dict[str, Any] = {"name": name, "id": None}
        if member is not None:
            value = member.metrics.get(metric.name)
            row |= {
                "id": member.candidate.id,
                "speedup": f"{speedup(member, judge.dense, profile):.2f}×",
                "latency": format_milliseconds(comparable(member, judge.dense, profile)),
                "metric": metric.text(value),
                "change": metric.change(value, judge.dense.metrics.get(metric.name)),
                "smaller": f"{judge.dense.bytes / member.bytes:.1f}×" if member.bytes else "–",
            }
        rows.append(row)
    return rows
