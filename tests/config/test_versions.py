"""One reader of versioned files: older ones are brought up step by step, newer and foreign ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autocomp.config.versions import current, current_by_hand
from autocomp.errors import AutocompError, CorruptError, UsageError

FILE = Path("some/file.json")


def test_an_older_file_goes_through_every_step_to_today() -> None:
    steps = {1: lambda d: {**d, "b": d["a"] + 1}, 2: lambda d: {"c": d["a"] + d["b"]}}
    assert current({"format_version": 1, "a": 1}, FILE, 3, steps) == {"format_version": 3, "c": 3}
    assert current({"format_version": 2, "a": 1, "b": 5}, FILE, 3, steps) == {"format_version": 3, "c": 6}
    assert current({"format_version": 3, "c": 9}, FILE, 3, steps) == {"format_version": 3, "c": 9}


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        ([], CorruptError, "must hold a mapping"),
        ({}, CorruptError, "carries no format_version"),
        ({"format_version": "1"}, CorruptError, "carries no format_version"),
        ({"format_version": True}, CorruptError, "carries no format_version"),
        ({"format_version": 0}, CorruptError, "carries no format_version"),
        ({"format_version": 4}, UsageError, "reads up to 3: a newer one wrote it; upgrade"),
    ],
)
def test_what_is_refused(data: Any, kind: type[AutocompError], words: str) -> None:
    with pytest.raises(kind, match=words):
        current(data, FILE, 3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "states no format_version: write `format_version: 3` into it"),
        ({"format_version": "x"}, "must be a whole number"),
        ({"format_version": 10**400}, "a newer one wrote it"),
    ],
)
def test_a_file_written_by_hand_is_bad_input(data: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        current_by_hand(data, FILE, 3)
    assert len(str(caught.value)) < 500


def test_a_version_may_be_assumed() -> None:
    assert current_by_hand({"a": 1}, FILE, 3, assumed=3) == {"a": 1, "format_version": 3}
    assert current({"a": 1}, FILE, 1, assumed=1) == {"a": 1, "format_version": 1}
