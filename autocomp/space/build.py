"""A search-space file, a graph and profiles → the space: what is legal, and what it refuses and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from itertools import pairwise
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.compress.hessian import WIDE
from autocomp.errors import UsageError, suggest
from autocomp.records.candidate import Method
from autocomp.records.precisions import FORMATS, FP32, Precision
from autocomp.space.file import Rule, SpaceFile, load_space

if TYPE_CHECKING:
    from autocomp.graph.graph import Graph, Group, Layer
from autocomp.space.space import Finer, Refusal, Space, Target, has_kernel, rank_waste

LEVELS = 16  # of a group's widths at most, where they are refined


def build_space(graph: Graph, space_file: SpaceFile | str | Path, profile: Target | Sequence[Target]) -> Space:
    """Return the legal choices for a graph; several profiles allow what all of them do.

    UsageError for a file that names no layer of the graph in one of its rules (a mistyped glob).
    """
    rules = space_file if isinstance(space_file, SpaceFile) else load_space(space_file)
    profiles = list(profile) if isinstance(profile, Sequence) else [profile]
    rules = _named(graph, rules)
    _check_globs(graph, rules)
    builder = _Builder(graph, rules, profiles)
    counts = {group.name: builder.widths(group) for group in graph.groups.values()}
    builder.leave_out(counts)
    widths = {name: tuple(offered) for name, offered in counts.items()}
    methods = {layer.name: builder.methods(layer) for layer in graph.layers.values()}
    finer = Finer(builder.finer(counts), builder.finer_methods(methods)) if rules.refine else Finer({}, {})
    for name, reason in graph.skipped.items():
        builder.refuse(name, "every option", reason)
    return Space(graph, widths, methods, tuple(builder.refused), builder.lanes, counts, rules.observer, finer)


def _named(graph: Graph, rules: SpaceFile) -> SpaceFile:
    """The rules where what is the name of a layer means that layer alone, whatever stands in it: ``x[1]`` is a pattern, too."""
    known = {*graph.layers, *graph.skipped}

    def literal(patterns: list[str]) -> list[str]:
        return [escape(pattern) if pattern in known else pattern for pattern in patterns]

    named = [rule.model_copy(update={"layers": literal(rule.globs())}) for rule in rules.rules]
    return rules.model_copy(update={"rules": named, "protect": literal(rules.protect)})


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
        self.step = rules.step or self.lanes  # of widths
        self.exact = any(group.prunable and not group.approximate for group in graph.groups.values())
        self.refused: list[Refusal] = []

    def refuse(self, subject: str, option: str, reason: str) -> None:
        self.refused.append(Refusal(subject, option, reason))

    def options(self, layer: str) -> Rule:
        """Merge the rules that match; without any, nothing is offered."""
        merged: dict[str, Any] = {"keep": [1.0], "ranks": [], "spatial_ranks": [], "precisions": [FP32], "depth": False}
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
            kept = self._kept(group, share)
            width = sum(kept)
            if stay:
                self.refuse(group.name, f"keep {share:g}", stay)
            elif width in offered:
                self.refuse(group.name, f"keep {share:g}", f"rounds to {width} of {group.width}, offered already")
            else:
                offered[width] = kept
        return offered

    def _kept(self, group: Group, share: float) -> tuple[int, ...]:
        """The units of every segment that a share of them comes to."""
        steps = [self._step(group, segment) for segment in range(len(group.sizes()))]
        return tuple(_multiple(share * n, n, step) for n, step in zip(group.sizes(), steps, strict=True))

    def finer(self, counts: Mapping[str, dict[int, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
        """The widths of groups that have more between the ones offered; ``counts`` then says of these too what they keep."""
        found = {}
        for name, offered in counts.items():
            narrowest = min((width for width in offered if width), default=0)
            shares = [level / LEVELS for level in range(LEVELS - 1, 0, -1)] if sum(map(bool, offered)) > 1 else []
            between = {sum(kept): kept for kept in (self._kept(self.graph.groups[name], share) for share in shares)}
            more = {width: kept for width, kept in between.items() if width > narrowest and width not in offered}
            if more:
                offered |= more
                found[name] = tuple(sorted(offered, reverse=True))
        return found

    def leave_out(self, counts: Mapping[str, dict[int, tuple[int, ...]]]) -> None:
        """Add the width 0 to the groups of every branch that may be left out."""
        for name, branch in self.graph.branches.items():
            members = (*branch.ends, *branch.layers)
            protected = next((layer for layer in members if self.protected(layer)), "")
            if all(self.options(layer).depth for layer in members):
                if protected:
                    self.refuse(name, "depth", f"layer {protected} is protected")
                    continue
                for group in branch.groups:
                    counts[group][0] = (0,) * len(next(iter(counts[group].values())))
        for name, reason in self.graph.whole.items():
            if any(self.options(layer).depth for layer in self.graph.groups[name].producers):
                self.refuse(name, "depth", reason)

    def _step(self, group: Group, segment: int) -> int:
        """Units of a segment that come in whole vectors (or steps of the space) in every layer; heads have a size of their own."""
        if group.attention:
            return 1
        step = 1
        for units in (*group.rows.values(), *group.columns.values()):
            each = group.per_unit(units)[1][segment]
            if each:
                step = max(step, self.step // gcd(self.step, each))
        return step

    def _rounded(self, wanted: float, full: int) -> int:
        return _multiple(wanted, full, self.lanes)

    def methods(self, layer: Layer) -> tuple[Method, ...]:
        options = self.options(layer.name)
        why_dense = layer.fixed or ("it is protected" if self.protected(layer.name) else "")
        precisions: list[Precision] = [FP32]
        for precision in dict.fromkeys(options.precisions or ()):
            if precision == FP32:
                continue
            reason = why_dense or self._precision_refused(layer, precision)
            if reason:
                self.refuse(layer.name, precision, reason)
            else:
                precisions.append(precision)
        ranks = [(), *self._ranks(layer, options, why_dense)]
        return tuple(Method(precision, rank) for rank in ranks for precision in precisions)

    def finer_methods(self, offered: Mapping[str, tuple[Method, ...]]) -> dict[str, tuple[Method, ...]]:
        """The methods of layers with ranks halfway between the ones offered; nothing is said of those that are no use."""
        found, known = {}, len(self.refused)
        for name, methods in offered.items():
            options = self.options(name)
            shares = [_with_middles(options.ranks), _with_middles(options.spatial_ranks)]
            finer = options.model_copy(update={"ranks": shares[0], "spatial_ranks": shares[1]})
            precisions = [method.precision for method in methods if not method.ranks]
            every = dict.fromkeys(m.ranks for m in methods)
            if len(every) > 1:
                more = self._ranks(self.graph.layers[name], finer, "")
                every |= dict.fromkeys(more)
            if len(every) * len(precisions) > len(methods):
                found[name] = tuple(Method(p, ranks) for ranks in every for p in precisions)
        del self.refused[known:]
        return found

    def _precision_refused(self, layer: Layer, precision: Precision) -> str:
        """Say why a layer cannot or should not take a precision; empty if it may."""
        form = FORMATS[precision]
        if layer.loop and not form.family.decodes and layer.loop not in form.family.loops:
            return f"a {layer.loop}'s loop over time is in fp32"
        lacking = [profile.name for profile in self.profiles if not has_kernel(layer, precision, profile)]
        if lacking and (not form.family.decodes or self.rules.kernels_only):
            return f"profile {', '.join(lacking)} has no kernels for it"
        order = list(self.graph.layers)
        least = {"any": 0, "8bit": 8, "float": 16}[self.rules.ends]
        if layer.name in (order[0], order[-1]) and form.bits < least:
            which = "first" if layer.name == order[0] else "last"
            return f"it is the {which} layer, among the most sensitive: `ends: {self.rules.ends}` in the search space protects it"
        books, indices = form.codebook_bytes, layer.weights * form.bits / 8
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
                reason = "its rank is less than a vector" if not ranks else rank_waste(layer, ranks)
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


def _with_middles(shares: Sequence[float] | None) -> list[float]:
    """Shares and the ones halfway between."""
    given = sorted(shares or ())
    return given + [(one + other) / 2 for one, other in pairwise(given)]


def _multiple(wanted: float, full: int, step: int) -> int:
    """Round to whole vectors; what is narrower than a vector has none to round to."""
    if full < step:
        return max(1, round(wanted))
    return min(full, max(step, int(wanted / step + 0.5) * step))
