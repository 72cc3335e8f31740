"""What decides which candidates are tried and measured: measured times, but for a deterministic run predicted ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from autocomp.config.settings import Goals
from autocomp.front.goals import Judge
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.records.latency import Latency
from autocomp.run.found import Found
from autocomp.study.aims import Aim, Known, thought_misses, worth

PREDICTED = {"dense": 1.0e-3, "half": 0.6e-3, "quarter": 0.3e-3}


def evaluation(trial: int, name: str, measured: float, divergence: float) -> Evaluation:
    latency = {"x86-host": Latency(measured, 0.01, "measured", "x86-host")}
    return Evaluation(
        trial, Candidate({name: 1}, {}), "dense" if name == "dense" else "solver", "measured", divergence, 100,
        {"x86-host": PREDICTED[name]}, divergence, {"accuracy": 0.9 - divergence}, latency,
    )  # fmt: skip


class Steered(Found):
    """As much of what a run has found as steers it; the machine is ``factor`` times slower when the uncompressed model is timed."""

    def __init__(self, deterministic: bool, factor: float) -> None:
        self.prepared = cast("Any", SimpleNamespace(settings=SimpleNamespace(deterministic=deterministic)))
        self.costs = cast("Any", SimpleNamespace(predict=lambda c: {"x86-host": PREDICTED[next(iter(c.widths))]}))
        self.evaluations = [evaluation(0, "dense", 1.1e-3 * factor, 0.0), evaluation(1, "half", 0.5e-3, 0.1)]

    def judge(self) -> Judge:
        return Judge(self.evaluations[0], Goals(max_latency=0.55e-3, max_drop=0.2), "accuracy")


def steer(found: Steered) -> tuple[Any, ...]:
    """The constraints of a told candidate, and what measuring it is worth."""
    judge, measured = found.steering_judge(), found.steered(found.evaluations)
    told = evaluation(2, "quarter", 0.3e-3, 0.15)
    waiting, known = (
        Known.of(e, {"x86-host": [PREDICTED[next(iter(x.candidate.widths))] for x in e]}) for e in ([told], measured)
    )
    worths = worth(Aim("x86-host"), judge, waiting, measured, known, known.seconds)
    return thought_misses(told, judge, measured), worths.tolist()


@pytest.mark.parametrize("factor", [1.0, 1.5, 3.0])
def test_a_slow_moment_changes_nothing_in_a_deterministic_run(factor: float) -> None:
    assert steer(Steered(True, factor)) == steer(Steered(True, 1.0))


def test_other_runs_follow_what_was_measured() -> None:
    assert steer(Steered(False, 3.0)) != steer(Steered(False, 1.0))
    assert Steered(False, 3.0).steering_judge().dense.latency["x86-host"].seconds == pytest.approx(3.3e-3)
