"""What was asked of a run and what came of it: each goal beside the recommended point, each member of the family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autocomp.config.quantities import format_bytes, format_milliseconds
from autocomp.front.goals import Judge, family
from autocomp.records.evaluation import Evaluation
from autocomp.records.run import comparable, speedup
from autocomp.report.figures import Metric


def goal_rows(judge: Judge, evaluation: Evaluation | None, metric: Metric) -> list[dict[str, Any]]:
    """Each goal of a run: what it is, the limit, what the point came to, and whether that is within it."""
    if evaluation is None:
        return []
    rows = []
    for name, limit in judge.max_drops.items():
        lost = judge.drop(evaluation, name)
        share = metric.percent and (name == metric.name or name.startswith(f"{metric.name}/"))
        unit = (lambda value: f"{value * 100:.2g} pt") if share else (lambda value: f"{value:.3g}")
        rows.append(_row(f"drop of {name}", f"at most {unit(limit)}", unit(lost), lost <= limit + 1e-12))
    for profile in evaluation.latency:
        if (most := judge.max_latency(profile)) is not None:
            seconds = comparable(evaluation, judge.dense, profile)
            texts = (f"at most {format_milliseconds(most)}", format_milliseconds(seconds))
            rows.append(_row(f"latency on {profile}", *texts, seconds <= most * (1 + 1e-9)))
    if (most := judge.max_bytes) is not None:
        texts = (f"at most {format_bytes(most)}", format_bytes(evaluation.bytes))
        rows.append(_row("size of the weights", *texts, evaluation.bytes <= most))
    return rows


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


def _row(goal: str, limit: str, came_to: str, met: bool) -> dict[str, Any]:
    return {"goal": goal, "limit": limit, "came_to": came_to, "met": bool(met)}
