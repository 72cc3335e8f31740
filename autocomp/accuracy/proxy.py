"""Tier 1: the divergence of a stitched model's answers from those of the dense one, on the calibration data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autocomp.graph.batches import count, part
from autocomp.layers.w8a8 import sums_in_float32
from autocomp.tasks.divergence import total

if TYPE_CHECKING:
    from autocomp.database.calibrate import Statistics
    from autocomp.database.database import LayerDatabase
    from autocomp.graph.graph import Graph
    from autocomp.records.candidate import Candidate

# Samples a candidate is judged on first. On the built-in tasks their divergence is within a fifth of that of 256: read once (commits 0fc7dca
# and 9f94260), no benchmark holds it.
FIRST = 64
_FLOORS: dict[str, float] = {}  # of `_score_first`, by the fingerprint of model and data


def kl(model: nn.Module, statistics: Statistics) -> float:
    """Return how far the model is from the dense one over the calibration samples, see `divergence`; infinite if it is not finite."""
    with torch.no_grad(), sums_in_float32():
        return _divergence(model, statistics, _all(statistics))


def stitch_and_score(
    model: nn.Module, graph: Graph, database: LayerDatabase, candidate: Candidate, give_up: float = math.inf
) -> tuple[nn.Module, float]:
    """Return the stitched candidate and its divergence, from one pass over the calibration data where that suffices.

    With ``give_up`` the first 64 samples are looked at alone: a divergence above it there is returned as it is, and saves the rest.
    """
    from autocomp.database.stitch import stitch

    stitched = stitch(model, graph, database, candidate, reestimate=False)
    if database.space.normalise(candidate) == database.space.dense():
        return stitched, 0.0
    statistics = database.statistics
    if give_up < math.inf and statistics.samples > FIRST:
        early = _score_first(stitched, model, statistics)
        if early > give_up:
            return stitched, early
    return stitched, _score(stitched, statistics, _all(statistics))


def score_early(model: nn.Module, graph: Graph, database: LayerDatabase, candidate: Candidate) -> float:
    """Return the divergence on the first 64 calibration samples, BatchNorm re-estimated on these: near the whole's, for a quarter.

    Not a number where the model's own code fails on the candidate.
    """
    from autocomp.database.stitch import stitch

    if database.space.normalise(candidate) == database.space.dense():
        return 0.0
    try:
        stitched = stitch(model, graph, database, candidate, reestimate=False)
        return _score_first(stitched, model, database.statistics)
    except Exception:  # the model's own code runs here
        return math.nan


def _score_first(stitched: nn.Module, dense: nn.Module, statistics: Statistics) -> float:
    """The divergence on the first 64 samples, less what the dense model has there: the error of so small a sample's BatchNorm statistics."""
    counts = _first(statistics)
    if statistics.fingerprint not in _FLOORS:
        _FLOORS[statistics.fingerprint] = _score(copy.deepcopy(dense), statistics, counts)
    return max(0.0, _score(stitched, statistics, counts) - _FLOORS[statistics.fingerprint])


def _all(statistics: Statistics) -> list[int]:
    """How many samples of each batch are looked at: all."""
    return [count(batch, statistics.axes) for batch in statistics.batches]


def _first(statistics: Statistics) -> list[int]:
    """64 of all: the first of each batch, as many as its share. Batches differ in their shapes, so none stands for the others."""
    sizes = _all(statistics)
    share = min(1.0, FIRST / sum(sizes))
    ends = [round(sum(sizes[: index + 1]) * share) for index in range(len(sizes))]
    return [min(size, end - start) for size, start, end in zip(sizes, [0, *ends], ends, strict=False)]


def _score(stitched: nn.Module, statistics: Statistics, counts: Sequence[int]) -> float:
    """Re-estimate BatchNorm on so many samples of each batch, and return the divergence there."""
    from autocomp.compress.batchnorm import reestimate_batchnorm

    batches = [part(batch, 0, n, statistics.axes) for batch, n in zip(statistics.batches, counts, strict=True) if n]
    with torch.no_grad(), sums_in_float32():
        answers = reestimate_batchnorm(stitched, batches, statistics.axes)
        return _divergence(stitched, statistics, counts, answers)


def _divergence(
    model: nn.Module, statistics: Statistics, counts: Sequence[int], answers: Sequence[Any] | None = None
) -> float:
    """The divergence over the first samples of each batch; ``answers`` are the model's to those that have any, where they are known."""
    known = iter(answers or ())

    def pairs() -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        for batch, rows, samples in zip(statistics.batches, statistics.answers, counts, strict=True):
            if samples:
                found = model(*part(batch, 0, samples, statistics.axes)) if answers is None else next(known)
                yield [x[:samples] for x in rows], statistics.comparison.rows(found, samples)

    return total(statistics.comparison, pairs())
