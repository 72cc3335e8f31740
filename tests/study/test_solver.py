"""The solver: exact against brute force, even along the latency range, and quick."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from problems import METHODS, random_problem

from autocomp.front.pareto import hypervolume
from autocomp.records.candidate import Candidate
from autocomp.study.solver import Factor, Problem, make_problem, minimise, neighbours, solve_front


def every(problem: Problem) -> np.ndarray:
    return np.array(list(itertools.product(*map(range, problem.sizes))))


def small(seed: int) -> Problem:
    return random_problem(seed, layers=5, widths=3, methods=3)  # 3 groups and 5 layers: 6561 candidates


@pytest.mark.parametrize("seed", range(6))
def test_a_price_is_solved_exactly(seed: int) -> None:
    problem = small(seed)
    error, seconds, _ = problem.costs(every(problem))
    prices = np.stack([np.ones(20), np.geomspace(1, 1e6, 20)], axis=1)
    found = problem.costs(minimise(problem, prices))
    for (of_error, of_seconds), e, s in zip(prices, found[0], found[1], strict=True):
        assert of_error * e + of_seconds * s == pytest.approx((of_error * error + of_seconds * seconds).min())


def test_coordinate_descent_stays_within_a_few_percent() -> None:
    gaps = []
    for seed in range(6):
        problem = small(seed)
        error, seconds, _ = problem.costs(every(problem))
        prices = np.stack([np.ones(20), np.geomspace(1, 1e6, 20)], axis=1)
        found = problem.costs(minimise(problem, prices, exact=False))
        best = (prices[:, :1] * error + prices[:, 1:] * seconds).min(axis=1)
        gaps.append((prices[:, 0] * found[0] + prices[:, 1] * found[1]) / best - 1)
    assert np.mean(gaps) < 0.01
    assert np.max(gaps) < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_front_against_brute_force(seed: int) -> None:
    problem = small(seed)
    points = np.stack(problem.costs(every(problem))[:2], axis=1)
    found = np.array([problem.cost(candidate)[:2] for candidate in solve_front(problem, 60)])
    corner = (points[:, 0].max(), points[:, 1].max())
    assert hypervolume(found, corner) > 0.98 * hypervolume(points, corner)


@pytest.mark.parametrize("shape", [(12, 4, 5), (60, 8, 8)])
@pytest.mark.parametrize("exact", [True, False])
def test_spacing(shape: tuple[int, int, int], exact: bool) -> None:
    problem = random_problem(0, *shape)
    if not exact:
        problem = dataclasses.replace(problem, order=None)
    front = solve_front(problem, 40)
    seconds = np.array([problem.cost(candidate).seconds for candidate in front])
    assert 30 <= len(front) <= 40
    assert len(set(front)) == len(front)
    assert (np.diff(seconds) < 0).all()
    # Even spacing would put a fortieth of the range between neighbours.
    assert np.diff(seconds).min() > -0.1 * (seconds[0] - seconds[-1])
    errors = [problem.cost(candidate).error for candidate in front]
    assert errors == sorted(errors)


def test_the_front_ends_at_the_cheapest_of_both_axes() -> None:
    problem = small(1)
    front = solve_front(problem, 10)
    error, seconds, _ = problem.costs(every(problem))
    assert problem.cost(front[0]).error == pytest.approx(error.min())
    assert problem.cost(front[-1]).seconds == pytest.approx(seconds.min())


def test_levels_round_trip_and_costs_add_up() -> None:
    problem = random_problem(3)
    rng = np.random.default_rng(0)
    rows = rng.integers(problem.sizes, size=(1000, len(problem.sizes)))
    for row in rows[:20]:
        assert (problem.encode(problem.decode(row)) == row).all()
    error, seconds, size = problem.costs(rows)
    cost = problem.cost(problem.decode(rows[7]))
    assert (cost.error, cost.seconds) == (error[7], seconds[7])
    assert cost.bytes == int(size[7])


def test_neighbours_change_one_thing() -> None:
    problem = random_problem(0)
    dense = problem.decode(np.zeros(len(problem.sizes), dtype=int))
    around = neighbours(problem, dense)
    # From dense every group can only shrink, and every layer take one of the other methods.
    assert len(around) == len(set(around)) == len(problem.groups) + len(problem.factors) * 4
    for other in around:
        changes = sum(other.widths[g] != dense.widths[g] for g in dense.widths)
        assert changes + sum(other.methods[m] != dense.methods[m] for m in dense.methods) == 1


def table(*values: float) -> np.ndarray:
    return np.array(values).reshape(1, 1, -1)


def test_forbidden_combinations_are_never_taken() -> None:
    factor = Factor("a", None, None, (8,), (8,), METHODS[:2], table(0, np.inf), table(1.0, 0.1), table(4, 1))
    problem = make_problem([factor], {})
    assert {c.methods["a"] for c in solve_front(problem, 5)} == {METHODS[0]}


def test_a_layer_within_one_group_is_read_on_the_diagonal() -> None:
    grid = np.array([[0.0, 9.0], [9.0, 1.0]])[..., None]
    factor = Factor("depthwise", "g", "g", (32, 16), (32, 16), METHODS[:1], grid, grid[::-1, ::-1], grid)
    problem = make_problem([factor], {"g": (32, 16)}, fixed_seconds=0.5, fixed_bytes=100)
    front = solve_front(problem, 5)
    assert [candidate.widths["g"] for candidate in front] == [32, 16]
    assert [problem.cost(candidate) for candidate in front] == [(0.0, 1.5, 100), (1.0, 0.5, 101)]


def test_wide_graphs_of_groups_fall_back_to_descent() -> None:
    groups = {f"g{k}": tuple(range(8, 0, -1)) for k in range(8)}
    rng = np.random.default_rng(0)
    factors = [
        Factor(f"{a}-{b}", a, b, groups[a], groups[b], METHODS[:1], *rng.random((3, 8, 8, 1)))
        for a, b in itertools.combinations(groups, 2)
    ]
    problem = make_problem(factors, groups)
    assert problem.order is None
    assert len(solve_front(problem, 20)) > 2  # random tables have few points worth a thought


def test_no_choice_at_all() -> None:
    factor = Factor("a", None, None, (8,), (8,), METHODS[:1], table(0), table(1.0), table(4))
    problem = make_problem([factor], {})
    assert solve_front(problem, 5) == [Candidate({}, {"a": METHODS[0]})]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": table(0, np.nan)}, "layer 'a': table 'error' holds NaN"),
        ({"seconds": table(1.0)}, r"table 'seconds' has shape \(1, 1, 1\), not \(1, 1, 2\)"),
        ({"in_group": "x"}, "1 widths for group 'x', which has -1"),
    ],
)
def test_bad_tables_are_refused(change: dict[str, object], message: str) -> None:
    factor = Factor("a", None, None, (8,), (8,), METHODS[:2], table(0, 1), table(1.0, 0.1), table(4, 1))
    with pytest.raises(ValueError, match=message):
        make_problem([dataclasses.replace(factor, **change)], {})
