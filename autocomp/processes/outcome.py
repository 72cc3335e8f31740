"""What became of a piece of work that may fail without ending the rest: its value, or why there is none."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Outcome(NamedTuple, Generic[T]):
    """A value and no failure, or none and the reason in one line."""

    value: T | None
    failure: str = ""
