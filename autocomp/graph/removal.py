"""Units of a group taken out of a model, hidden from their readers, or put in another order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.graph.graph import Group, kept_places
from autocomp.graph.program import tensor_at
from autocomp.layers.convolution import Layers, outputs_first
from autocomp.layers.narrow import take, with_weights


@dataclass(frozen=True)
class Changes:
    """What a model without some units has instead: modules and bare tensors by name, and smaller sizes."""

    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, Tensor]
    sizes: Mapping[str, int]  # by how much each becomes less

    def apply(self, model: nn.Module) -> None:
        """Set everything in place."""
        for name, module in self.modules.items():
            model.set_submodule(name, module)
        for path, tensor in self.tensors.items():
            owner, _, name = path.rpartition(".")
            holder = model.get_submodule(owner)
            tensors: dict[str, Any] = holder._parameters if name in holder._parameters else holder._buffers
            tensors[name] = tensor
        for name, less in self.sizes.items():
            model.sizes[name] -= less  # type: ignore[index, operator]


def narrowed(model: nn.Module, group: Group, kept: Tensor) -> Changes:
    """What ``model`` has instead when the group keeps the units ``kept``: norms, bare tensors and sizes, no layers."""
    modules = {name: take(model.get_submodule(name), group.rows_kept(name, kept)) for name in group.norms}
    tensors: dict[str, Tensor] = {}
    for path, axis, units in group.slabs:
        old = tensors[path] if path in tensors else tensor_at(model, path)
        new = old.detach().index_select(axis, kept_places(units, kept, group.width))
        tensors[path] = _like(old, new)
    sizes = {}
    for name, value, units in group.counts:  # N * heads counts each head N times
        sizes[name] = value - value * len(kept_places(units, kept, group.width)) // len(units)
    return Changes(modules, tensors, sizes)


def removed(model: nn.Module, group: Group, kept: Tensor) -> Changes:
    """As `narrowed`, and the layers too: what plain removal, without any update of weights, leaves of the model."""
    changes = narrowed(model, group, kept)
    modules = dict(changes.modules)
    for name in dict.fromkeys((*group.producers, *group.consumers)):
        rows = group.rows_kept(name, kept) if name in group.producers else None
        columns = group.columns_kept(name, kept) if name in group.consumers else None
        modules[name] = take(model.get_submodule(name), rows, columns)
    return replace(changes, modules=modules)


def masked(model: nn.Module, group: Group, kept: Tensor) -> Changes:
    """The consumers with zeros for the columns of the units that are not kept: the full-size model that ignores them."""
    modules = {}
    for name in group.consumers:
        module = model.get_submodule(name)
        columns = group.columns_kept(name, kept)
        assert isinstance(module, Layers)
        old = outputs_first(module).detach()
        weight = torch.zeros_like(old)
        weight[:, columns] = old[:, columns]
        modules[name] = with_weights(module, weight, module.bias)
    return Changes(modules, {}, {})


def reordered(model: nn.Module, group: Group, order: Sequence[int]) -> Changes:
    """What ``model`` has instead when unit ``order[u]`` stands where unit ``u`` stood; both are of one segment."""

    def places(units: Sequence[int]) -> Tensor:
        own: dict[int, list[int]] = {}
        for place, unit in enumerate(units):
            own.setdefault(unit, []).append(place)
        result = list(range(len(units)))
        for unit, other in enumerate(order):
            for place, source in zip(own.get(unit, ()), own.get(other, ()), strict=True):
                result[place] = source
        return torch.tensor(result)

    modules = {}
    for name in dict.fromkeys((*group.norms, *group.producers, *group.consumers)):
        rows = places(group.rows[name]) if name in group.rows else None
        columns = places(group.columns[name]) if name in group.consumers else None
        modules[name] = take(model.get_submodule(name), rows, columns)
    tensors: dict[str, Tensor] = {}
    for path, axis, units in group.slabs:
        old = tensors[path] if path in tensors else tensor_at(model, path)
        tensors[path] = _like(old, old.detach().index_select(axis, places(units)))
    return Changes(modules, tensors, {})


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


@contextlib.contextmanager
def swapped(model: nn.Module, changes: Changes) -> Iterator[None]:
    """Apply changes for a while."""
    before = Changes(
        {name: model.get_submodule(name) for name in changes.modules},
        {path: tensor_at(model, path) for path in changes.tensors},
        {name: -less for name, less in changes.sizes.items()},
    )
    try:
        changes.apply(model)
        yield
    finally:
        before.apply(model)
