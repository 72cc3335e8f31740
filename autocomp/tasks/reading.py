"""What was read of a model: its metrics, and how sure they are.

A metric that a task gives as the values of samples, of which it is the mean, has a standard error: theirs over the root of their number. The
difference between two models that were read on the same samples has one too, of the differences sample by sample, which is much smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]

NOTHING = 1e-11  # what sums in another order make of a metric that is 0 of one model: its distance from itself
SAME = 1e-3  # of a metric's value: what it may differ by between two readings of the same data; chosen by hand, not measured


class Metrics(dict[str, float]):
    """Metrics by name; ``samples`` has the values of those that are means."""

    def __init__(self, metrics: Mapping[str, float], samples: Mapping[str, Samples] | None = None) -> None:
        super().__init__(metrics)
        self.samples = dict(samples or {})

    def errors(self) -> dict[str, float]:
        """The standard error of each metric that is a mean.

        >>> Metrics({"accuracy": 0.5}, {"accuracy": np.array([0.0, 1.0, 0.0, 1.0])}).errors()
        {'accuracy': 0.28867513459481287}
        """
        return {name: _standard_error(values) for name, values in self.samples.items()}

    def drop_errors(self, dense: Metrics | None) -> dict[str, float]:
        """The standard error of each metric's difference from another reading, where both are means over the same samples."""
        theirs = {} if dense is None else dense.samples
        return {
            name: _standard_error(values - theirs[name])
            for name, values in self.samples.items()
            if name in theirs and theirs[name].shape == values.shape
        }


def values_of(value: Any) -> Samples | None:
    """The values of samples, where a metric is given as these: a tensor, array or list of one axis and two entries at least. A
    tuple is none: of two numbers it would be a mean and its error."""
    if isinstance(value, str | bytes | tuple) or not hasattr(value, "__len__"):
        return None
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    try:
        values = np.array(value, dtype=np.float64)  # a copy: the next model may be read into the same array
    except (TypeError, ValueError, OverflowError):
        return None
    return values if values.ndim == 1 and len(values) > 1 else None


def otherwise(then: Mapping[str, float], now: Mapping[str, float], allowed: Mapping[str, float] | None = None) -> str:
    """Which metrics differ between two readings, and how; empty if none does.

    By more than a thousandth of their value; or than what is ``allowed`` by metric, where that is less: a thousandth of 1000 may be more than
    all that a goal lets a metric lose.
    """
    limits = allowed or {}
    changed = [m for m in {**then, **now} if not _alike(then.get(m), now.get(m), limits.get(m, math.inf))]
    return ", ".join(f"{metric} {_text(then.get(metric))}, now {_text(now.get(metric))}" for metric in changed)


def _standard_error(values: Samples) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _alike(then: float | None, now: float | None, allowed: float = math.inf) -> bool:
    if then is None or now is None:
        return False
    return abs(then - now) <= max(min(SAME * max(abs(then), abs(now)), allowed), NOTHING)


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.7g}"
