"""Which trainings a run makes: of what its search found, or of points that are named; and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from autocomp.errors import UsageError, shown, suggest
from autocomp.front.goals import choose_front
from autocomp.records.evaluation import untrained
from autocomp.records.recovery import RecoverySummary, recovery_summary_from_json
from autocomp.recovery.recipe import load_recipe
from autocomp.run.halving import Stage

if TYPE_CHECKING:
    from autocomp.run.found import Found
    from autocomp.run.prepare import Prepared


RECIPE = "recipe"  # the study's attribute: what the search's own training is made by


def train_candidates(prepared: Prepared, found: Found) -> None:
    """Train what a finished search found, as its settings say; nothing where they say nothing. A task that fails now costs nobody the search."""
    amount, unit = prepared.settings.training
    if not amount:
        return
    prepared.budget.training = 0.0
    chosen = None
    if prepared.replayed:  # those that were trained there, or, where none was and training is asked for, all
        again = {choice.candidate for choice in prepared.replayed if choice.trained}
        again = again or {choice.candidate for choice in prepared.replayed}
        chosen = [e.trial for e in found.told if e.candidate in again and e.state == "measured"]
    recipe = load_recipe(prepared.settings.recipe)
    says = recipe.model_dump(mode="json")
    if (begun := found.search.get_attr(RECIPE)) is None:
        found.search.set_attr(RECIPE, says)
    elif begun != says:
        raise UsageError(
            f"the recipe {shown(prepared.settings.recipe)} is not what it was when this run trained: its points would be of two recipes. Put it "
            f"back, or train more by the new one with `autocomp recover {prepared.folder} --recipe {prepared.settings.recipe}`"
        )
    try:
        stage = Stage(prepared, found, recipe, (amount, unit), chosen)
        if stage.done and (since := stage.found_since()):
            prepared.progress.warn(
                f"{since} candidates were found since training was done, and are not trained: `autocomp recover {prepared.folder}` trains more"
            )
        stage.run()
    except UsageError as error:
        prepared.progress.warn(f"nothing was trained: {error}")


def train_points(
    prepared: Prepared, found: Found, points: Sequence[str], recipe: str, length: tuple[float, str]
) -> None:
    """Train points of a finished run by their ids (none: its untrained front) for so long. UsageError if there is none of such an id."""
    prepared.measurer.names = tuple(found.dense().metrics)
    found.judge_again(later=True, refuse=True)
    measured = {e.candidate.id: e for e in found.told if e.state == "measured" and e.source != "dense"}
    judge = found.judge()
    if missing := [point for point in points if point not in measured]:
        raise UsageError(
            f"--point: the run in {prepared.folder} measured no candidate {shown(missing[0])};{suggest(missing[0], measured)} its front has "
            + ", ".join(
                e.candidate.id for e in choose_front(list(measured.values()), judge.objective, judge.higher_is_better)
            )
        )
    front = choose_front([untrained(e) for e in measured.values()], judge.objective, judge.higher_is_better)
    chosen = [measured[point].trial for point in points] or [e.trial for e in front]
    if not chosen:
        raise UsageError(
            f"the run in {prepared.folder} measured nothing but the uncompressed model: there is nothing to train"
        )
    found.take_back("nothing was trained:")
    stage = Stage(prepared, found, load_recipe(recipe), length, chosen)
    if stage.done:
        prepared.progress.warn(
            "these points were trained so before: they are written again, and no longer trained; for that, give another length, recipe or points"
        )
    stage.run()


def summary_of(found: Found) -> RecoverySummary | None:
    """What the stage of a run did; None where there was none."""
    kept = found.search.get_attr("recovery")
    return recovery_summary_from_json(kept) if kept else None


def correlations(
    summary: RecoverySummary | None, spearman: Callable[[Sequence[float], Sequence[float]], float | None]
) -> dict[str, float]:
    """How well what was known before ranks what came of the trainings: the divergence, and a short training."""
    if summary is None:
        return {}
    first = [(e.kl, e.drops[0]) for e in summary.entrants if e.drops and e.drops[0] is not None]
    last = [
        (e.drops[0], e.drops[-1])
        for e in summary.entrants
        if len(e.drops) > 1 and e.drops[-1] is not None and e.drops[0] is not None
    ]
    fitted = [
        (e.predicted, e.drops[0])
        for e in summary.entrants
        if e.predicted is not None and e.drops and e.drops[0] is not None
    ]
    found = {
        "divergence before, with the loss after a short training": spearman(
            [a for a, _ in first], [b for _, b in first]
        ),
        "fitted to the other entrants, with the loss after a short training": spearman(
            [a for a, _ in fitted], [b for _, b in fitted]
        ),
        "a short training, with the loss at its end": spearman([a for a, _ in last], [b for _, b in last]),
    }
    return {name: value for name, value in found.items() if value is not None and np.isfinite(value)}
