"""Which layers decide a search, and what is not offered: both read off the additive tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from autocomp.records.candidate import Candidate
from autocomp.records.run import Decider, Kept
from autocomp.study.solver import Floats, Problem

if TYPE_CHECKING:
    from autocomp.graph.graph import Graph
    from autocomp.space.space import Space

MOST_ROWS = 12  # layers and refusals that are told


def deciders(problem: Problem, candidates: Sequence[Candidate], most: int = MOST_ROWS) -> tuple[Decider, ...]:
    """The layers that tell candidates apart, those with most first: cov(part of a layer, whole) / var(whole), of divergence and of seconds.

    For a sum of parts these shares are exact and sum to 1; they say nothing of what the tables do not know. Where candidates do not differ,
    there are none.
    """
    if len(candidates) < 2:
        return ()
    levels = np.stack([problem.encode(candidate) for candidate in candidates])
    at = np.zeros((3, len(problem.factors), len(levels)), dtype=np.int64)
    for k, (i, o) in enumerate(problem.sides):
        for side, column in enumerate((i, o, len(problem.groups) + k)):
            if column >= 0:
                at[side, k] = levels[:, column]
    error, seconds = (
        np.stack([getattr(f, name)[tuple(at[:, k])] for k, f in enumerate(problem.factors)])
        for name in ("error", "seconds")
    )
    usable = np.isfinite(error).all(axis=0) & (error < 1e12).all(axis=0)  # a forbidden combination is no divergence
    shares = zip(_shares(error[:, usable]), _shares(seconds[:, usable]), strict=True)
    rows = [Decider(f.layer, float(e), float(s)) for f, (e, s) in zip(problem.factors, shares, strict=True)]
    return tuple(sorted(rows, key=lambda row: -max(row.divergence, row.seconds))[:most])


def _shares(parts: Floats) -> Floats:
    """Of parts ``[layers, candidates]``, the share of each in the variance of their sum."""
    centred = parts - parts.mean(axis=1, keepdims=True)
    whole = centred.sum(axis=0)
    variance = float(whole @ whole)
    found: Floats = centred @ whole / variance if variance > 0 else np.zeros(len(parts))
    return found


def kept(graph: Graph, space: Space, problem: Problem, most: int = MOST_ROWS) -> tuple[Kept, ...]:
    """Groups and layers that nothing is offered for, by the share of the dense model's time in the layers they concern, and the first reason."""
    shares = {factor.layer: float(factor.seconds[0, 0, 0]) for factor in problem.factors}
    whole = sum(shares.values()) + problem.fixed_seconds
    rows: dict[str, Kept] = {}
    for refusal in space.refused:
        group = graph.groups.get(refusal.subject)
        offered = space.widths if group else space.methods
        if len(offered.get(refusal.subject, ())) > 1:
            continue
        layers = (*group.producers, *group.consumers) if group else (refusal.subject,)
        share = sum(shares.get(layer, 0.0) for layer in dict.fromkeys(layers)) / (whole or 1.0)
        rows.setdefault(refusal.subject, Kept(refusal.subject, refusal.option, refusal.reason, share))
    return tuple(sorted(rows.values(), key=lambda row: -row.share)[:most])
