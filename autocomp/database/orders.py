"""In which order a group's units are kept: four orderings, and the choice between them.

By L1 and by L2 norm of the weights that make a unit, by L2 norm of its feature maps, and by OBS saliency against the
calibration Hessian (Hassibi & Stork 1993; one structured block at a time as in ZipLM, arXiv:2302.04089). The one with the
smallest error in the consuming layers, their weights updated, is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autocomp.compress.hessian import chosen, diagonal, times
from autocomp.compress.prune import cholesky, damped
from autocomp.layers.convolution import Layers, outputs_first
from autocomp.layers.narrow import Norms
from autocomp.processes.pool import map_in_processes

if TYPE_CHECKING:
    from autocomp.database.calibrate import Statistics
    from autocomp.graph.graph import Graph, Group
    from autocomp.space.space import Space

ORDERINGS = ("l1", "l2", "map", "obs")
# Both chosen by hand, not measured.
STEPS = 128  # removals a group at most; wider groups lose several channels between two updates of H^-1
SHRUNK = 0.75  # share of the columns that are left when the state of OBS is copied into smaller tensors


def order_group(
    model: nn.Module,
    graph: Graph,
    statistics: Statistics,
    group: Group,
    widths: Sequence[int],
    counts: Mapping[int, tuple[int, ...]] | None = None,
) -> tuple[Tensor, str]:
    """Return a group's units best first, and the ordering that won, one of `ORDERINGS`.

    All are judged by the Fisher-weighted error they leave in the consumers after the least-squares update, as the mean
    over ``widths`` of its logarithm. ``counts`` says how many units of each segment a width keeps.
    """
    narrow = [width for width in widths if 0 < width < group.width]
    if not narrow or not group.prunable:
        return torch.arange(group.width), "l1"
    readers = [Reader.of(model, graph, statistics, group, name) for name in group.consumers]
    orders = {
        "l1": norm_order(model, graph, group, 1),
        "l2": norm_order(model, graph, group, 2),
        "map": map_order(statistics, graph, group),
        "obs": obs_order(readers, group.width, min(narrow)),
    }
    scores: dict[str, float] = {}
    for name, order in orders.items():
        orders[name] = order = by_segment(order, group.segments, counts) if counts else order
        errors = sum(reader.errors(order) for reader in readers)
        assert isinstance(errors, Tensor)  # a group has a consumer
        scores[name] = float(errors[narrow].clamp_min(1e-30).log().sum())
    best = min(scores, key=scores.__getitem__)
    return orders[best], best


def by_segment(order: Tensor, segments: Sequence[int], counts: Mapping[int, tuple[int, ...]]) -> Tensor:
    """Rearrange an ordering so that its first ``width`` units are the best of each segment, as many as ``counts`` says."""
    lanes: dict[int, list[int]] = {}
    for unit in order.tolist():
        lanes.setdefault(segments[unit], []).append(unit)
    placed = dict.fromkeys(lanes, 0)
    result: list[int] = []
    for width in sorted(counts):
        for segment, count in enumerate(counts[width]):
            result += lanes[segment][placed[segment] : count]
            placed[segment] = max(placed[segment], count)
    return torch.tensor(result)


def norm_order(model: nn.Module, graph: Graph, group: Group, power: int) -> Tensor:
    """Return units by `filter_norms`, largest first."""
    return filter_norms(model, graph, group, power).argsort(descending=True, stable=True)


def filter_norms(model: nn.Module, graph: Graph, group: Group, power: int) -> Tensor:
    """Return of each unit the L1 or squared L2 norm of the filters that make it, BatchNorm folded in, added up over the producers."""
    from autocomp.graph.fold import affine

    norm = torch.zeros(group.width, dtype=torch.float64)
    for name in group.producers:
        layer, module = graph.layers[name], model.get_submodule(name)
        assert isinstance(module, Layers)
        size = outputs_first(module).detach().double().flatten(1).abs().pow(power).sum(1)
        after = model.get_submodule(layer.norm) if layer.norm is not None else None
        if isinstance(after, Norms) and after.running_mean is not None:
            size = size * affine(after)[0].abs().pow(power)
        units = torch.tensor(group.rows[name])
        norm.index_add_(0, units[units >= 0], size[units >= 0])
    return norm


def map_order(statistics: Statistics, graph: Graph, group: Group) -> Tensor:
    """Return units by the L2 norm of their feature maps, as their consumers see them, added up over the consumers."""
    norm = torch.zeros(group.width, dtype=torch.float64)
    for name in group.consumers:
        seen = statistics.layers[name]
        squares = diagonal(seen.covariance) + seen.mean.square()
        units = torch.tensor(group.columns[name])
        norm.index_add_(0, units[units >= 0], squares.view(len(units), -1).mean(1)[units >= 0])
    return norm.argsort(descending=True, stable=True)


def obs_order(readers: Sequence[Reader], width: int, narrowest: int) -> Tensor:
    """Return units best first, removed one by one (or a few, see `STEPS`) by the least OBS saliency of all readers.

    After each removal the readers' weights take their least-squares update and the saliencies are computed anew, down
    to ``narrowest`` units; those that are left are ordered by their last saliency.
    """
    states = [_Obs(reader) if reader.covariance.dim() == 2 else _Independent(reader) for reader in readers]
    alive = torch.arange(width)
    removed: list[Tensor] = []
    step = -(-(width - narrowest) // STEPS)
    while True:
        saliency = torch.zeros(width, dtype=torch.float64)
        for state in states:
            state.add_saliency(saliency)
        ranked = alive[saliency[alive].argsort(stable=True)]
        if len(alive) <= narrowest:
            return torch.cat([*removed, ranked]).flip(0)
        gone = ranked[: min(step, len(alive) - narrowest)]
        removed.append(gone)
        for state in states:
            state.remove(gone)
        alive = ranked[len(gone) :].sort().values


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group: its weights [O, K] and Hessian, with the columns of a unit side by side.

    ``blocks`` [units, columns] are the positions of each unit's columns, ``units`` which ones those are; the positions
    in no block are of columns that always stay. All in float32, which takes half the time and, H being damped, finds the orderings that
    float64 does (of 28 groups of digits, tokens and a ResNet-18 all but 3 to the last unit, those with the same errors to 6 digits).
    """

    weight: Tensor
    covariance: Tensor
    fisher: Tensor
    units: Tensor
    blocks: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, statistics: Statistics, group: Group, name: str) -> Reader:
        layer, module = graph.layers[name], model.get_submodule(name)
        assert isinstance(module, Layers)
        members = torch.tensor(group.columns[name]).repeat_interleave(layer.taps)
        units = members[members >= 0].unique()
        blocks = tuple((members == unit).nonzero().flatten() for unit in units)
        seen = statistics.layers[name]
        return cls(
            outputs_first(module).detach().float().flatten(1),
            seen.covariance.float(),
            seen.fisher.float(),
            units,
            blocks,
        )

    def errors(self, order: Tensor) -> Tensor:
        """Return the Fisher-weighted output error [units + 1] left by keeping the first 0, 1, … units of an ordering.

        The weights kept take their least-squares update, and the error is that under the damped H, which the update minimises. With the
        columns in that order and H = L L^T, it is the part of W L that lies beyond the columns kept: one factorisation serves all widths.
        """
        by_unit = dict(zip(self.units.tolist(), self.blocks, strict=True))
        blocks = [by_unit.get(unit, self.units[:0]) for unit in order.tolist()]
        stays = torch.ones(self.weight.shape[1], dtype=torch.bool)
        stays[torch.cat(blocks)] = False
        columns = torch.cat([stays.nonzero().flatten(), *blocks])
        h = chosen(damped(self.covariance), columns)
        root = h.sqrt() if h.dim() == 1 else cholesky(h)
        lost = times(self.weight[:, columns], root).square_().T @ self.fisher
        lost = lost.double()
        beyond = torch.cat([lost.flip(0).cumsum(0).flip(0), lost.new_zeros(1)])  # the sum over the columns from each on
        sizes = torch.tensor([int(stays.sum()), *map(len, blocks)])
        return beyond[sizes.cumsum(0)]


class _Independent:
    """`_Obs` where H is its diagonal: no removal changes another unit's saliency."""

    def __init__(self, reader: Reader) -> None:
        own = (reader.weight.square() * damped(reader.covariance)).T @ reader.fisher
        self.units, self.saliency = reader.units, torch.stack([own[block].sum() for block in reader.blocks])

    def add_saliency(self, total: Tensor) -> None:
        total[self.units] += self.saliency

    def remove(self, units: Tensor) -> None:
        pass


class _Obs:
    """OBS state of one reader: weights, and H^-1 of the columns still there."""

    def __init__(self, reader: Reader) -> None:
        self.fisher = reader.fisher
        self.weight = reader.weight.clone()
        self.inverse = torch.cholesky_inverse(cholesky(damped(reader.covariance)))
        self.left = torch.ones(self.weight.shape[1], dtype=torch.bool)
        sizes = {len(block) for block in reader.blocks}
        self.kinds: list[tuple[Tensor, Tensor]] = []  # units of one size, and the positions of their columns
        for size in sorted(sizes):
            alike = [index for index, block in enumerate(reader.blocks) if len(block) == size]
            self.kinds.append((reader.units[alike], torch.stack([reader.blocks[index] for index in alike])))

    def add_saliency(self, total: Tensor) -> None:
        """Add, for each unit u left, sum_o F_o W_ou (H^-1_uu)^-1 W_ou^T."""
        weighted = self.weight * self.fisher.sqrt()[:, None]
        for units, places in self.kinds:
            diagonal = self.inverse[places[:, :, None], places[:, None, :]]
            weights = weighted[:, places].permute(1, 2, 0)
            solved = torch.linalg.solve(diagonal, weights)
            total[units] += (weights * solved).sum((1, 2))

    def remove(self, units: Tensor) -> None:
        """Remove units and update what remains; what is left of the removed columns means nothing and is read no more."""
        removed = [places[torch.isin(members, units)].flatten() for members, places in self.kinds]
        gone = torch.cat(removed) if removed else self.left.nonzero().flatten()[:0]
        if not len(gone):
            return
        across = self.inverse[gone]
        solved = torch.linalg.solve(across[:, gone], across)
        self.weight.addmm_(self.weight[:, gone], solved, alpha=-1)
        self.inverse.addmm_(across.T, solved, alpha=-1)
        self.left[gone] = False
        there = [~torch.isin(members, units) for members, _ in self.kinds]
        self.kinds = [(m[k], p[k]) for (m, p), k in zip(self.kinds, there, strict=True) if bool(k.any())]
        if float(self.left.double().mean()) < SHRUNK:
            self._shrink()

    def _shrink(self) -> None:
        places, columns = self.left.cumsum(0) - 1, self.left.nonzero().flatten()
        self.weight, self.inverse = self.weight[:, columns], self.inverse[columns][:, columns]
        self.kinds = [(members, places[positions]) for members, positions in self.kinds]
        self.left = torch.ones(len(columns), dtype=torch.bool)


def l1_orders(model: nn.Module, graph: Graph, space: Space) -> dict[str, tuple[Tensor, str]]:
    """Order every group by the L1 norm alone, as the classic recipe does (Li et al. 2017, arXiv:1608.08710)."""
    orders = {}
    for name, group in graph.groups.items():
        order = norm_order(model, graph, group, 1) if group.prunable else torch.arange(group.width)
        counts = space.counts.get(name)
        orders[name] = (by_segment(order, group.segments, counts) if counts and group.prunable else order, "l1")
    return orders


def order_groups(
    model: nn.Module, graph: Graph, statistics: Statistics, space: Space, workers: int = 1
) -> dict[str, tuple[Tensor, str]]:
    """Order every group, see `order_group`, in so many processes; a group that offers one width keeps its own order."""

    def order(name: str) -> tuple[list[int], str]:
        found, by = order_group(
            model, graph, statistics, graph.groups[name], space.widths[name], space.counts.get(name)
        )
        return found.tolist(), by  # a tensor would be sent through shared memory

    columns = {name: sum(graph.layers[c].in_channels for c in group.consumers) for name, group in graph.groups.items()}
    names = sorted(graph.groups, key=lambda name: -columns[name])  # the dearest first
    found = dict(zip(names, map_in_processes(order, names, workers), strict=True))
    return {name: (torch.tensor(found[name][0]), found[name][1]) for name in graph.groups}
