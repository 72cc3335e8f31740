"""Structured pruning: which channels to keep, and the least-squares update of the layers that read them.

Removal is physical: `take` returns smaller modules. A group's ordering is nested: the channels kept at a smaller width
are a subset of those kept at a larger one. Two orderings are made for each group, by L1 norm of the weights and by OBS
saliency against the calibration Hessian (Hassibi & Stork 1993; one structured block at a time as in ZipLM,
arXiv:2302.04089), and the one with the smaller error in the consuming layers is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from autocomp.accuracy.calibrate import Statistics
    from autocomp.graph import Graph, Group

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
    """Return the channels kept at a width, in ascending order, given the group's channels best first."""
    return order[:width].sort().values


def order_group(
    model: nn.Module, graph: Graph, statistics: Statistics, group: Group, widths: Sequence[int]
) -> tuple[Tensor, str]:
    """Return a group's channels best first, and the ordering that won: ``l1`` or ``obs``.

    Both are judged by the Fisher-weighted error they leave in the consumers after the least-squares update, as the mean
    over ``widths`` of its logarithm.
    """
    readers = [_Reader(model, graph, statistics, name) for name in group.consumers]
    narrow = [width for width in widths if width < group.width]
    if not narrow:
        return torch.arange(group.width), "l1"
    orders = {"l1": l1_order(model, graph, group), "obs": obs_order(readers, group.width, min(narrow))}
    scores = {}
    for name, order in orders.items():
        errors = [sum(reader.error(keep(order, width)) for reader in readers) for width in narrow]
        scores[name] = sum(torch.tensor(errors, dtype=torch.float64).clamp_min(1e-30).log().tolist())
    best = min(scores, key=scores.__getitem__)
    return orders[best], best


def l1_order(model: nn.Module, graph: Graph, group: Group) -> Tensor:
    """Return channels by the L1 norm of the filters that make them, BatchNorm folded in, summed over the producers."""
    from autocomp.compress.fold import affine

    norm = torch.zeros(group.width, dtype=torch.float64)
    for name in group.producers:
        layer, module = graph.layers[name], model.get_submodule(name)
        assert isinstance(module, nn.Conv2d | nn.Linear)
        size = module.weight.detach().double().flatten(1).abs().sum(1)
        after = model.get_submodule(layer.norm) if layer.norm is not None else None
        if isinstance(after, nn.BatchNorm1d | nn.BatchNorm2d) and after.running_mean is not None:
            size = size * affine(after)[0].abs()
        norm += size
    return norm.argsort(descending=True, stable=True)


def obs_order(readers: Sequence[_Reader], width: int, narrowest: int) -> Tensor:
    """Return channels best first, removed one by one (or a few, see `STEPS`) by the least OBS saliency of all readers.

    After each removal the readers' weights take their least-squares update and the saliencies are computed anew, down
    to ``narrowest`` channels; those that are left are ordered by their last saliency.
    """
    states = [_Obs(reader) for reader in readers]
    alive = torch.arange(width)
    removed: list[Tensor] = []
    step = -(-(width - narrowest) // STEPS)
    while len(alive) > narrowest:
        saliency = torch.stack([state.saliency() for state in states]).sum(0)
        count = min(step, len(alive) - narrowest)
        ranked = saliency.argsort(stable=True)
        gone, left = ranked[:count], ranked[count:].sort().values
        removed.append(alive[gone])
        for state in states:
            state.remove(gone, left)
        alive = alive[left]
    saliency = torch.stack([state.saliency() for state in states]).sum(0)
    removed.append(alive[saliency.argsort(stable=True)])
    return torch.cat(removed).flip(0)


class _Reader:
    """A layer that reads the group: its weights as a matrix with ``block`` columns for each channel of the group."""

    def __init__(self, model: nn.Module, graph: Graph, statistics: Statistics, name: str) -> None:
        layer, module = graph.layers[name], model.get_submodule(name)
        assert isinstance(module, nn.Conv2d | nn.Linear)
        self.weight = module.weight.detach().double().flatten(1)
        self.covariance = statistics.layers[name].covariance
        self.fisher = statistics.layers[name].fisher
        self.block = layer.in_spread * layer.kernel[0] * layer.kernel[1]

    def error(self, kept: Tensor) -> float:
        columns = spread(kept, self.block)
        difference = self.weight.clone()
        difference[:, columns] -= least_squares(self.weight, self.covariance, columns)
        return float((output_error(difference, self.covariance) * self.fisher).sum())


class _Obs:
    """OBS state of one reader: weights, and H^-1 of the columns still there."""

    def __init__(self, reader: _Reader) -> None:
        self.block, self.fisher = reader.block, reader.fisher
        self.weight = reader.weight.clone()
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(reader.covariance)))

    def saliency(self) -> Tensor:
        """Return, for each channel left, sum_o F_o W_oc (H^-1_cc)^-1 W_oc^T."""
        channels = self.weight.shape[1] // self.block
        blocks = self.inverse.view(channels, self.block, channels, self.block)
        diagonal = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        weights = self.weight.view(-1, channels, self.block).permute(1, 0, 2) * self.fisher.sqrt()[:, None]
        solved = torch.linalg.solve(diagonal, weights.transpose(1, 2))
        return (weights.transpose(1, 2) * solved).sum((1, 2))

    def remove(self, gone: Tensor, left: Tensor) -> None:
        """Remove channels (positions among those left) and update what remains."""
        gone, left = spread(gone, self.block), spread(left, self.block)
        across = self.inverse[gone][:, left]
        solved = torch.linalg.solve(self.inverse[gone][:, gone], across)
        self.weight = self.weight[:, left] - self.weight[:, gone] @ solved
        self.inverse = self.inverse[left][:, left] - across.T @ solved


def order_groups(
    model: nn.Module, graph: Graph, statistics: Statistics, widths: Mapping[str, Sequence[int]]
) -> dict[str, tuple[Tensor, str]]:
    """Order every group, see `order_group`; a group that offers one width keeps its own order."""
    return {
        group.name: order_group(model, graph, statistics, group, widths.get(group.name, ()))
        for group in graph.groups.values()
    }
