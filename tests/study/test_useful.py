"""The divergence up to which candidates are of use, read off what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autocomp.config.settings import Goals
from autocomp.front.goals import Judge
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.study.useful import LEAST, MOST, UNKNOWN, of_use, useful_divergence

DENSE = Evaluation(0, Candidate({}, {}), "dense", "measured", 0.0, 100, kl=0.0, metrics={"score": 0.8})


def measured(*points: tuple[float, float]) -> list[Evaluation]:
    """The uncompressed model, and others of these divergences and scores."""
    return [
        DENSE,
        *(replace(DENSE, trial=n, kl=kl, metrics={"score": score}) for n, (kl, score) in enumerate(points, 1)),
    ]


@pytest.mark.parametrize(
    ("goals", "higher", "expected"),
    [
        (Goals(), True, 0.04),  # 5 % of 0.8, where a nat costs 1
        (Goals(max_drop=0.01), True, 0.015),
        (Goals(max_drop=0.01), False, UNKNOWN),  # an error that only falls: nothing is lost
    ],
)
def test_what_was_lost_says_how_far_to_go(goals: Goals, higher: bool, expected: float) -> None:
    known = measured((0.1, 0.7), (0.2, 0.6), (0.4, 0.0))
    assert useful_divergence(known, Judge(DENSE, goals, "score", higher)) == pytest.approx(expected)


def test_an_error_may_grow_by_half() -> None:
    assert useful_divergence(measured((0.1, 0.9)), Judge(DENSE, Goals(), "score", False)) == pytest.approx(0.4)


@pytest.mark.parametrize("known", [measured(), measured((0.1, 0.8)), measured((0.1, 0.85)), []])
def test_where_nothing_was_lost_nothing_is_known(known: list[Evaluation]) -> None:
    assert useful_divergence(known, Judge(DENSE, Goals(), "score")) == UNKNOWN


def test_an_objective_that_is_perfect_leaves_something_to_look_at() -> None:
    dense = replace(DENSE, metrics={"score": 1e-12})
    points = [dense, replace(DENSE, trial=1, kl=0.1, metrics={"score": 0.5})]
    assert useful_divergence(points, Judge(dense, Goals(), "score", False)) == LEAST


def test_nothing_is_of_use_where_nothing_is_left_however_slowly_the_metric_fell() -> None:
    known = measured((0.1, 0.7999), (0.2, 0.7998))
    assert useful_divergence(known, Judge(DENSE, Goals(), "score")) == MOST


def test_what_answers_by_chance_is_left_out_unless_all_do() -> None:
    near, far, failed = (replace(DENSE, trial=n, kl=kl) for n, kl in enumerate((0.3, 2.5, None), 1))
    assert of_use([far, near, failed]) == [near]
    assert of_use([far, failed]) == [far]
