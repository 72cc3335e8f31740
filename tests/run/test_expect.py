"""What a search expects of itself: thought of once, before its first trial, and not touched by what it measures."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from autocomp.api import SearchResult
from autocomp.records.evaluation import Evaluation
from autocomp.run import expect
from autocomp.run.expect import expected_of

pytestmark = pytest.mark.usefixtures("short_tuning", "without_exports")


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
    front: list[str] = []
    real = expect.expected_front

    def watched(*arguments: Any) -> list[Evaluation]:
        found = real(*arguments)
        front.extend(e.candidate.id for e in found)
        return found

    monkeypatch.setattr(expect, "expected_front", watched)
    expected = small(trials=30, measurements=5).run.expected
    assert expected is not None
    both = [
        (point, expected.candidates[i])
        for i, point in zip(front, expected.points, strict=True)
        if i in expected.candidates
    ]
    assert len(both) > 1, "or this says little"
    for before, after in both:
        assert after.speedup == pytest.approx(before.speedup)
        assert (after.bytes, after.divergence) == (before.bytes, pytest.approx(before.divergence))


def test_seconds_of_trials_follow_those_of_candidates_looked_at(small: Callable[..., SearchResult]) -> None:
    expected = small(trials=96, measurements=1).run.expected
    assert expected is not None
    assert expected.seconds["trials"] > 0


@pytest.mark.parametrize("kept", [None, {"format_version": 2, "expected": {"of another": "form"}}])
def test_a_run_that_kept_nothing_that_is_read_has_none(kept: Any) -> None:
    found: Any = SimpleNamespace(search=SimpleNamespace(get_attr=lambda name: kept))
    assert expected_of(found) is None
