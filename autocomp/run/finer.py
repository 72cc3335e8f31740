"""Coarse to fine: once a search knows where its front is, widths between those of the first pass are offered next to the front's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from autocomp.processes.pool import cores
from autocomp.records.evaluation import Evaluation
from autocomp.run.found import Found
from autocomp.study.costs import Costs
from autocomp.study.useful import useful_divergence

if TYPE_CHECKING:
    from autocomp.database.database import LayerDatabase
    from autocomp.space.space import Space

# Both chosen by hand, not measured.
FILES = 0.5  # of the files of the layer database that finer widths may add to it
TIME = 0.1  # of the time to search that each call may take at most, where minutes are set


def refine(found: Found) -> bool:
    """Offer finer widths around the front, the dearest groups first; whether there are any.

    The layer database computes these alone. How many depends on the first pass and, where minutes are set, on the clock.
    """
    prepared, costs = found.prepared, found.costs
    database, budget = prepared.database, prepared.budget
    wanted = {} if budget.late() else widths_around(costs, found.every_width, _around(found))
    if not wanted:
        return False
    until, known = budget.spent() + TIME * budget.to_search(), len(database.warnings)
    with prepared.progress.stage("layer database: finer widths", len(wanted)) as stage:

        def goes_on(group: str) -> bool:
            stage.advance(note=group)
            return budget.spent() <= until

        before = costs.space
        space = affordable(database, prepared.space, before, wanted, goes_on, cores())
        if space is not before:
            found.offer(space.widths)
        for text in database.warnings[known:]:
            stage.warn(text)
    return space is not before


def widths_around(
    costs: Costs, every: Mapping[str, tuple[int, ...]], front: Sequence[Evaluation]
) -> dict[str, tuple[int, ...]]:
    """By group, dearest first, its widths with the ones between those of the front's candidates and the next; not those that gain none."""
    space = costs.space
    shares = dict.fromkeys(space.widths, 0.0)
    for factor in costs.problem().factors:
        for name in {factor.in_group, factor.out_group} - {None}:
            shares[str(name)] += float(factor.seconds[0, 0, 0])
    wanted = {
        name: between(space.widths[name], every[name], {e.candidate.widths[name] for e in front})
        for name in sorted(space.widths, key=lambda name: -shares[name])
    }
    return {name: widths for name, widths in wanted.items() if widths != space.widths[name]}


def affordable(
    database: LayerDatabase,
    coarse: Space,
    space: Space,
    wanted: Mapping[str, tuple[int, ...]],
    goes_on: Callable[[str], bool] = lambda group: True,
    workers: int = 1,
) -> Space:
    """The space with as many of these widths as the layer database may grow by, over that of ``coarse``; it computes them.

    ``goes_on`` is asked after each group.
    """
    most = (1 + FILES) * len(database.files(coarse))
    for name, widths in wanted.items():
        wider = space.offering({name: widths})
        if len(work := database.files(wider)) <= most:
            database.fill(work, workers)
            space = wider
        if not goes_on(name):
            break
    return space


def between(offered: Sequence[int], every: Sequence[int], used: Collection[int]) -> tuple[int, ...]:
    """The widths on offer, and of ``every`` the one halfway from each that is used to the next on either side; descending."""
    ladder = [width for width in every if width]
    known = sorted(ladder.index(width) for width in offered if width)
    new = {
        (level + other) // 2
        for level in (ladder.index(width) for width in used if width)
        for other in known[max(0, known.index(level) - 1) : known.index(level) + 2]
    }
    more = {ladder[level] for level in new}
    return tuple(width for width in every if width in more or width in offered)


def _around(found: Found) -> Sequence[Evaluation]:
    """The candidates of the front that a run is about; all of the front where none of it is of use."""
    front = [e for e in found.search.front() if e.kl is not None]
    useful = useful_divergence([e for e in found.told if e.state == "measured" and e.kl is not None], found.judge())
    return [e for e in front if (e.kl or 0.0) < useful] or front
