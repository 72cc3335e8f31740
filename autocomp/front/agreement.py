"""How well one thing tells another: rank correlation, and how far predictions are off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation; None where there are fewer than three points or one side never varies."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    value = float(spearmanr(a, b).statistic)
    return value if np.isfinite(value) else None


def median_error(predicted: Sequence[float], found: Sequence[float]) -> float | None:
    """Median of ``|predicted / found - 1|``; None where there is nothing. All of ``found`` are above 0."""
    if not len(found):
        return None
    return float(np.median(np.abs(np.array(predicted) / np.array(found) - 1)))
