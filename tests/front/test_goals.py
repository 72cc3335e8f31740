"""Goals: what misses them and by what, and which evaluation is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from autocomp.errors import InfeasibleError
from autocomp.front.goals import best, feasible, violations
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.records.latency import Latency


@dataclass(frozen=True)
class Goals:
    max_drop: float | None = None
    max_latency: float | None = None
    max_bytes: int | None = None


def evaluation(
    trial: int, accuracy: float | None, ms: float | None, size: int = 100_000, failed: bool = False
) -> Evaluation:
    latency = {} if ms is None else {"x86-host": Latency(ms * 1e-3, 0.01, "measured", "x86-host")}
    return Evaluation(
        trial, Candidate({"g": 64 - trial}, {}), "solver", "failed" if failed else "measured", 0.1, size,
        metrics={} if accuracy is None else {"accuracy": accuracy}, latency=latency,
        failure="outputs differ at conv1" if failed else None,
    )  # fmt: skip


DENSE = evaluation(0, 0.98, 1.0, 400_000)
RUN = [DENSE, evaluation(1, 0.975, 0.5), evaluation(2, 0.97, 0.4, 90_000), evaluation(3, 0.90, 0.2, 50_000)]


@pytest.mark.parametrize(
    ("goals", "trial"),
    [
        (Goals(max_drop=0.01), 2),  # the fastest that keeps the accuracy; the drop is exactly the limit
        (Goals(max_drop=0.006), 1),
        (Goals(max_latency=0.45e-3), 2),  # the most accurate that is fast enough
        (Goals(max_bytes=60_000), 3),
        (Goals(max_drop=0.1, max_latency=0.5e-3), 3),
        (Goals(), 2),  # the knee
    ],
)
def test_best(goals: Goals, trial: int) -> None:
    assert best(RUN, DENSE, goals, "accuracy").trial == trial


def test_lower_may_be_better() -> None:
    assert best(RUN, DENSE, Goals(max_latency=0.45e-3), "accuracy", higher_is_better=False).trial == 3


def test_violations_say_by_what() -> None:
    goals = Goals(max_drop=0.01, max_latency=0.1e-3, max_bytes=10_000)
    assert violations(RUN[3], DENSE, goals, "accuracy") == [
        "accuracy drops by 0.08, more than max_drop 0.01",
        "0.2 ms on x86-host, more than max_latency 0.1 ms",
        "50 kB, more than max_bytes 10 kB",
    ]
    assert feasible(RUN[2], DENSE, Goals(max_drop=0.01), "accuracy")


def test_what_was_not_measured_or_failed_is_not_feasible() -> None:
    assert violations(evaluation(4, 0.98, None), DENSE, Goals(max_latency=1.0), "accuracy")
    assert violations(evaluation(4, None, 0.1), DENSE, Goals(max_drop=0.01), "accuracy")
    assert violations(evaluation(4, 0.98, 0.1, failed=True), DENSE, Goals(), "accuracy") == [
        "it failed: outputs differ at conv1"
    ]


def test_nothing_feasible_names_the_nearest() -> None:
    message = r"none of 4 .* the nearest, trial 3: 0\.2 ms on x86-host.*relax"
    with pytest.raises(InfeasibleError, match=message) as caught:
        best(RUN, DENSE, Goals(max_latency=0.1e-3), "accuracy")
    assert caught.value.exit_code == 3
    with pytest.raises(InfeasibleError, match="no candidate was measured"):
        best([], DENSE, Goals(), "accuracy")


def noisy(one: Evaluation) -> Evaluation:
    return replace(one, latency={name: replace(latency, noisy=True) for name, latency in one.latency.items()})


@pytest.mark.parametrize("goals", [Goals(max_drop=0.01), Goals()])
def test_a_noisy_one_is_taken_only_where_all_are(goals: Goals) -> None:
    assert best([noisy(e) if e.trial == 2 else e for e in RUN], DENSE, goals, "accuracy").trial == 1
    assert best([noisy(e) for e in RUN], DENSE, goals, "accuracy").trial == 2
