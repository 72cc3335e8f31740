"""Channels that are chosen while a model trains: it begins with all of them, and those with the largest feature maps stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from autocomp.errors import UsageError
from autocomp.graph.graph import Graph, Group, Layer
from autocomp.graph.removal import removed
from autocomp.layers.convolution import Convolutions, Layers, Transposed, outputs_first
from autocomp.layers.hooks import hooked
from autocomp.recovery.forms.form import Training
from autocomp.recovery.forms.whole import trainable
from autocomp.recovery.losses import shared_layers

REFRESHED = 8  # times that channels are chosen anew: every five passes of a training of forty
SETTLED = 0.75  # of the stages, after which the choice stays. Both after the seed text's schedule, not measured


@dataclass(frozen=True)
class Wide:
    """A candidate before its channels are chosen: the uncompressed ``model``, and how many units of each segment each group keeps."""

    model: nn.Module
    graph: Graph
    units: Mapping[str, tuple[int, ...]]  # by group, one number for each of its segments
    met: frozenset[str] = frozenset()  # groups of whose channels constants stand for branches that were left out

    @cached_property
    def groups(self) -> list[Group]:
        """Those that lose units, with the norms, bare tensors and sizes that the model has: branches that were left out took theirs along."""
        held = {*(name for name, _ in self.model.named_modules()), *self.model.state_dict()}
        sizes = getattr(self.model, "sizes", {})
        return [
            replace(
                g,
                norms=tuple(name for name in g.norms if name in held),
                slabs=tuple(slab for slab in g.slabs if slab.path in held),
                counts=tuple(count for count in g.counts if count.name in sizes),
            )
            for g in self.graph.groups.values()
            if g.name in self.units and sum(self.units[g.name]) < g.width
        ]


class Channels:
    """The channels of a model under training. ``form`` trains, with all of them; what is not kept is hidden from its readers."""

    def __init__(self, wide: Wide) -> None:
        self.wide, self.form = wide, trainable(wide.model)
        self.kept = {group.name: torch.arange(group.width) for group in wide.groups}
        self.energy = {group.name: torch.zeros(group.width) for group in wide.groups}
        self.turn = -1

    def due(self, along: float) -> bool:
        """Whether channels are to be chosen anew at a share of the stages."""
        return min(REFRESHED, int(along / SETTLED * REFRESHED)) > self.turn

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take in how large each unit's feature map is, as its readers get it, while this is open."""
        handles = []
        for group in self.wide.groups:
            self.energy[group.name].zero_()
            handles += [self._watch(group, name) for name in group.consumers]
        with hooked(handles):
            yield

    def _watch(self, group: Group, name: str) -> torch.utils.hooks.RemovableHandle:
        module, units = self.form.get_submodule(name), torch.tensor(group.columns[name])

        def look(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            axis = 1 if isinstance(module, Convolutions) else -1
            squares = given[0].detach().movedim(axis, -1).flatten(0, -2).square().mean(0)
            squares = squares / squares.mean().clamp_min(1e-12)  # readers count alike, whatever their scale
            inside = units >= 0
            self.energy[group.name].index_add_(0, units[inside], squares[inside])

        return module.register_forward_pre_hook(look)

    def choose(self, along: float) -> None:
        """Keep fewer units of each segment, more slowly as it goes on (cubic: Zhu & Gupta 2017, arXiv:1710.01878): the largest feature maps."""
        self.turn = min(REFRESHED, int(along / SETTLED * REFRESHED))
        part = 1 - (1 - self.turn / REFRESHED) ** 3
        for group in self.wide.groups:
            segments, chosen = torch.tensor(group.segments), []
            for segment, (size, left) in enumerate(zip(group.sizes(), self.wide.units[group.name], strict=True)):
                members = (segments == segment).nonzero().flatten()
                count = size - round((size - left) * part)
                chosen.append(members[self.energy[group.name][members].topk(count).indices])
            self.kept[group.name] = torch.cat(chosen).sort().values
        self.apply()

    def apply(self) -> None:
        """Hide from its readers what is not kept."""
        with torch.no_grad():
            for group in self.wide.groups:
                for name in group.consumers:
                    module = self.form.get_submodule(name)
                    assert isinstance(module, Layers)
                    columns = torch.ones(len(group.columns[name]), dtype=torch.bool)
                    columns[group.columns_kept(name, self.kept[group.name])] = False
                    if isinstance(module, Transposed):
                        module.weight[columns] = 0.0
                    else:
                        module.weight[:, columns] = 0.0

    def into(self, form: nn.Module) -> None:
        """Hand what was learnt to the candidate's own form, in the channels that are left."""
        small = self.form
        for group in self.wide.groups:
            removed(small, group, self.kept[group.name]).apply(small)
        with torch.no_grad():
            for name in self.wide.graph.layers:
                _fill(name, form.get_submodule(name), small.get_submodule(name))
            ours, theirs = dict(form.named_parameters()) | dict(form.named_buffers()), small.state_dict()
            layers = tuple(f"{name}." for name in self.wide.graph.layers)
            for name, tensor in ours.items():
                if not name.startswith(layers) and name in theirs:
                    learnt = self._kept_of(theirs[name], tensor.shape)
                    if learnt.shape == tensor.shape:
                        tensor.copy_(learnt)

    def _kept_of(self, constant: Tensor, wanted: torch.Size) -> Tensor:
        """What stands for a branch, in the channels that are left: those of the one group that it may be of."""
        axes = [axis for axis in range(min(constant.ndim, len(wanted))) if constant.shape[axis] != wanted[axis]]
        sizes = [(constant.shape[axis], wanted[axis]) for axis in axes]
        fit = [
            g.name for g in self.wide.groups if g.name in self.wide.met and sizes == [(g.width, len(self.kept[g.name]))]
        ]
        return constant.index_select(axes[0], self.kept[fit[0]]) if len(fit) == 1 else constant

    def rows(self) -> dict[str, Tensor | None]:
        """By layer, the teacher's output channels that it has (None: all), as `losses.Features` takes them."""
        by_name = {group.name: group for group in self.wide.groups}

        def kept(layer: Layer) -> Tensor | None:
            group = by_name.get(layer.out_group or "")
            return None if group is None else group.rows_kept(layer.name, self.kept[group.name])

        return shared_layers(self.wide.graph, kept)


def unfit(model: nn.Module, graph: Graph) -> str:
    """The first layer of a compressed model that takes over no floats of its shape (factorised, in codebooks, in a loop); or empty."""
    form = trainable(model)
    return next((name for name in graph.layers if _floats(form.get_submodule(name)) is None), "")


def _floats(module: nn.Module) -> Tensor | None:
    """The weight that a layer is trained in, where that has the layer's own shape."""
    if isinstance(module, Layers):
        return module.weight
    latent = getattr(module, "latent", None)
    return latent if isinstance(module, Training) and isinstance(latent, Tensor) else None


def _fill(name: str, module: nn.Module, small: nn.Module) -> None:
    """Give a layer in its training form the floats of another of its shape."""
    assert isinstance(small, Layers)
    own, weight = (
        _floats(module),
        small.weight.detach() if isinstance(module, Layers) else outputs_first(small).detach(),
    )
    if own is None or own.numel() != weight.numel():
        raise UsageError(
            f"channels are chosen while training where layers are neither factorised nor in codebooks, and {name} is: "
            "use a recipe without channels: refreshed"
        )
    own.copy_(weight.reshape(own.shape))
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.copy_(small.bias if small.bias is not None else torch.zeros_like(bias))


def units_of(
    graph: Graph, widths: Mapping[str, int], counts: Mapping[str, Mapping[int, Sequence[int]]]
) -> dict[str, tuple[int, ...]]:
    """How many units of each segment the groups of a candidate keep."""
    return {
        name: tuple(counts[name][width]) if name in counts and width in counts[name] else (width,)
        for name, width in widths.items()
        if name in graph.groups
    }
