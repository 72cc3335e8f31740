"""Which layers told candidates apart: exact shares of the variance of a sum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import random_problem

from autocomp.records.candidate import Candidate
from autocomp.study.deciders import deciders
from autocomp.study.solver import Problem


def drawn(problem: Problem, count: int, seed: int) -> list[Candidate]:
    rng = np.random.default_rng(seed)
    return [problem.decode(rng.integers(problem.sizes)) for _ in range(count)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), layers=st.integers(2, 12), count=st.integers(2, 60))
def test_shares_sum_to_one(seed: int, layers: int, count: int) -> None:
    problem = random_problem(seed, layers=layers)
    candidates = drawn(problem, count, seed)
    found = deciders(problem, candidates, most=len(problem.factors))
    error, seconds, _ = problem.costs(np.stack([problem.encode(candidate) for candidate in candidates]))
    assert len(found) == len(problem.factors)
    for total, whole in ((sum(d.divergence for d in found), error), (sum(d.seconds for d in found), seconds)):
        assert total == pytest.approx(1.0 if whole.std() > 1e-9 * abs(whole.mean()) else 0.0, abs=1e-6)


def test_the_one_layer_that_varies_decides_all() -> None:
    problem = random_problem(3, layers=6)
    dense = problem.decode(np.zeros(len(problem.sizes), dtype=int))
    layer = problem.factors[2].layer
    candidates = [Candidate(dense.widths, {**dense.methods, layer: m}) for m in problem.factors[2].methods]
    first, *others = deciders(problem, candidates, most=6)
    assert (first.layer, first.seconds) == (layer, pytest.approx(1.0))
    assert all(other.seconds == pytest.approx(0.0) for other in others)


def test_one_candidate_decides_nothing() -> None:
    problem = random_problem(3, layers=6)
    assert deciders(problem, drawn(problem, 1, 0)) == ()
