"""What a search was expected to find and to take, kept from before its first trial, to be held against what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

PREPARING, TELLING, MEASURING = "until the first trial", "trials", "measuring"  # the parts of a search


@dataclass(frozen=True)
class ExpectedPoint:
    """What is thought of a candidate: times faster than dense by profile, bytes of weights, divergence from dense in nats. All estimated."""

    speedup: Mapping[str, float]
    bytes: int
    divergence: float


@dataclass(frozen=True)
class Expected:
    """An estimate of a search from before its first trial: its front, slow to fast, and the seconds of its parts.

    ``seconds`` are by part, of so many ``trials`` and ``measurements``; a part whose seconds were not known is left out, and those until the
    first trial were known already. ``spent`` is what the parts took. ``errors`` are the relative errors of the latency models by profile, at
    that moment; None: by peak rates alone. ``candidates`` has what was thought then of those that were measured later, by id.
    """

    points: tuple[ExpectedPoint, ...]
    seconds: Mapping[str, float]
    trials: int
    measurements: int
    errors: Mapping[str, float | None]
    spent: Mapping[str, float] = field(default_factory=dict)
    candidates: Mapping[str, ExpectedPoint] = field(default_factory=dict)


def expected_to_json(expected: Expected) -> dict[str, Any]:
    data = dict(expected.__dict__)
    data["points"] = [_point_to_json(point) for point in expected.points]
    data["candidates"] = {name: _point_to_json(point) for name, point in expected.candidates.items()}
    for name in ("seconds", "errors", "spent"):
        data[name] = dict(data[name])
    return data


def expected_from_json(data: Mapping[str, Any]) -> Expected:
    """What ``expected_to_json`` gave. KeyError, TypeError, AttributeError for anything else."""
    found = Expected(**data)
    points = tuple(ExpectedPoint(**point) for point in found.points)  # type: ignore[arg-type] # as JSON has them
    candidates = {name: ExpectedPoint(**point) for name, point in found.candidates.items()}  # type: ignore[arg-type]
    return replace(found, points=points, candidates=candidates)


def _point_to_json(point: ExpectedPoint) -> dict[str, Any]:
    return {**point.__dict__, "speedup": dict(point.speedup)}
