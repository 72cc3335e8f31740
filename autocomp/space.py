"""Which compressions of which layer are legal and worth offering: a search-space file x a graph x a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from autocomp.compress.hessian import WIDE
from autocomp.errors import UsageError, suggest
from autocomp.kernels.recurrent import IN_8_BITS
from autocomp.precisions import CENTROIDS, FORMATS, group_of
from autocomp.records import Candidate, Method, Precision
from autocomp.shapes import factor_shapes, resized
from autocomp.space_file import Rule, SpaceFile, load_space

if TYPE_CHECKING:
    import numpy as np

    from autocomp.graph import Graph, Group, Layer

BREAK_EVEN = 0.7  # a factorised layer must cost at most this share of the dense one: two kernels cost more than one


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


@dataclass(frozen=True)
class Space:
    """The legal choices: ``widths`` by group and ``methods`` by layer, each with the dense choice first.

    Widths count the units of a group: channels, or heads. Groups with one width and layers with one method are listed
    too. ``lanes`` is the vector length widths and ranks are multiples of; ``counts`` says of each width how many units
    of each segment it keeps; ``observer`` is what the ranges of 8-bit activations are chosen by.
    """

    graph: Graph
    widths: Mapping[str, tuple[int, ...]]
    methods: Mapping[str, tuple[Method, ...]]
    refused: tuple[Refusal, ...] = ()
    lanes: int = 16
    counts: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    observer: Literal["minmax", "percentile", "mse"] = "mse"
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

    def uniform(self, keep: float = 1.0, precision: Precision = "fp32") -> Candidate:
        """Return the candidate with the width nearest to ``keep`` in every group, and one precision where offered.

        Approximate groups keep all units where others can be narrowed: a recipe that treats all groups alike is none for these.
        """
        exact = {name for name, options in self.widths.items() if len(options) > 1 and not self._approximate(name)}
        widths = {
            name: options[0]
            if exact and self._approximate(name)
            else min(options, key=lambda width: abs(width - keep * options[0]))
            for name, options in self.widths.items()
        }
        wanted = Method(precision)
        methods = {name: wanted if wanted in options else options[0] for name, options in self.methods.items()}
        return self.normalise(Candidate(widths, methods))

    def _approximate(self, group: str) -> bool:
        return bool(self.graph.groups[group].approximate)

    def draw(self, rng: np.random.Generator) -> Candidate:
        """Return a random candidate; how much of the space's range it goes into is drawn first, so that all strengths are met."""
        # Above 1: mostly mild choices, the first of each; below: mostly strong ones.
        bend = 4.0 ** rng.uniform(-1.6, 1.6)

        def pick(options: tuple[Any, ...]) -> Any:
            return options[min(int(len(options) * rng.random() ** bend), len(options) - 1)]

        widths = {name: pick(options) for name, options in self.widths.items()}
        return self.normalise(Candidate(widths, {name: pick(options) for name, options in self.methods.items()}))

    def normalise(self, candidate: Candidate) -> Candidate:
        """Return the same choice without ranks that save nothing at the pruned shape: those layers are full rank."""
        methods = {}
        for name, method in candidate.methods.items():
            inputs, outputs = self.shape(name, candidate.widths)
            methods[name] = self.effective(name, inputs, outputs, method)
        return Candidate(dict(candidate.widths), methods)

    def effective(self, layer: str, inputs: int, outputs: int, method: Method) -> Method:
        """Return what ``method`` comes to at a shape (input columns, output channels): full rank where ranks waste."""
        if method.ranks and _rank_waste(resized(self.graph.layers[layer], inputs, outputs), method.ranks):
            return Method(method.precision)
        return method

    def without(self, dropped: Mapping[str, Mapping[Method, Method]]) -> Space:
        """Return the space without some layers' methods; each comes with the one that is no worse in anything."""
        methods = {
            name: tuple(m for m in options if m not in dropped.get(name, {})) for name, options in self.methods.items()
        }
        reason = "no more accurate, smaller or faster than {}"
        refused = [
            Refusal(name, str(method), reason.format(better))
            for name, pairs in dropped.items()
            for method, better in pairs.items()
        ]
        return replace(self, methods=methods, refused=(*self.refused, *refused))

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


def build_space(graph: Graph, space_file: SpaceFile | str | Path, profile: Target | Sequence[Target]) -> Space:
    """Return the legal choices for a graph; several profiles allow what all of them do.

    UsageError for a file that names no layer of the graph in one of its rules (a mistyped glob).
    """
    rules = space_file if isinstance(space_file, SpaceFile) else load_space(space_file)
    profiles = list(profile) if isinstance(profile, Sequence) else [profile]
    _check_globs(graph, rules)
    builder = _Builder(graph, rules, profiles)
    counts = {group.name: builder.widths(group) for group in graph.groups.values()}
    widths = {name: tuple(offered) for name, offered in counts.items()}
    methods = {layer.name: builder.methods(layer) for layer in graph.layers.values()}
    for name, reason in graph.skipped.items():
        builder.refuse(name, "every option", reason)
    return Space(graph, widths, methods, tuple(builder.refused), builder.lanes, counts, rules.observer)


def _check_globs(graph: Graph, rules: SpaceFile) -> None:
    known = [*graph.layers, *graph.skipped]
    asked = [(glob, "rules") for rule in rules.rules for glob in rule.globs()]
    for glob, key in [*asked, *((glob, "protect") for glob in rules.protect)]:
        if not any(fnmatchcase(name, glob) for name in known):
            raise UsageError(
                f"search space, {key}: {glob!r} matches no layer of the model.{suggest(glob, known)} "
                f"Layers: {', '.join(known) or 'none'}"
            )


class _Builder:
    """Collects refusals while it turns rules into choices."""

    def __init__(self, graph: Graph, rules: SpaceFile, profiles: Sequence[Target]) -> None:
        self.graph, self.rules, self.profiles = graph, rules, profiles
        self.lanes = max(profile.lanes for profile in profiles)
        self.exact = any(group.prunable and not group.approximate for group in graph.groups.values())
        self.refused: list[Refusal] = []

    def refuse(self, subject: str, option: str, reason: str) -> None:
        self.refused.append(Refusal(subject, option, reason))

    def options(self, layer: str) -> Rule:
        """Merge the rules that match; without any, nothing is offered."""
        merged: dict[str, Any] = {"keep": [1.0], "ranks": [], "spatial_ranks": [], "precisions": ["fp32"]}
        for rule in self.rules.rules:
            if rule.matches(layer):
                merged |= rule.model_dump(exclude={"layers"}, exclude_none=True)
        return Rule(layers=layer, **merged)

    def protected(self, layer: str) -> bool:
        return any(fnmatchcase(layer, glob) for glob in self.rules.protect)

    def widths(self, group: Group) -> dict[int, tuple[int, ...]]:
        """Return the widths offered, widest first, each with the units of every segment it keeps."""
        shares = [set(self.options(name).keep or ()) for name in group.producers]
        asked = sorted(set.intersection(*shares) - {1.0}, reverse=True)
        for share in sorted(set.union(*shares) - {1.0} - set(asked), reverse=True):
            self.refuse(group.name, f"keep {share:g}", f"not allowed for all of {', '.join(group.producers)}")
        stay = group.reason if not group.prunable else ""
        if group.approximate and not stay and self.exact and not (self.rules.approximate or self.rules.rotate):
            stay = f"{group.approximate} takes its channels together: `approximate` in the search space offers it, `rotate` at less cost"
        for name in group.producers:
            if self.protected(name):
                stay = stay or f"layer {name} is protected"
        sizes = group.sizes() or (group.width,)
        offered = {group.width: sizes}
        for share in asked:
            steps = [self._step(group, segment) for segment in range(len(sizes))]
            kept = tuple(_multiple(share * n, n, step) for n, step in zip(sizes, steps, strict=True))
            width = sum(kept)
            if stay:
                self.refuse(group.name, f"keep {share:g}", stay)
            elif width in offered:
                self.refuse(group.name, f"keep {share:g}", f"rounds to {width} of {group.width}, offered already")
            else:
                offered[width] = kept
        return offered

    def _step(self, group: Group, segment: int) -> int:
        """Units of a segment that come in whole vectors in every layer; heads have a size of their own."""
        if group.attention:
            return 1
        step = 1
        for units in (*group.rows.values(), *group.columns.values()):
            each = group.per_unit(units)[1][segment]
            if each:
                step = max(step, self.lanes // gcd(self.lanes, each))
        return step

    def _rounded(self, wanted: float, full: int) -> int:
        return _multiple(wanted, full, self.lanes)

    def methods(self, layer: Layer) -> tuple[Method, ...]:
        options = self.options(layer.name)
        why_dense = layer.fixed or ("it is protected" if self.protected(layer.name) else "")
        precisions: list[Precision] = ["fp32"]
        for precision in dict.fromkeys(options.precisions or ()):
            if precision == "fp32":
                continue
            reason = why_dense or self._precision_refused(layer, precision)
            if reason:
                self.refuse(layer.name, precision, reason)
            else:
                precisions.append(precision)
        ranks = [(), *self._ranks(layer, options, why_dense)]
        return tuple(Method(precision, rank) for rank in ranks for precision in precisions)

    def _precision_refused(self, layer: Layer, precision: Precision) -> str:
        """Say why a layer cannot or should not take a precision; empty if it may."""
        kind = FORMATS[precision]
        if layer.loop and kind.kind == "integer" and layer.loop not in IN_8_BITS:
            return f"a {layer.loop}'s loop over time is in fp32"
        lacking = [profile.name for profile in self.profiles if not has_kernel(layer, precision, profile)]
        if lacking and (kind.kind == "integer" or self.rules.kernels_only):
            return f"profile {', '.join(lacking)} has no kernels for it"
        order = list(self.graph.layers)
        least = {"any": 0, "8bit": 8, "float": 16}[self.rules.ends]
        if layer.name in (order[0], order[-1]) and kind.bits < least:
            which = "first" if layer.name == order[0] else "last"
            return f"it is the {which} layer, among the most sensitive: `ends: {self.rules.ends}` in the search space protects it"
        if kind.kind == "codebook":
            books, indices = kind.stages * CENTROIDS * kind.dim * 2, layer.weights * kind.bits / 8
            if books > indices:
                return f"its codebooks of {books} bytes outweigh their {indices:.0f} bytes of indices"
        return ""

    def _ranks(self, layer: Layer, options: Rule, why_dense: str) -> list[tuple[int, ...]]:
        offered: list[tuple[int, ...]] = []
        square = len(layer.kernel) == 2 and min(layer.kernel) > 1
        asked = [(share, False) for share in sorted(set(options.ranks or ()), reverse=True)]
        if square:
            asked += [(share, True) for share in sorted(set(options.spatial_ranks or ()), reverse=True)]
        for share, spatial in asked:
            ranks: tuple[int, ...] = ()
            reason = why_dense
            if layer.kind == "depthwise" or layer.conv_groups > 1:
                reason = "a grouped convolution has no low-rank form here"
            elif layer.loop:
                reason = "a loop over time multiplies by its whole weight"
            elif not layer.is_plain:
                reason = "a transposed or three-dimensional convolution has no low-rank form here"
            elif layer.columns > WIDE:
                reason = f"with more than {WIDE} weights for each output, it is compressed a column at a time"
            if not reason:
                ranks = self._ranks_at(layer, share, spatial)
                reason = "its rank is less than a vector" if not ranks else _rank_waste(layer, ranks)
            if not reason and ranks in offered:
                reason = f"rounds to {ranks}, offered already"
            if reason:
                self.refuse(layer.name, f"{'spatial ' if spatial else ''}rank {share:g}", reason)
            else:
                offered.append(ranks)
        return offered

    def _ranks_at(self, layer: Layer, share: float, spatial: bool) -> tuple[int, ...]:
        """Return one rank (SVD or spatial) or two (Tucker-2 of a kernel), in whole vectors; empty below one vector."""
        if spatial or layer.taps == 1:
            full: tuple[int, ...] = (min(layer.in_channels, layer.out_channels),)
        else:
            full = (layer.in_channels, layer.out_channels)
        if min(full) < 2 * self.lanes:
            return ()
        return tuple(self._rounded(share * size, size) for size in full)


def _multiple(wanted: float, full: int, step: int) -> int:
    """Round to whole vectors; what is narrower than a vector has none to round to."""
    if full < step:
        return max(1, round(wanted))
    return min(full, max(step, int(wanted / step + 0.5) * step))


def has_kernel(layer: Layer, precision: Precision, profile: Target) -> bool:
    """Whether a profile computes a layer in a precision; what it does not is decoded to float32 when the model is compiled.

    Linear layers in w8 and w4 have kernels on every profile, convolutions in these and codebooks nowhere; loops over time are in fp32 or, of
    some kinds, in 8-bit integers; transposed and three-dimensional convolutions have none in fp16.
    """
    kind = FORMATS[precision].kind
    if layer.loop and precision != "fp32":
        return kind == "integer" and layer.loop in IN_8_BITS and precision in profile.precisions
    if kind == "grouped":
        return layer.kind == "linear"
    if precision == "fp16" and not layer.is_plain:
        return False
    return precision in profile.precisions


def same_kernels(layer: Layer, one: Method, other: Method, profiles: Sequence[Target]) -> bool:
    """Whether two methods of a layer run the same kernels on every profile: those of fp32 where a precision has none."""
    if one.ranks != other.ranks:
        return False

    def kernel(method: Method, profile: Target) -> tuple[str, float, int]:
        precision = method.precision if has_kernel(layer, method.precision, profile) else "fp32"
        kind = FORMATS[precision]
        return kind.kind, kind.bits, group_of(precision, layer.in_channels) if kind.group else 0

    return all(kernel(one, profile) == kernel(other, profile) for profile in profiles)


def _rank_waste(layer: Layer, ranks: Sequence[int]) -> str:
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
