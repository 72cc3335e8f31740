"""Tier 1: the divergence of a stitched model's answers from those of the dense one, on the calibration data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.accuracy.calibrate import logits_of
from autocomp.compress.quantize import sums_in_float32

if TYPE_CHECKING:
    from autocomp.accuracy.calibrate import Statistics
    from autocomp.compress.database import LayerDatabase
    from autocomp.graph import Graph
    from autocomp.records import Candidate


def kl(model: nn.Module, statistics: Statistics) -> float:
    """Return the mean KL(dense || model) over the calibration samples, in nats; infinite if it is not finite."""
    with torch.no_grad(), sums_in_float32():
        return divergence(statistics.logits, _answers(model, statistics.batches))


def _answers(model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
    return torch.cat([logits_of(model(*batch)) for batch in batches])


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Return the mean KL(teacher || student) of logits [N, classes], in nats; infinite if not finite."""
    expected = functional.log_softmax(teacher.detach().double(), dim=-1)
    actual = functional.log_softmax(student.detach().double(), dim=-1)
    value = float(functional.kl_div(actual, expected, reduction="batchmean", log_target=True))
    return max(0.0, value) if math.isfinite(value) else math.inf


FIRST = 64  # samples a candidate is judged on first; on the built-in tasks their KL is within a fifth of that of 256


def stitch_and_score(
    model: nn.Module, graph: Graph, database: LayerDatabase, candidate: Candidate, give_up: float = math.inf
) -> tuple[nn.Module, float]:
    """Return the stitched candidate and its divergence, from one pass over the calibration data where that suffices.

    With ``give_up`` the first 64 samples are looked at alone: a divergence above it there is returned as it is, and saves the rest.
    """
    from autocomp.compress.apply import stitch

    stitched = stitch(model, graph, database, candidate, reestimate=False)
    if database.space.normalise(candidate) == database.space.dense():
        return stitched, 0.0
    statistics = database.statistics
    if give_up < math.inf and len(statistics.logits) > FIRST:
        early = _score(stitched, statistics.logits, _first(statistics.batches))
        if early > give_up:
            return stitched, early
    return stitched, _score(stitched, statistics.logits, statistics.batches)


def score_early(model: nn.Module, graph: Graph, database: LayerDatabase, candidate: Candidate) -> float:
    """Return the divergence on the first 64 calibration samples, BatchNorm re-estimated on these: near the whole's, for a quarter."""
    from autocomp.compress.apply import stitch

    if database.space.normalise(candidate) == database.space.dense():
        return 0.0
    stitched = stitch(model, graph, database, candidate, reestimate=False)
    return _score(stitched, database.statistics.logits, _first(database.statistics.batches))


def _first(batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    first, left = [], FIRST
    for batch in batches:
        if left > 0:
            first.append(tuple(tensor[:left] for tensor in batch))
            left -= len(batch[0])
    return first


def _score(stitched: nn.Module, logits: Tensor, batches: Sequence[tuple[Tensor, ...]]) -> float:
    """Re-estimate BatchNorm on the data or the first part of it, and return the divergence there."""
    from autocomp.compress.apply import reestimate_batchnorm

    with sums_in_float32(), torch.no_grad():
        answers = reestimate_batchnorm(stitched, batches)
        if answers is None:
            answers = _answers(stitched, batches)
    return divergence(logits[: len(answers)], answers)
