"""How minutes are shared out, on a clock of the test's own."""

from __future__ import annotations

import math

import pytest

from autocomp.run import budget
from autocomp.run.budget import Budget


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    return clock


def test_the_end_has_its_part_of_the_minutes(clock: Clock) -> None:
    whole = Budget(10)
    whole.keep_for_the_end(point=20.0, together=2, references=False)
    assert whole.kept == 20.0 * budget.POINTS / 2
    clock.now += 400
    assert whole.left() == 200
    assert whole.to_search() == 200 - whole.kept
    assert not whole.late()
    assert not whole.late(100)
    assert whole.late(150)
    clock.now += 150
    assert whole.late()
    assert whole.left() > 0, "which the end of the run still has"


def test_the_end_never_takes_all(clock: Clock) -> None:
    short = Budget(1)
    short.keep_for_the_end(point=100.0, together=1, references=True)
    assert short.kept == 30
    assert not short.late()


def test_without_minutes_nothing_is_ever_late(clock: Clock) -> None:
    free = Budget(None)
    free.keep_for_the_end(100.0, 1, True)
    clock.now += 1e9
    assert not free.late(1e9)
    assert free.left() == math.inf
    assert free.forecast("compressing", 1e9) == ""


def test_minutes_that_cannot_be_kept_are_told_in_time_with_some_that_can(clock: Clock) -> None:
    short = Budget(1)
    short.keep_for_the_end(10.0, 4, False)
    clock.now += 10
    assert short.forecast("compressing", 20) == ""
    said = short.forecast("compressing", 170)
    assert said.startswith("--minutes 1 cannot be kept: compressing will have taken about 3.0 minutes")
    enough = Budget(float(said.split()[-3]))
    enough.keep_for_the_end(10.0, 4, False)
    clock.now += 10
    assert enough.forecast("compressing", 170) == ""
    assert enough.to_search() > 170 + 60
