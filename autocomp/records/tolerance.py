"""How far outputs are from torch's, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Errors:
    """Errors of outputs against torch's: ``typical`` is relative (L2), ``tail`` and ``worst`` in parts of the output's range.

    ``decisions`` is the share of decisions that differ: of rows whose largest value is another one, of elements that are no floats.
    """

    typical: float = 0.0
    tail: float = 0.0
    worst: float = 0.0
    decisions: float = 0.0

    def within(self, limits: Errors) -> bool:
        return all(getattr(self, field.name) <= getattr(limits, field.name) for field in fields(self))
