"""Structured pruning: which channels to keep, and the least-squares update of the layers that read them.

Removal is physical: `take` returns smaller modules. A group's ordering is nested: the units (channels, heads) kept at a
smaller width are a subset of those kept at a larger one. Four orderings are made for each group, by L1 and by L2 norm of
the weights that make a unit, by L2 norm of its feature maps, and by OBS saliency against the calibration Hessian (Hassibi &
Stork 1993; one structured block at a time as in ZipLM, arXiv:2302.04089), and the one with the smallest error in the
consuming layers, their weights updated, is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from autocomp.accuracy.calibrate import Statistics
    from autocomp.graph import Graph
    from autocomp.groups import Group
    from autocomp.space import Space

ORDERINGS = ("l1", "l2", "map", "obs")

Layers = (nn.Conv1d, nn.Conv2d, nn.Linear)
AnyLayer = nn.Conv1d | nn.Conv2d | nn.Linear

DAMPING = 1e-2  # of the mean diagonal of H, added to the diagonal: as in GPTQ (arXiv:2210.17323, section 3.3)
STEPS = 128  # removals a group at most; wider groups lose several channels between two updates of H^-1


def take(module: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Module:
    """Return a smaller copy that keeps the output channels ``rows`` and the input columns ``columns`` (None keeps all).

    Conv1d, Conv2d (``columns`` are input channels; a grouped one takes the ``rows`` of whole groups only), Linear and
    BatchNorm. The copy has its own weights. TypeError for any other module.
    """
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return _take_norm(module, rows)
    if not isinstance(module, Layers):
        raise TypeError(f"cannot take channels of a {type(module).__name__}")
    weight, bias = module.weight.detach(), module.bias
    if rows is not None:
        weight = weight[rows]
        bias = None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    return with_weights(module, weight.clone(), None if bias is None else bias.detach().clone())


def with_weights(module: AnyLayer, weight: Tensor, bias: Tensor | None) -> AnyLayer:
    """Return a module like ``module`` but with these weights, whose shape sets its channels.

    The weights of a Conv1d may come with the height of 1 that its description has: [O, I, 1, K].
    """
    small: AnyLayer
    if isinstance(module, nn.Linear):
        small = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        groups = weight.shape[0] * module.groups // module.out_channels if module.groups > 1 else 1
        if isinstance(module, nn.Conv1d) and weight.dim() == 4:
            weight = weight.squeeze(2)
        small = type(module)(
            weight.shape[1] * groups,
            weight.shape[0],
            module.kernel_size,  # type: ignore[arg-type]  # torch types it as a tuple of any length
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            groups,
            bias is not None,
            module.padding_mode,
            device="meta",
        )
    small.weight = nn.Parameter(weight)
    small.bias = None if bias is None else nn.Parameter(bias)
    return small.train(module.training)


def _take_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, rows: Tensor | None) -> nn.Module:
    keep = torch.arange(norm.num_features) if rows is None else rows
    small = type(norm)(len(keep), norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name in ("weight", "bias"):
        values = getattr(norm, name)
        if values is not None:
            setattr(small, name, nn.Parameter(values.detach()[keep].clone()))
    for name in ("running_mean", "running_var"):
        values = getattr(norm, name)
        if values is not None:
            setattr(small, name, values[keep].clone())
    return small.train(norm.training)


def spread(channels: Tensor, times: int) -> Tensor:
    """Return the columns of ``channels`` where each channel stands for ``times`` neighbouring columns."""
    if times == 1:
        return channels
    return (channels[:, None] * times + torch.arange(times)).flatten()


def damped(covariance: Tensor) -> Tensor:
    """Return H with `DAMPING` times its mean diagonal added to the diagonal, so that it can be inverted."""
    added = DAMPING * float(covariance.diagonal(dim1=-2, dim2=-1).mean())
    added = added if added > 0 else 1.0  # an input that never changes: any H will do
    return covariance + added * torch.eye(covariance.shape[-1], dtype=covariance.dtype)


def least_squares(weight: Tensor, covariance: Tensor, columns: Tensor) -> Tensor:
    """Return the weights [O, kept columns] of the kept inputs that best reproduce ``weight`` [O, K] on all inputs.

    They minimise tr((W - W'S) H (W - W'S)^T) for the damped H, which pulls them towards the weights they had.
    """
    h = damped(covariance)
    kept = h[columns][:, columns]
    return torch.cholesky_solve(h[columns] @ weight.T, torch.linalg.cholesky(kept)).T


def output_error(difference: Tensor, covariance: Tensor) -> Tensor:
    """Return dW_o H dW_o^T of every output [O]: the mean squared error at one position, of rows [O, K] of dW."""
    return ((difference @ covariance) * difference).sum(1).clamp_min(0.0)


def keep(order: Tensor, width: int) -> Tensor:
    """Return the units kept at a width, in ascending order, given the group's units best first."""
    return order[:width].sort().values


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
    narrow = [width for width in widths if width < group.width]
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
    known: dict[tuple[int, ...], float] = {}
    for name, order in orders.items():
        orders[name] = order = by_segment(order, group.segments, counts) if counts else order
        total = 0.0
        for width in narrow:
            kept = keep(order, width)
            key = tuple(kept.tolist())
            if key not in known:
                known[key] = sum(reader.error(kept) for reader in readers)
            total += math.log(max(known[key], 1e-30))
        scores[name] = total
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
    from autocomp.compress.fold import affine

    norm = torch.zeros(group.width, dtype=torch.float64)
    for name in group.producers:
        layer, module = graph.layers[name], model.get_submodule(name)
        assert isinstance(module, Layers)
        size = module.weight.detach().double().flatten(1).abs().pow(power).sum(1)
        after = model.get_submodule(layer.norm) if layer.norm is not None else None
        if isinstance(after, nn.BatchNorm1d | nn.BatchNorm2d) and after.running_mean is not None:
            size = size * affine(after)[0].abs().pow(power)
        units = torch.tensor(group.rows[name])
        norm.index_add_(0, units[units >= 0], size[units >= 0])
    return norm


def map_order(statistics: Statistics, graph: Graph, group: Group) -> Tensor:
    """Return units by the L2 norm of their feature maps, as their consumers see them, added up over the consumers."""
    norm = torch.zeros(group.width, dtype=torch.float64)
    for name in group.consumers:
        seen = statistics.layers[name]
        squares = seen.covariance.diagonal() + seen.mean.square()
        units = torch.tensor(group.columns[name])
        norm.index_add_(0, units[units >= 0], squares.view(len(units), -1).mean(1)[units >= 0])
    return norm.argsort(descending=True, stable=True)


def obs_order(readers: Sequence[Reader], width: int, narrowest: int) -> Tensor:
    """Return units best first, removed one by one (or a few, see `STEPS`) by the least OBS saliency of all readers.

    After each removal the readers' weights take their least-squares update and the saliencies are computed anew, down
    to ``narrowest`` units; those that are left are ordered by their last saliency.
    """
    states = [_Obs(reader) for reader in readers]
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
    in no block are of columns that always stay.
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
        taps = layer.kernel[0] * layer.kernel[1]
        members = torch.tensor(group.columns[name]).repeat_interleave(taps)
        units = members[members >= 0].unique()
        blocks = tuple((members == unit).nonzero().flatten() for unit in units)
        seen = statistics.layers[name]
        return cls(module.weight.detach().double().flatten(1), seen.covariance, seen.fisher, units, blocks)

    def error(self, kept: Tensor) -> float:
        """Return the Fisher-weighted output error that is left when the units ``kept`` are, after the update."""
        gone = [block for unit, block in zip(self.units, self.blocks, strict=True) if not bool((kept == unit).any())]
        if not gone:
            return 0.0
        stays = torch.ones(self.weight.shape[1], dtype=torch.bool)
        stays[torch.cat(gone)] = False
        columns = stays.nonzero().flatten()
        difference = self.weight.clone()
        difference[:, columns] -= least_squares(self.weight, self.covariance, columns)
        return float((output_error(difference, self.covariance) * self.fisher).sum())


class _Obs:
    """OBS state of one reader: weights, and H^-1 of the columns still there."""

    def __init__(self, reader: Reader) -> None:
        self.fisher = reader.fisher
        self.weight = reader.weight.clone()
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(reader.covariance)))
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
        """Remove units and update what remains."""
        stays = torch.ones(self.weight.shape[1], dtype=torch.bool)
        for members, places in self.kinds:
            stays[places[torch.isin(members, units)].flatten()] = False
        gone, left = (~stays).nonzero().flatten(), stays.nonzero().flatten()
        if not len(gone):
            return
        across = self.inverse[gone][:, left]
        solved = torch.linalg.solve(self.inverse[gone][:, gone], across)
        self.weight = self.weight[:, left] - self.weight[:, gone] @ solved
        self.inverse = self.inverse[left][:, left] - across.T @ solved
        place = stays.cumsum(0) - 1
        there = [~torch.isin(members, units) for members, _ in self.kinds]
        self.kinds = [(m[k], place[p[k]]) for (m, p), k in zip(self.kinds, there, strict=True) if bool(k.any())]


def l1_orders(model: nn.Module, graph: Graph, space: Space) -> dict[str, tuple[Tensor, str]]:
    """Order every group by the L1 norm alone, as the classic recipe does (Li et al. 2017, arXiv:1608.08710)."""
    orders = {}
    for name, group in graph.groups.items():
        order = norm_order(model, graph, group, 1) if group.prunable else torch.arange(group.width)
        counts = space.counts.get(name)
        orders[name] = (by_segment(order, group.segments, counts) if counts and group.prunable else order, "l1")
    return orders


def order_groups(model: nn.Module, graph: Graph, statistics: Statistics, space: Space) -> dict[str, tuple[Tensor, str]]:
    """Order every group, see `order_group`; a group that offers one width keeps its own order."""
    return {
        name: order_group(model, graph, statistics, group, space.widths[name], space.counts.get(name))
        for name, group in graph.groups.items()
    }
