"""What a short training will leave of a candidate's loss: fitted to those that were trained, and asked of those that were not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocomp.front.goals import Judge
from autocomp.front.pareto import Floats
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.run.entrants import relative
from autocomp.run.found import Found
from autocomp.study.useful import tolerated

# Chosen by hand, not measured.
ENOUGH = 4  # trained candidates to fit to
RIDGE = 1.0  # of coefficients of standardised features, in the weight of so many candidates
LITTLE = 0.1  # of the drop up to which a front is of use: losses below it are alike


@dataclass(frozen=True)
class Predictor:
    """A ridge regression of the logarithm of the loss that is left on `features`."""

    centre: Floats
    scale: Floats
    weights: Floats
    offset: float
    little: float

    def __call__(self, rows: Floats) -> Floats:
        """The predicted loss of the objective, in its units, of rows of features ``[n, 4]``."""
        logs = (rows - self.centre) / self.scale @ self.weights + self.offset
        found: Floats = np.exp(np.clip(logs, -50, 50)) - self.little
        return found


def fitted(rows: Floats, drops: Sequence[float], little: float) -> Predictor | None:
    """Fit to rows of features ``[n, 4]`` and what was lost after training, in the objective's units; None where there are too few."""
    if len(rows) < ENOUGH:
        return None
    target = np.log(np.maximum(drops, 0.0) + little)
    centre, scale = rows.mean(0), np.maximum(rows.std(0), 1e-9)
    scaled = (rows - centre) / scale
    weights = np.linalg.solve(scaled.T @ scaled + RIDGE * np.eye(rows.shape[1]), scaled.T @ (target - target.mean()))
    return Predictor(centre, scale, weights, float(target.mean()), little)


def left_out(rows: Floats, drops: Sequence[float], little: float) -> list[float]:
    """For each row what a fit to all others says of it; empty where they are too few."""
    if len(rows) <= ENOUGH:
        return []
    found = []
    for index in range(len(rows)):
        others = [k for k in range(len(rows)) if k != index]
        predictor = fitted(rows[others], [drops[k] for k in others], little)
        assert predictor is not None
        found.append(float(predictor(rows[index : index + 1])[0]))
    return found


def features(found: Found, evaluations: Sequence[Evaluation]) -> Floats:
    """Of told candidates ``[n, 4]``, as logarithms: the divergence, the share of it that narrow layers have by the tables, size and seconds over
    dense's. What is small has less to learn with, and what was rounded comes back more easily than what was taken away."""
    problem, space = found.costs.problem(), found.prepared.space
    dense, full = found.dense(), space.dense()
    times = relative(found, evaluations)
    rows = []
    for e in evaluations:
        whole = problem.cost(space.normalise(e.candidate)).error
        narrow = problem.cost(space.normalise(Candidate(e.candidate.widths, full.methods))).error
        share = min(1.0, max(narrow, 0.0) / whole) if whole > 0 else 0.0
        rows.append([_log(e.kl or 0.0), _log(share + 0.01), _log(e.bytes / max(1, dense.bytes)), _log(times[e.trial])])
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def little(judge: Judge) -> float:
    """The loss below which losses are alike, in the objective's units."""
    return max(LITTLE * tolerated(judge), 1e-9)


def predictions(found: Found, evaluations: Sequence[Evaluation], drops: Mapping[int, float]) -> dict[int, float]:
    """By trial, what a fit to the other trained candidates says of the loss of each after its first training."""
    known = [e for e in evaluations if e.trial in drops]
    values = left_out(features(found, known), [drops[e.trial] for e in known], little(found.judge()))
    return {e.trial: value for e, value in zip(known, values, strict=False)}


def _log(value: float) -> float:
    return float(np.log(max(value, 1e-9)))
