"""Two readings of the same model's metrics, held against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping

SAME = 1e-3  # of a metric's value: what it may differ by between two readings of the same data


def otherwise(then: Mapping[str, float], now: Mapping[str, float]) -> str:
    """Which metrics differ between two readings, and how; empty if none does."""
    changed = [metric for metric in {**then, **now} if not _alike(then.get(metric), now.get(metric))]
    return ", ".join(f"{metric} {_text(then.get(metric))}, now {_text(now.get(metric))}" for metric in changed)


def _alike(then: float | None, now: float | None) -> bool:
    return then is not None and now is not None and math.isclose(then, now, rel_tol=SAME, abs_tol=1e-8)


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
