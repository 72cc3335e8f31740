"""Which compressions of which layer are legal and worth offering: a search-space file x a graph x a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from autocomp.errors import UsageError, suggest
from autocomp.precisions import CENTROIDS, FORMATS, group_of
from autocomp.records import Candidate, Method, Precision
from autocomp.resources import shipped_files

if TYPE_CHECKING:
    import numpy as np

    from autocomp.graph import Graph, Group, Layer

BREAK_EVEN = 0.7  # a factorised layer must cost at most this share of the dense one: two kernels cost more than one

Share = Annotated[float, Field(gt=0.0, le=1.0, strict=True)]


class Target(Protocol):
    """What a space needs to know of a hardware profile."""

    @property
    def name(self) -> str: ...
    @property
    def lanes(self) -> int: ...
    @property
    def precisions(self) -> Sequence[Precision]: ...


class Rule(BaseModel):
    """Options of the layers named; ``keep`` and the ranks are shares in (0, 1]; a missing key says nothing.

    ``ranks`` are those of SVD and Tucker-2, ``spatial_ranks`` those of a column and a row kernel in place of a square one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: str | list[str]
    keep: list[Share] | None = None
    ranks: list[Share] | None = None
    spatial_ranks: list[Share] | None = None
    precisions: list[Precision] | None = None

    @field_validator("keep", "ranks", "spatial_ranks", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """YAML reads ``1`` as an integer, which is fine, and ``5e-1`` as a text, which is not."""
        if not isinstance(value, list):
            return value
        for item in value:
            if isinstance(item, str):
                raise ValueError(f"{item!r} is a text; write the number with a point and without quotes, as 0.5")
        return [float(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in value]

    def globs(self) -> list[str]:
        return [self.layers] if isinstance(self.layers, str) else self.layers

    def matches(self, layer: str) -> bool:
        return any(fnmatchcase(layer, glob) for glob in self.globs())


class SpaceFile(BaseModel):
    """A search-space file: ``rules`` in order, later ones override earlier ones by key; ``protect`` beats them all.

    ``ends`` is the least that the first and the last layer, which are the most sensitive, may be stored and computed in: ``float``
    (fp16), ``8bit``, or ``any`` to leave them to the rules. ``kernels_only`` offers only precisions that every profile computes in:
    without it the others are offered for their size. ``observer`` chooses the ranges of 8-bit activations, ``equalise`` first brings the
    channels between layers to like ranges, which leaves the function as it is (``compress.equalise``). Norms, softmax and everything
    else that is no convolution or linear layer stays in fp32 whatever the file says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1]
    description: str = ""
    rules: list[Rule]
    protect: list[str] = []
    ends: Literal["any", "8bit", "float"] = "8bit"
    kernels_only: bool = False
    observer: Literal["minmax", "percentile", "mse"] = "mse"
    equalise: bool = False


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
        """Return the candidate with the width nearest to ``keep`` in every group, and one precision where offered."""
        widths = {
            name: min(options, key=lambda width, full=options[0]: abs(width - keep * full))  # type: ignore[misc]
            for name, options in self.widths.items()
        }
        wanted = Method(precision)
        methods = {name: wanted if wanted in options else options[0] for name, options in self.methods.items()}
        return self.normalise(Candidate(widths, methods))

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


def list_spaces() -> list[str]:
    """Return the names of the search spaces that ship with autocomp."""
    return list(shipped_files("search_spaces"))


def load_space(name: str | Path) -> SpaceFile:
    """Read a search-space file by path or shipped name. UsageError names the file, the key, the rule and the value."""
    shipped = shipped_files("search_spaces")
    path = shipped.get(str(name), Path(name))
    if str(name) not in shipped and not path.is_file():
        known = ", ".join(shipped)
        raise UsageError(f"unknown search space {str(name)!r}.{suggest(str(name), shipped)} Known: {known}, or a path")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a search space must be a mapping with 'format_version' and 'rules'")
    version = data.get("format_version")
    if isinstance(version, int) and version > 1:
        raise UsageError(f"{path}: format_version {version} is newer than this autocomp knows (1): update autocomp")
    try:
        return SpaceFile.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{path}: {_first_error(error)}") from error


def _first_error(error: ValidationError) -> str:
    """Say in one line what pydantic found first: the key, the rule, the value."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        model = Rule if first["loc"][0] == "rules" else SpaceFile
        return f"unknown key {key!r}.{suggest(str(first['loc'][-1]), model.model_fields)}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    value = "" if first["type"] == "missing" else f", got {first['input']!r}"
    return f"{key}: {first['msg'].removeprefix('Value error, ')}{value}{more}"


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
        square = layer.kernel[0] > 1 and layer.kernel[1] > 1
        asked = [(share, False) for share in sorted(set(options.ranks or ()), reverse=True)]
        if square:
            asked += [(share, True) for share in sorted(set(options.spatial_ranks or ()), reverse=True)]
        for share, spatial in asked:
            ranks: tuple[int, ...] = ()
            reason = why_dense
            if layer.kind == "depthwise" or layer.conv_groups > 1:
                reason = "a grouped convolution has no low-rank form here"
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
        if spatial or layer.kernel == (1, 1):
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

    Linear layers in w8 and w4 have kernels on every profile, convolutions in these and codebooks nowhere.
    """
    kind = FORMATS[precision].kind
    if kind == "grouped":
        return layer.kind == "linear"
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


def resized(layer: Layer, inputs: int, outputs: int) -> Layer:
    """Return the description of a layer at other widths; ``inputs`` counts columns."""
    grouped = layer.conv_groups > 1  # whole groups go: what an output reads stays as it is
    share = outputs / layer.out_channels * (1.0 if grouped else inputs / layer.in_channels)
    groups = layer.conv_groups * outputs // layer.out_channels if grouped else 1
    macs = round(layer.macs * share)
    return replace(layer, in_channels=inputs, out_channels=outputs, conv_groups=groups, macs=macs)


def factor_shapes(layer: Layer, ranks: Sequence[int]) -> list[Layer]:
    """Describe the layers a factorised one becomes: two (one rank: SVD, of a larger kernel spatial) or three (Tucker-2)."""
    one, zero = (1, 1), (0, 0)
    if len(ranks) == 1 and layer.kernel != (1, 1):
        return _spatial_shapes(layer, ranks[0])
    if len(ranks) == 1:
        first = replace(resized(layer, layer.in_channels, ranks[0]), bias=False)
        pixel = replace(layer, in_size=layer.out_size, stride=one, padding=zero, dilation=one)
        return [first, resized(pixel, ranks[0], layer.out_channels)]
    core = resized(replace(layer, bias=False), ranks[0], ranks[1])
    batch = layer.macs // max(1, layer.weights * layer.out_size[0] * layer.out_size[1])
    before = replace(layer, kernel=one, stride=one, padding=zero, dilation=one, out_size=layer.in_size, bias=False)
    before = replace(before, out_channels=ranks[0], macs=batch * before.in_channels * ranks[0] * _area(layer.in_size))
    after = replace(layer, kernel=one, stride=one, padding=zero, dilation=one, in_size=layer.out_size)
    after = replace(after, in_channels=ranks[1], macs=batch * ranks[1] * layer.out_channels * _area(layer.out_size))
    return [before, core, after]


def _spatial_shapes(layer: Layer, rank: int) -> list[Layer]:
    """A column kernel that strides down, then a row kernel that strides across."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = layer.kernel, layer.stride, layer.padding, layer.dilation
    middle = (layer.out_size[0], layer.in_size[1])
    batch = layer.macs // max(1, layer.weights * _area(layer.out_size))
    down = replace(
        layer, kernel=(kh, 1), stride=(sh, 1), padding=(ph, 0), dilation=(dh, 1), out_size=middle, bias=False
    )
    down = replace(down, out_channels=rank, macs=batch * layer.in_channels * rank * kh * _area(middle))
    across = replace(layer, kernel=(1, kw), stride=(1, sw), padding=(0, pw), dilation=(1, dw), in_size=middle)
    across = replace(across, in_channels=rank, macs=batch * rank * layer.out_channels * kw * _area(layer.out_size))
    return [down, across]


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


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
