"""Tier 1: the divergence of a stitched model's answers from those of the dense one, on the calibration data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.accuracy.calibrate import logits_of

if TYPE_CHECKING:
    from autocomp.accuracy.calibrate import Statistics
    from autocomp.compress.database import LayerDatabase
    from autocomp.graph import Graph
    from autocomp.records import Candidate


def kl(model: nn.Module, statistics: Statistics) -> float:
    """Return the mean KL(dense || model) over the calibration samples, in nats; infinite if it is not finite."""
    with torch.no_grad():
        answers = torch.cat([logits_of(model(*batch)) for batch in statistics.batches])
    return divergence(statistics.logits, answers)


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Return the mean KL(teacher || student) of logits [N, classes], in nats; infinite if not finite."""
    expected = functional.log_softmax(teacher.double(), dim=-1)
    actual = functional.log_softmax(student.double(), dim=-1)
    value = float(functional.kl_div(actual, expected, reduction="batchmean", log_target=True))
    return max(0.0, value) if math.isfinite(value) else math.inf


def stitch_and_score(
    model: nn.Module, graph: Graph, database: LayerDatabase, candidate: Candidate
) -> tuple[nn.Module, float]:
    """Return the stitched candidate and its divergence, from one pass over the calibration data where that suffices."""
    from autocomp.compress.apply import stitch_and_answer

    stitched, answers = stitch_and_answer(model, graph, database, candidate)
    if answers is None:
        return stitched, kl(stitched, database.statistics)
    return stitched, divergence(database.statistics.logits, answers)
