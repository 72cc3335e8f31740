"""One training of a run's, in a process of its own; and what the results of several in a row come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.errors import AutocompError
from autocomp.measurement.measurer import reason_of
from autocomp.processes.outcome import Outcome
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation, untrained
from autocomp.records.recovery import THEN, Recovery
from autocomp.recovery.recipe import Recipe
from autocomp.recovery.schedules import Span

if TYPE_CHECKING:
    from autocomp.recovery.lessons import Teaching
    from autocomp.run.prepare import Prepared

FOLDER = "recovery"  # in the run folder


@dataclass(frozen=True)
class Job:
    """One training: a trial's candidate, the round, for how long, and from whose weights (None: as it was compressed).

    ``name`` is that of its files, which no other training has.
    """

    name: str
    trial: int
    candidate: Candidate
    round: int
    span: Span
    begin: str | None


@dataclass(frozen=True)
class Done:
    """What a training came to, without its metrics: JSON can hold it."""

    weights: str
    steps: int
    seconds: float
    losses: list[tuple[float, float]]
    frozen: list[str]
    notes: list[str]
    failure: str = ""


def trained(
    prepared: Prepared, teaching: Teaching, recipe: Recipe, rate: float, job: Job, folder: Path, stop: Any
) -> Outcome[Done]:
    """One training, in a process of its own where there are several; its weights lie in a file then."""
    from autocomp.recovery import stored
    from autocomp.recovery.channels import unfit
    from autocomp.recovery.forms.whole import frozen
    from autocomp.recovery.train import train

    name = job.name
    try:
        model = prepared.stitch_untrained(job.candidate)
        begun = None if job.begin is None else stored.read(prepared.folder / job.begin)[stored.FORM]
        shared = prepared.shared_layers(job.candidate) if recipe.learns_from("features") else None
        wide, notes = None, []
        if recipe.refreshes and begun is None:
            wide = prepared.wide(job.candidate)
            if layer := unfit(model, wide.graph):
                notes = [
                    f"{job.candidate.id} kept the channels that compression chose: {layer} is factorised, in codebooks or in a loop"
                ]
                recipe, wide = recipe.on_chosen_channels(), None
        done = train(model, teaching, recipe, job.span, rate, shared, folder / f"{name}.part", begun, stop.is_set, wide)
        if not done.failure:
            name = stored.write_by_content(folder, job.name, done.weights)
        return Outcome(
            Done(
                f"{FOLDER}/{name}",
                done.steps,
                done.seconds,
                done.curve,
                frozen(model),
                [*notes, *done.notes],
                done.failure,
            )
        )
    except AutocompError as error:
        return Outcome(None, str(error))
    except Exception as error:
        return Outcome(None, reason_of(error))


def renewed(
    evaluation: Evaluation,
    results: Sequence[dict[str, Any]],
    objective: str,
    sign: float,
    recipe: str,
    rate: float,
    went_on: bool = False,
) -> Evaluation | None:
    """A measured evaluation with what successive trainings made of it; None where none made it better (``sign`` 1: higher is better).

    Where they ``went_on`` from what it had learnt before, that is a part of its record.
    """
    best = last_of_the_best(results, objective, sign)
    if best is None or sign * best["metrics"][objective] <= sign * evaluation.metrics[objective]:
        return None
    before, taken = untrained(evaluation), results[: results.index(best) + 1]
    recovery = Recovery(
        before=before.metrics, recipe=recipe, learning_rate=rate, steps=sum(r["done"]["steps"] for r in taken),
        seconds=round(sum(r["done"]["seconds"] for r in taken), 3), weights=best["done"]["weights"],
        before_errors=before.errors, before_drop_errors=before.drop_errors, losses=joined(taken),
        readings=readings(before.metrics[objective], taken, objective), frozen=tuple(best["done"]["frozen"]),
    )  # fmt: skip
    if went_on and evaluation.recovered is not None:
        recovery = after(evaluation.recovered, recovery)
    return replace(
        before, metrics=best["metrics"], errors=best["errors"], drop_errors=best["drop_errors"], recovered=recovery
    )


def after(first: Recovery, then: Recovery) -> Recovery:
    """The record of a training that went on from the weights of another."""
    losses = [*first.losses, *((step + first.steps, loss) for step, loss in then.losses)]
    values = [*first.readings, *((seconds + first.seconds, value) for seconds, value in then.readings[1:])]
    return replace(
        then, recipe=f"{first.recipe}{THEN}{then.recipe}", steps=first.steps + then.steps, seconds=round(first.seconds + then.seconds, 3),
        losses=tuple(losses), readings=tuple(values),
    )  # fmt: skip


def last_of_the_best(results: Sequence[dict[str, Any]], objective: str, sign: float) -> dict[str, Any] | None:
    """The last result within a standard error of the best: of readings that noise alone tells apart, the one that was trained the longest."""
    if not results:
        return None
    best = max(results, key=lambda r: float(sign * r["metrics"][objective]))
    least = sign * best["metrics"][objective] - best["errors"].get(objective, 0.0)
    later = [r for r in results if sign * r["metrics"][objective] >= least]
    return later[-1]


def joined(results: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, float], ...]:
    """The curves of successive trainings as one, over steps."""
    points, before = [], 0
    for result in results:
        steps = result["done"]["steps"]
        points += [(before + float(along) * steps, float(loss)) for along, loss in result["done"]["losses"]]
        before += steps
    return tuple(points)


def readings(first: float, results: Sequence[Mapping[str, Any]], objective: str) -> tuple[tuple[float, float], ...]:
    """The objective over seconds of training."""
    points, seconds = [(0.0, first)], 0.0
    for result in results:
        seconds += result["done"]["seconds"]
        points.append((round(seconds, 3), result["metrics"][objective]))
    return tuple(points)
