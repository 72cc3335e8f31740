"""What a search expects of itself: thought of once, before its first trial, and not touched by what it measures."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from autocomp.api import SearchResult
from autocomp.records.evaluation import Evaluation
from autocomp.records.expected import ExpectedPoint
from autocomp.run import expect
from autocomp.run.expect import expected_of

pytestmark = pytest.mark.usefixtures("short_tuning", "without_exports")


@pytest.mark.slow
def test_it_is_thought_before_the_first_trial_and_stays(
    small: Callable[..., SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    real = expect.expect

    def watched(found: Any, trial: float | None) -> None:
        real(found, trial)
        told.append(len(found.told))

    monkeypatch.setattr("autocomp.run.explore.expect", watched)
    first = small().run.expected
    again = small(trials=6, measurements=2, resume=True).run.expected
    assert told[0] == 0
    assert told[1] > 0
    assert first is not None
    assert again is not None
    assert (again.points, again.trials, again.seconds) == (first.points, first.trials, first.seconds)
    assert again.errors == first.errors
    assert first.candidates.items() <= again.candidates.items()
    assert len(again.candidates) == len(first.candidates) + 1


def test_what_was_measured_is_thought_of_as_it_was_before(
    small: Callable[..., SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latency model in use learns from what is measured; what was thought of a candidate at the start does not."""
    before: dict[str, ExpectedPoint] = {}
    real = expect.expected_front

    def watched(costs: Any, *arguments: Any) -> list[Evaluation]:
        dense = expect.thought(costs, costs.space.dense())
        for candidate in (costs.space.uniform(1.0, precision) for precision in ("fp32", "w8a8")):  # are always measured
            before[candidate.id] = expect.expected_point(expect.thought(costs, candidate), dense)
        return real(costs, *arguments)

    monkeypatch.setattr(expect, "expected_front", watched)
    run = small(trials=30, measurements=5).run
    assert run.expected is not None
    after = run.expected.candidates
    assert before.keys() <= after.keys()
    assert len(after) > len(before), "others were measured too"
    for candidate, point in before.items():
        assert after[candidate].speedup == pytest.approx(point.speedup)
        assert (after[candidate].bytes, after[candidate].divergence) == (point.bytes, pytest.approx(point.divergence))
    assert len({point.bytes for point in before.values()}) == len(before), "or this says little"


@pytest.mark.slow
def test_seconds_of_trials_follow_those_of_candidates_looked_at(small: Callable[..., SearchResult]) -> None:
    expected = small(trials=96, measurements=1).run.expected
    assert expected is not None
    assert expected.seconds["trials"] > 0


@pytest.mark.parametrize("kept", [None, {"format_version": 2, "expected": {"of another": "form"}}])
def test_a_run_that_kept_nothing_that_is_read_has_none(kept: Any) -> None:
    found: Any = SimpleNamespace(search=SimpleNamespace(get_attr=lambda name: kept))
    assert expected_of(found) is None
