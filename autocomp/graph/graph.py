"""What a model is made of: its layers, their shapes, and the groups of channels that must go together."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["conv2d", "depthwise", "linear"]


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer. Sizes are (height, width), or (time, height, width); a linear layer over R rows has the size (1, R).

    ``in_group`` and ``out_group`` name the groups its input columns and output channels belong to (None: the model's
    input, or channels that stay; both are the same for a grouped convolution, depthwise or not, which loses whole
    groups). ``norm`` names the BatchNorm that alone reads the output. ``macs`` are of one call on
    the example inputs, ``calls`` how often one inference calls it; sizes are those of the first call, ``more`` has the (``in_size``,
    ``out_size``) of each further one.
    ``loop`` names the kind of recurrent layer whose recurrent weight it is, called once for each step.
    ``one_d`` is a convolution of [N, C, L], described as one over pictures a row high. ``output_padding`` is None unless it is
    transposed. ``fixed`` says why only fp32 at
    full rank is possible; empty otherwise.
    """

    name: str
    kind: Kind
    out_channels: int
    in_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    conv_groups: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    bias: bool
    macs: int
    in_group: str | None = None
    out_group: str | None = None
    norm: str | None = None
    fixed: str = ""
    one_d: bool = False
    calls: int = 1
    more: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    loop: str = ""
    output_padding: tuple[int, ...] | None = None

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return math.prod(self.kernel)

    @property
    def columns(self) -> int:
        """Weights of one output."""
        return self.in_channels // self.conv_groups * self.taps

    @property
    def each_call(self) -> list[Layer]:
        """The layer as it is in each call that differs from the others in its sizes alone; a loop over steps is one call."""
        sides = [(self.in_size, self.out_size), *self.more]
        areas = [
            math.prod(before if self.output_padding is not None else after) for before, after in sides
        ]  # what products grow with
        first = self if self.loop else replace(self, calls=1, more=())
        further = [
            replace(first, in_size=before, out_size=after, macs=self.macs * area // areas[0])
            for (before, after), area in zip(self.more, areas[1:], strict=True)
        ]
        return [first, *further]

    @property
    def total_macs(self) -> int:
        """Multiplications of all calls."""
        return self.macs * self.calls if self.loop else sum(call.macs for call in self.each_call)

    @property
    def is_plain(self) -> bool:
        """No convolution, or one of two dimensions (or one, as a row) that is not transposed."""
        return len(self.kernel) == 2 and self.output_padding is None

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.out_channels * (self.in_channels // self.conv_groups) * self.taps


@dataclass(frozen=True)
class Graph:
    """Layers and groups of a model by name, in the order of execution.

    ``other_bytes`` is the size of all parameters and buffers that belong to no layer and fold into none, at full width. ``skipped``
    says of other convolutions and linear layers why they are left alone. ``branches`` are those that can be left out whole, by the group
    that they end in, ``whole`` says of other groups why not.
    """

    layers: Mapping[str, Layer]
    groups: Mapping[str, Group]
    other_bytes: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)
    branches: Mapping[str, Branch] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)

    def without(self, ended: Iterable[str]) -> Graph:
        """The layers and groups that are left when the branches that end in these groups are left out."""
        branches = [self.branches[name] for name in ended]
        gone = {name for branch in branches for name in (*branch.ends, *branch.layers)}
        lost = {name for branch in branches for name in branch.groups}
        return replace(
            self,
            layers={name: layer for name, layer in self.layers.items() if name not in gone},
            groups={name: group.without(gone) for name, group in self.groups.items() if name not in lost},
            branches={name: branch for name, branch in self.branches.items() if name not in lost},
        )

    def norms(self) -> dict[str, str]:
        """Map layer to the BatchNorm that follows it: what `fold_batchnorm` takes."""
        return {layer.name: layer.norm for layer in self.layers.values() if layer.norm is not None}


@dataclass(frozen=True)
class Branch:
    """What goes when a group loses all its units. ``ends`` are the layers that read it: constants take their places. ``layers`` are those that
    nothing else needs, ``groups`` those that go with them, the group itself first."""

    ends: tuple[str, ...]
    layers: tuple[str, ...]
    groups: tuple[str, ...]


class Count(NamedTuple):
    """A number in the model's operations (`CanonicalModel.sizes`) that follows the units: of its elements, those of ``units``
    that are kept are left (-1: always)."""

    name: str
    value: int
    units: tuple[int, ...]


class Slab(NamedTuple):
    """A bare parameter or buffer that loses slices along ``axis``; ``units`` says whose each slice is (-1: stays)."""

    path: str
    axis: int
    units: tuple[int, ...]


class HeadProducts(NamedTuple):
    """A product of activations: for each unit of the group ``batch`` products of m x k by k x n."""

    batch: float
    m: int
    k: int
    n: int


@dataclass(frozen=True)
class Group:
    """Units that are kept or removed whole, ``width`` of them: channels, hidden units, heads.

    ``rows`` says for each output channel of a producer or norm, ``columns`` for each input column of a consumer (or of
    a grouped convolution), which unit it belongs to (-1: none, it always stays). ``producers`` are the layers whose
    output channels they are, in the order of execution (grouped convolutions that pass them on included), ``consumers``
    those that read them, ``norms`` the BatchNorms between, ``slabs`` the bare parameters and ``counts`` the numbers in
    operations that must follow. ``segments`` numbers the units by what they consist of: units of one segment are alike, and the
    same share of each segment is kept. ``attention`` are the products that become fewer with the units. The group is
    named after its first producer. ``reason`` says why a group that is not ``prunable`` must keep all its units, ``approximate`` which
    operation takes all units together (a norm over them): it is computed over those that are left, and so changes what they are.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    norms: tuple[str, ...] = ()
    prunable: bool = True
    reason: str = ""
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    slabs: tuple[Slab, ...] = ()
    counts: tuple[Count, ...] = ()
    segments: tuple[int, ...] = ()
    attention: tuple[HeadProducts, ...] = ()
    approximate: str = ""

    def rows_kept(self, name: str, kept: Tensor) -> Tensor:
        """Output channels of a producer or norm that are left when the units ``kept`` are."""
        return kept_places(self.rows[name], kept, self.width)

    def columns_kept(self, name: str, kept: Tensor) -> Tensor:
        """Input columns (channels of a convolution) of a layer that are left when the units ``kept`` are."""
        return kept_places(self.columns[name], kept, self.width)

    def without(self, layers: Collection[str]) -> Group:
        """The group where some layers are gone."""
        return replace(
            self,
            producers=tuple(name for name in self.producers if name not in layers),
            consumers=tuple(name for name in self.consumers if name not in layers),
            rows={name: units for name, units in self.rows.items() if name not in layers},
            columns={name: units for name, units in self.columns.items() if name not in layers},
        )

    def sizes(self) -> tuple[int, ...]:
        """Number of units of each segment."""
        return tuple(self.segments.count(segment) for segment in range(max(self.segments, default=-1) + 1))

    def per_unit(self, units: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """How many of these rows or columns always stay, and how many each unit of a segment has."""
        counts = [0] * len(self.sizes())
        for unit in units:
            if unit >= 0:
                counts[self.segments[unit]] += 1
        return sum(unit < 0 for unit in units), tuple(c // n for c, n in zip(counts, self.sizes(), strict=True))


def balanced(group: Group, count: int, generator: torch.Generator) -> Tensor:
    """About ``count`` units drawn at random, ascending: the same share of every segment, and at least one of each.

    Halves that a model takes apart by their number (`chunk`) stay equal in this way.
    """
    segments = torch.tensor(group.segments)
    chosen = []
    for segment, size in enumerate(group.sizes()):
        members = (segments == segment).nonzero().flatten()
        chosen.append(members[torch.randperm(size, generator=generator)[: max(1, size * count // group.width)]])
    return torch.cat(chosen).sort().values


def kept_places(units: Sequence[int], kept: Tensor, width: int) -> Tensor:
    stays = torch.zeros(width + 1, dtype=torch.bool)
    stays[kept] = True
    stays[width] = True  # what -1 points to
    return stays[torch.tensor(units)].nonzero().flatten()
