"""Which compressions of which layer are legal and worth offering: a search-space file x a graph x a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from autocomp.graph.shapes import factor_shapes, resized
from autocomp.records.candidate import Candidate, Method
from autocomp.records.precisions import FORMATS, FP32, Family, Precision, group_of

if TYPE_CHECKING:
    import numpy as np

    from autocomp.graph.graph import Graph, Layer

# A factorised layer must cost at most this share of the dense one: two kernels cost more than one. Chosen by hand, not measured.
BREAK_EVEN = 0.7
DRAWN_WITHOUT = 1 / 3  # of random candidates leave one of their branches out; chosen by hand


class Target(Protocol):
    """What a space needs to know of a hardware profile."""

    @property
    def name(self) -> str: ...
    @property
    def lanes(self) -> int: ...
    @property
    def precisions(self) -> Sequence[Precision]: ...


@dataclass(frozen=True)
class Refusal:
    """An option that the file asks for and the space does not offer, and why."""

    subject: str
    option: str
    reason: str


class Finer(NamedTuple):
    """What may come to be offered of some groups and layers: what is offered, and what lies between."""

    widths: Mapping[str, tuple[int, ...]]
    methods: Mapping[str, tuple[Method, ...]]


@dataclass(frozen=True)
class Space:
    """The legal choices: ``widths`` by group and ``methods`` by layer, each with the dense choice first.

    Widths count the units of a group: channels, or heads. Groups with one width and layers with one method are listed
    too. A group of a branch that may be left out (`Graph.branches`) offers 0 last. ``finer`` has, by group or layer, all widths or methods
    that a search may come to offer, those that it offers among them. ``lanes`` is the vector length widths and ranks are multiples of;
    ``counts`` says of each width how many units of each segment it keeps; ``observer`` is what the ranges of 8-bit
    activations are chosen by.
    """

    graph: Graph
    widths: Mapping[str, tuple[int, ...]]
    methods: Mapping[str, tuple[Method, ...]]
    refused: tuple[Refusal, ...] = ()
    lanes: int = 16
    counts: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    observer: Literal["minmax", "percentile", "mse"] = "mse"
    finer: Finer = field(default_factory=lambda: Finer({}, {}))
    _sides: dict[tuple[str, str, int], int] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def size(self) -> int:
        """Number of candidates."""
        total = 1
        for options in (*self.widths.values(), *self.methods.values()):
            total *= len(options)
        return total

    def dense(self) -> Candidate:
        """Return the candidate that changes nothing."""
        widths = {name: options[0] for name, options in self.widths.items()}
        return Candidate(widths, {name: options[0] for name, options in self.methods.items()})

    def uniform(self, keep: float = 1.0, precision: Precision = FP32) -> Candidate:
        """Return the candidate with the width nearest to ``keep`` in every group, and one precision where offered.

        Approximate groups keep all units where others can be narrowed: a recipe that treats all groups alike is none for these.
        """
        exact = {name for name, options in self.widths.items() if len(options) > 1 and not self._approximate(name)}
        widths = {
            name: options[0]
            if exact and self._approximate(name)
            else min((width for width in options if width), key=lambda width: abs(width - keep * options[0]))
            for name, options in self.widths.items()
        }
        wanted = Method(precision)
        methods = {name: wanted if wanted in options else options[0] for name, options in self.methods.items()}
        return self.normalise(Candidate(widths, methods))

    def _approximate(self, group: str) -> bool:
        return bool(self.graph.groups[group].approximate)

    def draw(self, rng: np.random.Generator) -> Candidate:
        """Return a random candidate; how much of the space's range it goes into is drawn first, so that all strengths are met.

        One in three leaves a branch out: a model without many says nothing, and such candidates nothing of the others.
        """
        # Above 1: mostly mild choices, the first of each; below: mostly strong ones.
        bend = 4.0 ** rng.uniform(-1.6, 1.6)

        def pick(options: tuple[Any, ...]) -> Any:
            return options[min(int(len(options) * rng.random() ** bend), len(options) - 1)]

        widths = {name: pick(tuple(w for w in options if w)) for name, options in self.widths.items()}
        methods = {name: pick(options) for name, options in self.methods.items()}
        ended = [name for name in self.graph.branches if 0 in self.widths[name]]
        if ended and rng.random() < DRAWN_WITHOUT:
            widths[ended[rng.integers(len(ended))]] = 0
        return self.normalise(Candidate(widths, methods))

    def normalise(self, candidate: Candidate) -> Candidate:
        """Return the same choice without ranks that save nothing at the pruned shape: those layers are full rank.

        Where a group of a branch keeps nothing, the whole branch goes.
        """
        widths, methods = self._whole_branches(candidate.widths), {}
        for name, method in candidate.methods.items():
            inputs, outputs = self.shape(name, widths)
            methods[name] = self.effective(name, inputs, outputs, method)
        return Candidate(widths, methods)

    def left_out(self, widths: Mapping[str, int]) -> list[str]:
        """The groups in which the branches end that are left out at these widths; none that is inside another that goes."""
        ended = [name for name in self.graph.branches if widths.get(name) == 0]
        inside = {group for name in ended for group in self.graph.branches[name].groups[1:]}
        return [name for name in ended if name not in inside]

    def _whole_branches(self, widths: Mapping[str, int]) -> dict[str, int]:
        whole = dict(widths)
        if 0 not in whole.values():
            return whole
        for name in [name for name, width in widths.items() if width == 0]:
            if name not in self.graph.branches:  # inside the smallest branch that it is part of
                around = [b for b in self.graph.branches.values() if name in b.groups and 0 in self.widths[b.groups[0]]]
                whole[min(around, key=lambda branch: len(branch.groups)).groups[0]] = 0
        for name, branch in self.graph.branches.items():
            if whole.get(name) == 0:
                whole |= dict.fromkeys(branch.groups, 0)
        return whole

    def effective(self, layer: str, inputs: int, outputs: int, method: Method) -> Method:
        """Return what ``method`` comes to at a shape (input columns, output channels): full rank where ranks waste."""
        if not inputs or not outputs:  # nothing is left of it
            return Method()
        if method.ranks and rank_waste(resized(self.graph.layers[layer], inputs, outputs), method.ranks):
            return Method(method.precision)
        return method

    def without(self, dropped: Mapping[str, Mapping[Method, Method]]) -> Space:
        """Return the space without some layers' methods; each comes with the one that is no worse in anything."""
        methods = {
            name: tuple(m for m in options if m not in dropped.get(name, {})) for name, options in self.methods.items()
        }
        finer = {}
        for name, every in self.finer.methods.items():
            left = methods[name]
            new = [m for m in every if m not in self.methods[name] and _has_like(left, m)]
            if new:
                finer[name] = (*left, *new)
        reason = "no more accurate, smaller or faster than {}"
        refused = [
            Refusal(name, str(method), reason.format(better))
            for name, pairs in dropped.items()
            for method, better in pairs.items()
        ]
        return replace(self, methods=methods, refused=(*self.refused, *refused), finer=Finer(self.finer.widths, finer))

    def of(self, widths: Mapping[str, tuple[int, ...]], methods: Mapping[str, tuple[Method, ...]]) -> Space:
        """Return the space with fewer choices, the dense one of each among them."""
        return replace(self, widths=widths, methods=methods, finer=Finer({}, {}))

    @property
    def every_width(self) -> dict[str, tuple[int, ...]]:
        """The widths of each group that a search may ever offer."""
        return {name: self.finer.widths.get(name, widths) for name, widths in self.widths.items()}

    @property
    def every_method(self) -> dict[str, tuple[Method, ...]]:
        """The methods of each layer that a search may ever offer."""
        return {name: self.finer.methods.get(name, methods) for name, methods in self.methods.items()}

    def offering(self, widths: Mapping[str, tuple[int, ...]], methods: Mapping[str, tuple[Method, ...]]) -> Space:
        """Return the space with more of its finer widths and methods on offer, for some of its groups and layers."""
        return replace(self, widths={**self.widths, **widths}, methods={**self.methods, **methods})

    def shape(self, layer: str, widths: Mapping[str, int]) -> tuple[int, int]:
        """Return (input columns, output channels) of a layer at the given group widths (missing groups are dense)."""
        described = self.graph.layers[layer]
        return self.columns(layer, widths.get(described.in_group or "")), self.rows(
            layer, widths.get(described.out_group or "")
        )

    def columns(self, layer: str, width: int | None) -> int:
        """Return the input columns of a layer when its input group keeps ``width`` units (None: all)."""
        described = self.graph.layers[layer]
        return self._side(described.in_group, layer, width, "columns", described.in_channels)

    def rows(self, layer: str, width: int | None) -> int:
        """Return the output channels of a layer when its output group keeps ``width`` units (None: all)."""
        described = self.graph.layers[layer]
        return self._side(described.out_group, layer, width, "rows", described.out_channels)

    def _side(self, name: str | None, layer: str, width: int | None, side: str, full: int) -> int:
        if name is None or width is None or width == self.graph.groups[name].width:
            return full
        key = (side, layer, width)
        if key not in self._sides:
            group = self.graph.groups[name]
            stays, per_unit = group.per_unit((group.columns if side == "columns" else group.rows)[layer])
            kept = self.counts[name][width]
            self._sides[key] = stays + sum(count * each for count, each in zip(kept, per_unit, strict=True))
        return self._sides[key]


def _has_like(methods: Sequence[Method], method: Method) -> bool:
    """Whether a low-rank method in the same precision is among these."""
    return any(other.ranks and other.precision == method.precision for other in methods)


def has_kernel(layer: Layer, precision: Precision, profile: Target) -> bool:
    """Whether a profile computes a layer in a precision; what it does not is decoded to float32 when the model is compiled."""
    family = FORMATS[precision].family
    if layer.loop:
        covered = layer.loop in family.loops
    else:
        covered = ("linear" if layer.kind == "linear" else "plain" if layer.is_plain else "other") in family.covers
    return covered and (family.everywhere or precision in profile.precisions)


def same_kernels(layer: Layer, one: Method, other: Method, profiles: Sequence[Target]) -> bool:
    """Whether two methods of a layer run the same kernels on every profile: those of fp32 where a precision has none."""
    if one.ranks != other.ranks:
        return False

    def kernel(method: Method, profile: Target) -> tuple[Family, float, int]:
        precision = method.precision if has_kernel(layer, method.precision, profile) else FP32
        form = FORMATS[precision]
        return form.family, form.bits, group_of(precision, layer.in_channels) if form.group else 0

    return all(kernel(one, profile) == kernel(other, profile) for profile in profiles)


def rank_waste(layer: Layer, ranks: Sequence[int]) -> str:
    """Say why the factors are no use at this shape; empty if they are."""
    full: tuple[int, ...] = (layer.in_channels, layer.out_channels)
    if len(ranks) == 1:
        full = (min(layer.in_channels * layer.kernel[0], layer.out_channels * layer.kernel[1]),)
    if any(rank > size for rank, size in zip(ranks, full, strict=True)):
        return f"rank {'x'.join(map(str, ranks))} is more than the full rank {'x'.join(map(str, full))}"
    factors = factor_shapes(layer, ranks)
    macs = sum(factor.macs for factor in factors) / max(1, layer.macs)
    weights = sum(factor.weights for factor in factors) / max(1, layer.weights)
    if max(macs, weights) > BREAK_EVEN:
        what = "multiplications" if macs >= weights else "weights"
        return f"rank {'x'.join(map(str, ranks))} keeps {max(macs, weights):.0%} of the {what}, over {BREAK_EVEN:.0%}"
    return ""
