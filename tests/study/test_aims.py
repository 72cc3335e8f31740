"""Which candidates are worth measuring where goals are set."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autocomp.config.settings import Goals
from autocomp.front.goals import Judge
from autocomp.front.pareto import Floats
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.records.latency import Latency
from autocomp.study.aims import Aim, Known, aims, choose, worth


def measured(trial: int, kl: float, accuracy: float, seconds: float, size: int = 100) -> Evaluation:
    latency = {"host": Latency(seconds, 0.01, "measured", "host")}
    candidate = Candidate({"g": trial}, {})
    return Evaluation(trial, candidate, "solver", "measured", kl, size, {}, kl, {"accuracy": accuracy}, latency)


DENSE = measured(0, 0.0, 0.9, 1.0)
# each nat costs one of accuracy
RUN = [DENSE, measured(1, 0.005, 0.895, 0.6), measured(2, 0.02, 0.88, 0.4), measured(3, 0.1, 0.8, 0.2)]
TIMES = {"host": [e.latency["host"].seconds for e in RUN]}
KNOWN = Known.of(RUN, TIMES)


def value(goals: Goals, points: list[tuple[float, float]], factor: float | None = None, size: int = 100) -> Floats:
    waiting = [measured(10 + k, kl, math.nan, seconds, size) for k, (kl, seconds) in enumerate(points)]
    here = Known.of(waiting, {"host": [seconds for _, seconds in points]})
    return worth(Aim("host", factor), Judge(DENSE, goals, "accuracy"), here, RUN, KNOWN, KNOWN.seconds)


def test_worth_is_the_chance_to_meet_a_drop_times_what_is_gained() -> None:
    slower, sure, bold, hopeless = value(Goals(max_drop=0.01), [(0.004, 0.7), (0.006, 0.5), (0.011, 0.35), (0.09, 0.1)])
    assert slower == 0, "what is no faster than the best feasible one gains nothing"
    assert min(sure, bold) > 0
    assert hopeless < min(sure, bold), "a candidate as far away as one that lost too much"


def test_a_latency_is_met_by_the_most_accurate() -> None:
    fast, slow, worse = value(Goals(max_latency="2x"), [(0.01, 0.45), (0.01, 0.7), (0.03, 0.45)])
    assert fast > 0.5
    assert slow < 1e-6
    assert worse == 0, "0.02 nats are met at 2.5x already"


def test_a_member_of_the_family_is_a_latency_goal() -> None:
    reached, not_fast = value(Goals(), [(0.05, 0.24), (0.05, 0.3)], factor=4.0)
    assert reached > 1e-3 > not_fast
    assert value(Goals(max_size=50), [(0.05, 0.24)], factor=4.0) == [0.0], "it is too large"


def test_each_aim_chooses_in_turn_and_none_chooses_twice_the_same() -> None:
    waiting = Known(np.array([0.01, 0.01001, 0.05, 0.2]), np.full(4, 100.0), {"host": np.log([0.5, 0.5001, 0.3, 0.1])})
    assert choose([np.array([1.0, 0.99, 0.5, 0.0])], waiting, 2) == [0, 2], "a twin of a chosen one tells little more"
    assert choose([np.array([1.0, 0.9, 0.0, 0.0]), np.array([0.0, 0.0, 0.0, 1.0])], waiting, 2) == [0, 3]
    assert choose([np.zeros(4)], waiting, 2) == []


@pytest.mark.parametrize(
    ("goals", "factors", "expected"),
    [
        (Goals(), [], []),
        (Goals(max_drop=0.1), [], [Aim("a"), Aim("b")]),
        (Goals(), [2.0], [Aim("a", 2.0), Aim("b", 2.0)]),
    ],
)
def test_aims_are_of_goals_and_family(goals: Goals, factors: list[float], expected: list[Aim]) -> None:
    assert aims(Judge(DENSE, goals, "accuracy"), ["a", "b"], factors) == expected
