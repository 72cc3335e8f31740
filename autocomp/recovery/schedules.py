"""What changes along a training: its budget, the learning rate and the temperature."""

from __future__ import annotations

import math
from typing import NamedTuple

DRAWING = 0.1  # of the seconds of a training at most, for the teacher's answers. Chosen by hand, not measured
WARM = 0.1  # of a cycle, in which the rate rises
FIRST, LAST = 0.1, 0.01  # of the highest rate, at the ends of a cycle


class Span(NamedTuple):
    """How long a training takes: so many steps, or so many seconds (one of the two); where both are given, whatever is reached first."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, amount: float, unit: str) -> Span:
        """So many ``seconds``, or else whole steps."""
        return cls(seconds=amount) if unit == "seconds" else cls(steps=int(amount))

    def along(self, step: int, elapsed: float) -> float:
        """The share that is done, 0 to 1."""
        by_steps = 0.0 if self.steps is None else step / max(1, self.steps)
        by_seconds = 0.0 if self.seconds is None else elapsed / max(1e-9, self.seconds)
        return min(1.0, max(by_steps, by_seconds))


def learning_rate(schedule: str, along: float) -> float:
    """The share of the highest learning rate at a place of a cycle: one-cycle (Smith & Topin 2018, arXiv:1708.07120), cosine or constant."""
    if schedule == "constant":
        return 1.0
    if schedule == "one-cycle" and along < WARM:
        return FIRST + (1 - FIRST) * along / WARM
    rest = (along - WARM) / (1 - WARM) if schedule == "one-cycle" else along
    return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))


def temperature(kind: str, hot: float, cold: float, along: float, sureness: float) -> float:
    """The temperature: constant, half a cosine from hot to cold, or by how sure the teacher is of its answers (1: of every one)."""
    if kind == "constant":
        return hot
    if kind == "entropy":
        return cold + (hot - cold) * sureness
    return cold + (hot - cold) * 0.5 * (1 + math.cos(math.pi * along))
