"""A finished run's choices for other weights of the same architecture: nothing is searched, all else is done as in a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocomp.config.settings import Settings, read_settings
from autocomp.errors import UsageError, shown, suggest
from autocomp.records.candidate import Candidate
from autocomp.records.recovery import THEN, Recovery
from autocomp.records.run import Run, read_run
from autocomp.recovery.recipe import load_recipe
from autocomp.run.folder import CONFIG
from autocomp.space.space import Space

ATTRIBUTE = "replayed"  # of the study: a run that goes on needs the other no more
LEFT_OUT = {
    "out",
    "storage",
    "minutes",
    "trials",
    "measurements",
    "recover",
    "stop_when_met",
    "sampler",
    "replay",
    "auto",
    "points",
}


@dataclass(frozen=True)
class Choice:
    """A candidate that is made again, and whether it was trained; ``of``: of which uncompressed model (None: where a run goes on)."""

    candidate: Candidate
    trained: bool
    of: Candidate | None = None


def with_replay(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings as they are given, and, where they replay a run, what they have from it unless it is stated: all that decides which weights a
    candidate gets, goals, recipe and steps. UsageError if there is no such run."""
    if not given.get("replay"):
        return dict(given), {}
    folder = Path(given["replay"]).absolute()
    own = Path(given.get("out") or "") / CONFIG
    if given.get("out") and own.exists() and (settings := read_settings(own)).replay == str(folder):  # it goes on
        return {**given, "replay": str(folder)}, settings.model_dump(exclude={"out"})
    return {**given, "replay": str(folder)}, _settings_of(folder)


def _settings_of(folder: Path) -> dict[str, Any]:
    run, settings = _read(folder), read_settings(folder / CONFIG)
    trained = [point.evaluation.recovered for point in run.front if point.evaluation.recovered is not None]
    given = {name: value for name, value in settings.model_dump().items() if name not in LEFT_OUT}
    if trained:
        given |= {
            "recover": f"{max(done.steps for done in trained)}steps",
            "recipe": _recipe_of(settings, run, trained[0], folder),
        }
    return given


def _recipe_of(settings: Settings, run: Run, trained: Recovery, folder: Path) -> str:
    """The recipe that points were last trained by: the run's own file, or the shipped one of that name, if it says what it said then.

    UsageError where neither does.
    """
    name = trained.recipe.rpartition(THEN)[2]
    for address in (settings.recipe, name):
        try:
            recipe = load_recipe(address)
        except UsageError:
            continue
        says = recipe.model_dump(mode="json")
        if recipe.name == name and run.recipes.get(name, says) == says:
            return address
    raise UsageError(
        f"the points of {folder} were trained by the recipe {shown(name)}, whose file is not known, or is another by now: give it (--recipe)"
    )


def choices(settings: Settings, known: Mapping[str, Any] | None = None) -> list[Choice]:
    """What a run makes again, as its study has it, else as it is read from the other run; empty where a run searches.

    UsageError if that is no finished run, has no such point, or none at all.
    """
    if settings.replay is None:
        if settings.points:
            raise UsageError("points are of a run that is replayed: give it too, replay=RUN")
        return []
    if known and ATTRIBUTE in known:
        return [Choice(Candidate.from_json(one["candidate"]), one["trained"]) for one in known[ATTRIBUTE]]
    run = _read(Path(settings.replay))
    front = {point.evaluation.candidate.id: point.evaluation for point in run.front}
    for point in settings.points:
        if point not in front:
            raise UsageError(
                f"the front of {settings.replay} has no point {shown(point)};{suggest(point, front)} it has {', '.join(front)}"
            )
    wanted = [e for name, e in front.items() if e.source != "dense" and name in (settings.points or front)]
    if not wanted:
        raise UsageError(f"there is nothing to replay: the front of {settings.replay} is the uncompressed model alone")
    return [Choice(e.candidate, e.recovered is not None, run.dense.evaluation.candidate) for e in wanted]


def to_json(made: Sequence[Choice]) -> list[dict[str, Any]]:
    """What the study keeps of them."""
    return [{"candidate": choice.candidate.to_json(), "trained": choice.trained} for choice in made]


def only(space: Space, made: Sequence[Choice], run: str) -> Space:
    """The space of these candidates alone, and the dense one: no other option of a layer need be computed.

    UsageError if they are of another architecture, or of options that the space does not offer; it names the first.
    """
    for choice in made:
        chosen: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
            "width": (choice.candidate.widths, space.every_width),
            "method": (choice.candidate.methods, space.every_method),
        }
        for kind, (theirs, ours) in chosen.items():
            if other := sorted({*theirs} ^ {*ours}):
                raise UsageError(
                    f"the run in {run} is of another architecture: {shown(other[0])} is in one of them only ({len(other)} names differ)"
                )
            for name, value in theirs.items():
                if value not in ours[name]:
                    raise UsageError(
                        f"{name} is not offered {kind} {value}, which point {choice.candidate.id} of {run} has: replay it with its own space, "
                        "profiles and model"
                    )
        for name, width in choice.of.widths.items() if choice.of else ():  # all of it there may be half of it here
            if width != space.widths[name][0]:
                raise UsageError(
                    f"the run in {run} is of another architecture: {shown(name)} is {width} wide there, {space.widths[name][0]} here"
                )
    candidates = [choice.candidate for choice in made]
    widths = {
        name: (w[0], *(v for v in w[1:] if v in {c.widths[name] for c in candidates}))
        for name, w in space.every_width.items()
    }
    methods = {
        name: (m[0], *(v for v in m[1:] if v in {c.methods[name] for c in candidates}))
        for name, m in space.every_method.items()
    }
    return space.of(widths, methods)


def _read(folder: Path) -> Run:
    if not (folder / CONFIG).exists():
        raise UsageError(f"there is no run in {folder} to replay (no {CONFIG}): name the folder of a finished search")
    return read_run(folder)
