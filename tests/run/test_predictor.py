"""What a short training will leave, from what it left of others."""

from __future__ import annotations

import numpy as np
import pytest

from autocomp.run.predictor import ENOUGH, fitted, left_out


def losses(rows: np.ndarray) -> list[float]:
    """A loss that grows with the divergence and with what is narrow."""
    return [float(value) for value in np.exp(0.8 * rows[:, 0] + 0.3 * rows[:, 1] - 0.2 * rows[:, 2]) * 0.01]


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 4))


def test_others_are_ranked_as_they_turn_out() -> None:
    from scipy.stats import spearmanr

    known, asked = rows(12), np.random.default_rng(1).normal(size=(40, 4))
    predictor = fitted(known, losses(known), 1e-6)
    assert predictor is not None
    assert float(spearmanr(predictor(asked), losses(asked)).statistic) > 0.95
    assert float(spearmanr(left_out(known, losses(known), 1e-6), losses(known)).statistic) > 0.9


def test_too_few_say_nothing_and_gains_are_no_losses() -> None:
    few = rows(ENOUGH - 1)
    assert fitted(few, losses(few), 1e-3) is None
    assert left_out(rows(ENOUGH), losses(rows(ENOUGH)), 1e-3) == []
    predictor = fitted(rows(6), [-0.01] * 6, 1e-3)
    assert predictor is not None
    assert predictor(rows(3)) == pytest.approx(np.zeros(3), abs=1e-9)


def test_features_that_are_all_the_same_say_nothing() -> None:
    known = rows(8)
    known[:, 3] = 2.0
    predictor = fitted(known, losses(known), 1e-6)
    assert predictor is not None
    assert np.isfinite(predictor(rows(5))).all()
