"""Coarse to fine: once a search knows where its front is, widths and ranks between those of the first pass are offered next to the front's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from autocomp.processes.pool import cores
from autocomp.records.candidate import Method
from autocomp.records.evaluation import Evaluation
from autocomp.run.found import Found
from autocomp.study.costs import Costs
from autocomp.study.study import Choices
from autocomp.study.useful import useful_divergence

if TYPE_CHECKING:
    from autocomp.database.database import LayerDatabase
    from autocomp.space.space import Space

# Both chosen by hand, not measured.
FILES = 1.0  # of the files of the layer database that finer choices may add to it
TIME = 0.1  # of the time to search that each call may take at most, where minutes are set


class Offer(NamedTuple):
    """More choices of one group or layer, and the share of the time that it concerns."""

    name: str
    share: float
    widths: dict[str, tuple[int, ...]]
    methods: dict[str, tuple[Method, ...]]


def refine(found: Found) -> bool:
    """Offer finer choices around the front, the dearest groups and layers first; whether there are any.

    The layer database computes these alone. How many depends on the first pass and, where minutes are set, on the clock.
    """
    prepared, costs = found.prepared, found.costs
    database, budget = prepared.database, prepared.budget
    offers = [] if budget.late() else around(costs, found.every, _front(found))
    if not offers:
        return False
    until, known = budget.spent() + TIME * budget.to_search(), len(database.warnings)
    with prepared.progress.stage("layer database: finer choices", len(offers)) as stage:

        def goes_on(name: str) -> bool:
            stage.advance(note=name)
            return budget.spent() <= until

        before = costs.space
        space = affordable(database, prepared.space, before, offers, goes_on, cores())
        if space is not before:
            found.offer(space)
        for text in database.warnings[known:]:
            stage.warn(text)
    return space is not before


def around(costs: Costs, every: Choices, front: Sequence[Evaluation]) -> list[Offer]:
    """What may be offered besides, dearest first: of groups widths next to those of the front, of layers that it has at low rank more ranks."""
    space, offers = costs.space, list[Offer]()
    of_group, of_layer = dict.fromkeys(space.widths, 0.0), dict.fromkeys(space.methods, 0.0)
    for factor in costs.problem().factors:
        of_layer[factor.layer] = float(factor.seconds[0, 0, 0])
        for name in {factor.in_group, factor.out_group} - {None}:
            of_group[str(name)] += of_layer[factor.layer]
    for name, offered in space.widths.items():
        widths = between(offered, every.widths[name], {e.candidate.widths[name] for e in front})
        if widths != offered:
            offers.append(Offer(name, of_group[name], {name: widths}, {}))
    for name, methods in every.methods.items():
        if len(methods) > len(space.methods[name]) and any(e.candidate.methods[name].ranks for e in front):
            offers.append(Offer(name, of_layer[name], {}, {name: methods}))
    return sorted(offers, key=lambda offer: -offer.share)


def affordable(
    database: LayerDatabase,
    first: Space,
    space: Space,
    offers: Sequence[Offer],
    goes_on: Callable[[str], bool] = lambda name: True,
    workers: int = 1,
) -> Space:
    """The space with as many of these offers as the layer database may grow by, over that of the ``first`` space; it computes them.

    ``goes_on`` is asked after each.
    """
    most = (1 + FILES) * len(database.files(first))
    for offer in offers:
        wider = space.offering(offer.widths, offer.methods)
        if len(work := database.files(wider)) <= most:
            database.fill(work, workers)
            space = wider
        if not goes_on(offer.name):
            break
    return space


def between(offered: Sequence[int], every: Sequence[int], used: Collection[int]) -> tuple[int, ...]:
    """The widths on offer, and of ``every`` the one halfway from each that is used to the next on either side; descending."""
    ladder = [width for width in every if width]
    known = sorted(ladder.index(width) for width in offered if width)

    def halfway() -> Iterator[int]:
        for level in (ladder.index(width) for width in used if width):
            at = known.index(level)
            yield from (ladder[(level + other) // 2] for other in known[max(0, at - 1) : at + 2])

    more = set(halfway())
    return tuple(width for width in every if width in more or width in offered)


def _front(found: Found) -> Sequence[Evaluation]:
    """The candidates of the front that a run is about; all of the front where none of it is of use."""
    front = [e for e in found.search.front() if e.kl is not None]
    useful = useful_divergence(found.measured(), found.judge())
    return [e for e in front if (e.kl or 0.0) < useful] or front
