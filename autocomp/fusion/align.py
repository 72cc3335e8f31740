"""The channels of one model put in the order of another's, so that what is alike stands in the same places.

Networks that were trained apart may compute the same in another order of their channels. Weight matching takes one group of channels after
the other, orders it as suits the weights on both sides of it best while the others stay, and goes on until nothing changes (Ainsworth et al.,
Git Re-Basin, 2023, algorithm 1, https://arxiv.org/abs/2209.04836). Which channels go together is known from the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from autocomp.graph.graph import Graph, Group
from autocomp.graph.program import tensor_at, tensors_of
from autocomp.layers.convolution import AnyLayer, Layers, Transposed, outputs_first, turned
from autocomp.layers.narrow import Norms

ROUNDS = 20  # through all groups at most; a handful is usual
SAME = 1e-3  # of the outputs' range: a model in another order computes the same but for rounding


def aligned(model: nn.Module, like: nn.Module, graph: Graph, inputs: tuple[Tensor, ...]) -> nn.Module:
    """A copy of ``model``, which computes the same, with its channels in the order of ``like``'s, and the scale of each that a norm takes away.

    Both are of the architecture that ``graph`` describes. Groups whose channels cannot be told apart one by one keep their order.
    """
    found = copy.deepcopy(model)
    for group in _ordered(found, like, [group for group in graph.groups.values() if movable(group)]):
        before = copy.deepcopy(found)
        _apply(found, *group)
        if not _same(before, found, inputs):  # something reads the channels that the graph does not know of
            found = before
    before = copy.deepcopy(found)
    for layer, norm in graph.norms().items():
        if graph.layers[layer].calls == 1:
            _rescale(found.get_submodule(layer), found.get_submodule(norm), like.get_submodule(layer))
    return found if _same(before, found, inputs) else before


def movable(group: Group) -> bool:
    """Whether a group's units may change their places without changing what is computed."""
    return group.prunable and not group.approximate


def _ordered(model: nn.Module, like: nn.Module, groups: list[Group]) -> list[tuple[Group, list[int]]]:
    """For each group that is to change, which of the model's units takes each place; found on a copy, group after group."""
    tried, orders = copy.deepcopy(model), {group.name: list(range(group.width)) for group in groups}
    for _ in range(ROUNDS):
        changed = False
        for group in groups:
            order = _best(group, tried, like)
            if order is not None and order != list(range(group.width)):
                _apply(tried, group, order)
                orders[group.name] = [orders[group.name][unit] for unit in order]
                changed = True
        if not changed:
            break
    return [(group, orders[group.name]) for group in groups if orders[group.name] != sorted(orders[group.name])]


def _best(group: Group, model: nn.Module, like: nn.Module) -> list[int] | None:
    """The unit of ``model`` for each place of ``like`` that makes the sum of products of their weights largest; None where units are unlike."""
    gain = torch.zeros(group.width, group.width, dtype=torch.float64)
    for (units, ours), (_, theirs) in zip(_held(group, model), _held(group, like), strict=True):
        places = _places(units, group.width)
        if len({len(at) for at in places}) != 1:
            return None
        if places[0] and ours.shape == theirs.shape:  # heads of other sizes say nothing
            index = torch.tensor(places)
            # scaled, so that a layer counts by how alike its channels are, not by how large
            a, b = (_unit(x.double()[index].flatten(1)) for x in (theirs, ours))
            gain += a @ b.T
    order = list(range(group.width))
    for segment in set(group.segments):
        members = [unit for unit, of in enumerate(group.segments) if of == segment]
        block = gain[members][:, members].numpy()
        rows, columns = linear_sum_assignment(block, maximize=True)
        if block[rows, columns].sum() > np.trace(block) * (1 + 1e-6) + 1e-9:
            for row, column in zip(rows, columns, strict=True):
                order[members[row]] = members[column]
    return order


def _unit(rows: Tensor) -> Tensor:
    found: Tensor = rows / rows.norm().clamp_min(1e-12)
    return found


def _held(group: Group, model: nn.Module) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The tensors that hold a group's units, each with the unit of its first axis; what norms hold says little."""
    for name, units in group.rows.items():
        module = model.get_submodule(name)
        if isinstance(module, Layers):
            yield units, outputs_first(module).detach().flatten(1)
    for name, units in group.columns.items():
        module = model.get_submodule(name)
        if isinstance(module, Layers) and getattr(module, "groups", 1) == 1:
            yield units, outputs_first(module).detach().transpose(0, 1).flatten(1)


def _places(units: tuple[int, ...], width: int) -> list[list[int]]:
    """Where each unit lies, in order."""
    found: list[list[int]] = [[] for _ in range(width)]
    for place, unit in enumerate(units):
        if unit >= 0:
            found[unit].append(place)
    return found


def _index(units: tuple[int, ...], order: list[int]) -> Tensor:
    """What stands at each place once the units are in another order."""
    places, index = _places(units, len(order)), list(range(len(units)))
    for unit, source in enumerate(order):
        for place, origin in zip(places[unit], places[source], strict=True):
            index[place] = origin
    return torch.tensor(index)


def _apply(model: nn.Module, group: Group, order: list[int]) -> None:
    """Put a group's units into another order, in place."""
    with torch.no_grad():
        for name, units in group.rows.items():
            module, index = model.get_submodule(name), _index(units, order)
            if isinstance(module, Layers):
                set_weight(module, outputs_first(module)[index])
                if module.bias is not None:
                    module.bias.copy_(module.bias[index].clone())
            elif isinstance(module, Norms):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    if tensor is not None:
                        tensor.copy_(tensor[index].clone())
        for name, units in group.columns.items():
            module = model.get_submodule(name)
            if isinstance(module, Layers) and getattr(module, "groups", 1) == 1:
                set_weight(module, outputs_first(module)[:, _index(units, order)])
        for slab in group.slabs:
            tensor = tensor_at(model, slab.path)
            tensor.copy_(tensor.index_select(slab.axis, _index(slab.units, order)).clone())


def set_weight(layer: AnyLayer, weight: Tensor) -> None:
    """Write a weight, outputs first, into a layer."""
    with torch.no_grad():
        layer.weight.copy_(turned(weight, layer.groups) if isinstance(layer, Transposed) else weight.clone())


def _rescale(layer: nn.Module, norm: nn.Module, like: nn.Module) -> None:
    """Give each output channel's weights the length of ``like``'s: BatchNorm takes it away again, its statistics being scaled too."""
    if not isinstance(layer, Layers) or not isinstance(norm, Norms) or norm.running_mean is None:
        return
    assert isinstance(like, Layers)
    assert norm.running_var is not None
    ours, theirs = (outputs_first(one).detach().flatten(1).norm(dim=1) for one in (layer, like))
    factor = torch.where((ours > 1e-6) & (theirs > 1e-6), theirs / ours.clamp_min(1e-12), torch.ones_like(ours))
    with torch.no_grad():
        weight = outputs_first(layer)
        set_weight(layer, weight * factor.view(-1, *[1] * (weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(factor)
        norm.running_mean.mul_(factor)
        norm.running_var.mul_(factor.square())


def _same(first: nn.Module, second: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    with torch.no_grad():
        pairs = zip(tensors_of(first(*inputs)), tensors_of(second(*inputs)), strict=True)
        return all(float((a - b).abs().max()) <= SAME * float((a.amax() - a.amin()).clamp_min(1e-6)) for a, b in pairs)
