"""Pareto sets, knee and hypervolume: the definitions, on random points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autocomp.front.pareto import (
    gains,
    hypervolume,
    hypervolume_history,
    knee,
    pareto_set,
    promising,
    ranks,
    settled,
    spaced,
)

points = hnp.arrays(np.float64, st.tuples(st.integers(1, 25), st.just(2)), elements=st.integers(0, 9).map(float))
CORNER = (10.0, 10.0)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


@given(points)
def test_set_holds_exactly_what_nothing_dominates(rows: np.ndarray) -> None:
    front = set(pareto_set(rows).tolist())
    for k, row in enumerate(rows):
        beaten = any(dominates(other, row) for other in rows)
        copy = any((rows[j] == row).all() for j in range(k))
        assert (k in front) == (not beaten and not copy)


@given(points)
def test_set_is_ordered_from_fast_to_slow(rows: np.ndarray) -> None:
    front = rows[pareto_set(rows)]
    assert (np.diff(front[:, 1]) > 0).all()
    assert (np.diff(front[:, 0]) < 0).all()


@given(points)
@settings(max_examples=50)
def test_hypervolume_counts_unit_squares(rows: np.ndarray) -> None:
    grid = np.array([(x, y) for x in range(10) for y in range(10)], dtype=float)
    covered = sum(bool((rows <= cell).all(axis=1).any()) for cell in grid)
    assert hypervolume(rows, CORNER) == pytest.approx(covered)


@given(points)
def test_history_ends_at_the_hypervolume_and_never_falls(rows: np.ndarray) -> None:
    history = hypervolume_history(rows, CORNER)
    assert len(history) == len(rows)
    assert history[-1] == pytest.approx(hypervolume(rows, CORNER))
    assert (np.diff(history) >= -1e-12).all()


@given(points)
def test_ranks_peel_fronts(rows: np.ndarray) -> None:
    rank = ranks(rows)
    assert set(np.flatnonzero(rank == 0)) == set(pareto_set(rows).tolist())
    assert (rank >= 0).all()
    for k, row in enumerate(rows):
        better = [rank[j] for j in range(len(rows)) if dominates(rows[j], row)]
        assert all(rank[k] > other for other in better)


@given(points, st.integers(0, 30))
def test_spaced_takes_the_front_first_and_nothing_twice(rows: np.ndarray, count: int) -> None:
    chosen = spaced(rows, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(rows))
    front = set(pareto_set(rows).tolist())
    assert set(chosen[: len(front)]) <= front


def test_spaced_spreads() -> None:
    x = np.linspace(0, 1, 101)
    chosen = spaced(np.stack([1 - x, x], axis=1), 5)
    assert chosen[:3] == [0, 100, 50]
    assert sorted(chosen)[1:4] == [25, 50, 75]


def test_knee() -> None:
    assert knee([(10, 1), (2, 2), (1, 10), (9, 9)]) == 1
    assert knee([(1, 1)]) == 0
    assert knee([(0, 1), (1, 0)]) == 0, "of two points, which are equally near, the more accurate"
    assert knee([(1, 0), (0, 1)]) == 1
    assert knee([(0, 2), (1, 1), (2, 0)]) == 1, "of a straight front the middle"
    assert knee([]) is None
    noisy = [(0.0, 10.0), (0.1, 2.0), (0.2, 1.5), (1.0, 1.0), (0.15, 3.0)]
    assert knee(noisy) == 1
    assert knee(noisy, errors=[0.2] * 5) == 2, "the fastest of those within their own standard error"
    assert knee(noisy, errors=[0.0] * 5) == 1
    assert knee([], errors=[]) is None
    scaled = np.array([(10, 1), (2, 2), (1, 10)]) * [1e-6, 1e3]
    assert knee(scaled) == 1


def test_values_that_are_not_finite_stand_aside() -> None:
    rows = [(np.nan, 0.0), (1.0, 1.0), (np.inf, 0.5)]
    assert pareto_set(rows).tolist() == [1]
    assert ranks(rows).tolist() == [-1, 0, -1]
    assert spaced(rows, 3) == [1]
    assert hypervolume(rows, (2.0, 2.0)) == 1.0
    assert hypervolume_history(rows, (2.0, 2.0)) == [0.0, 1.0, 1.0]
    assert hypervolume([], (1.0, 1.0)) == 0.0


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(st.floats(0, 2), st.floats(-3, 1)), min_size=1, max_size=8),
    front=st.lists(st.tuples(st.floats(0, 2), st.floats(-3, 1)), max_size=8),
)
def test_a_gain_is_the_difference_of_hypervolumes(points, front):
    reference = (1.0, 0.0)
    before = hypervolume(front, reference)
    for point, gain in zip(points, gains(points, front, reference), strict=True):
        assert gain == pytest.approx(hypervolume([*front, point], reference) - before, abs=1e-9)


def test_promising_points_fill_the_gaps_of_what_is_known():
    known = [(0.1, -1.0)]
    points = [(0.1, -1.01), (0.3, -2.0), (0.05, -0.1), (5.0, -9.0), (np.nan, -9.0), (0.02, -0.5)]
    assert promising(points, known, 2, (1.0, 0.0)) == [1, 5], "a near copy of a known point adds least"
    assert promising(points, known, 9, (1.0, 0.0)) == [1, 5, 0, 3, 2], (
        "what adds nothing comes last, what is not finite never"
    )
    assert promising([], known, 3, (1.0, 0.0)) == []
    assert promising([(5.0, -1.0), (6.0, -2.0)], [], 1, (1.0, 0.0)) == [1], (
        "where nothing is of use, the front is spread"
    )


def test_sums_in_another_order_are_no_gain() -> None:
    values = [0.995, 0.8625, 0.99]
    one, other = sum(values) / 3, (values[2] + values[1] + values[0]) / 3
    assert settled(one) == settled(other)
    assert settled(0.9491666666666666) == settled(0.9491666666666667)
    assert settled(-1e-300) == -1e-300
