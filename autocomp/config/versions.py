"""Versioned files: what an older autocomp wrote is brought into today's form, what a newer one wrote is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autocomp.errors import CorruptError, UsageError, shown

KEY = "format_version"
Migrations = Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]  # by the version they lead away from, by one


def current(
    data: Any, path: Path, newest: int, migrations: Migrations | None = None, assumed: int | None = None
) -> dict[str, Any]:
    """What a file that autocomp wrote says, in the form of version ``newest``, which it then states.

    ``assumed`` is the version of a file that states none. CorruptError where it is no mapping, or states no version; UsageError where a newer
    autocomp wrote it.

    Examples:
        >>> current({"format_version": 1, "name": "a"}, Path("x.json"), 2, {1: lambda old: {"names": [old["name"]]}})
        {'names': ['a'], 'format_version': 2}
        >>> current({"format_version": 3}, Path("x.json"), 2)
        Traceback (most recent call last):
        autocomp.errors.UsageError: x.json has format_version 3, and this autocomp reads up to 2: a newer one wrote it; ...
    """
    if not isinstance(data, dict):
        raise CorruptError(
            f"{path} must hold a mapping with {KEY}, found {type(data).__name__}: it was not written by autocomp"
        )
    version = check_version(data.get(KEY, assumed), path, newest)
    for step in range(version, newest):
        data = (migrations or {})[step](data)
    return {**data, KEY: newest}


def current_by_hand(data: dict[str, Any], path: Path, newest: int, assumed: int | None = None) -> dict[str, Any]:
    """As `current`, of a file that its user writes: whatever is wrong with its version is a UsageError that says what to write."""
    version = data.get(KEY, assumed)
    if version is None:
        raise UsageError(f"{path} states no {KEY}: write `{KEY}: {newest}` into it")
    if type(version) is not int or version < 1:
        raise UsageError(
            f"{path}: {KEY} must be a whole number, {newest} for what this autocomp reads; got {shown(version)}"
        )
    check_version(version, path, newest)
    return {**data, KEY: version}


def check_version(version: object, path: Path, newest: int) -> int:
    """The version, if this autocomp reads it; errors as `current`."""
    if type(version) is not int or version < 1:
        raise CorruptError(f"{path} carries no {KEY} (found {shown(version)}): it was not written by autocomp")
    if version > newest:
        raise UsageError(
            f"{path} has {KEY} {shown(version)}, and this autocomp reads up to {newest}: a newer one wrote it; upgrade "
            "(pip install --upgrade autocomp)"
        )
    return version
