"""How a point was trained after it was compressed, as its evaluation keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

THEN = " + "  # between the recipes of trainings that went on from one another
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Recovery:
    """A training that made a candidate better on validation.

    ``before`` are its metrics before it, with their standard errors and those of their differences from dense; ``weights`` the file of what it
    learnt, in the run folder. ``losses`` is the curve of the training loss as (step, loss), ``readings`` that of the objective as (seconds,
    value); ``seconds`` are those of this candidate alone. ``frozen`` are the layers that did not train.
    """

    before: Mapping[str, float]
    recipe: str
    learning_rate: float
    steps: int
    seconds: float
    weights: str = ""
    before_errors: Mapping[str, float] = field(default_factory=dict)
    before_drop_errors: Mapping[str, float] = field(default_factory=dict)
    losses: Curve = ()
    readings: Curve = ()
    frozen: Sequence[str] = ()

    def is_of(self, mark: str) -> bool:
        """Whether its weights are of the stage whose files have that mark in their names."""
        return f"-{mark}-" in self.weights


@dataclass(frozen=True)
class Entrant:
    """A candidate that was trained for a while: its divergence before, and what it lost of the objective after each round (None: not in it).

    ``predicted`` is what a fit to the other entrants says of its loss after the first round, where there were enough of them.
    """

    id: str
    kl: float
    drops: Sequence[float | None]
    failure: str = ""
    predicted: float | None = None


@dataclass(frozen=True)
class RecoverySummary:
    """What the stage of training did: its recipe, learning rate in words, seconds of the whole stage, and who entered."""

    recipe: str
    rate: str
    seconds: float
    entrants: Sequence[Entrant] = ()
    stages: Sequence[str] = ()
    notes: Sequence[str] = ()
    mark: str = ""  # what the names of its files of weights have in common
    named: bool = False  # whether the candidates were named, in the place of chosen


def recovery_to_json(recovery: Recovery) -> dict[str, Any]:
    data = dict(recovery.__dict__)
    for name in ("before", "before_errors", "before_drop_errors"):
        data[name] = dict(data[name])
    for name in ("losses", "readings"):
        data[name] = [list(point) for point in data[name]]
    data["frozen"] = list(data["frozen"])
    return data


def recovery_from_json(data: Mapping[str, Any]) -> Recovery:
    curves = {name: tuple((float(x), float(y)) for x, y in data.get(name, ())) for name in ("losses", "readings")}
    return Recovery(**{**data, **curves, "frozen": tuple(data.get("frozen", ()))})


def recovery_summary_to_json(summary: RecoverySummary) -> dict[str, Any]:
    data = dict(summary.__dict__)
    data["entrants"] = [{**entrant.__dict__, "drops": list(entrant.drops)} for entrant in summary.entrants]
    return {**data, "stages": list(summary.stages), "notes": list(summary.notes)}


def recovery_summary_from_json(data: Mapping[str, Any]) -> RecoverySummary:
    entrants = tuple(Entrant(**{**one, "drops": tuple(one["drops"])}) for one in data["entrants"])
    return RecoverySummary(
        **{**data, "entrants": entrants, "stages": tuple(data["stages"]), "notes": tuple(data["notes"])}
    )
