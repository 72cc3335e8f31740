"""Goals as people write them: one limit for all, or one by name; absolute, or against the uncompressed model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from autocomp.config.files import is_number
from autocomp.config.quantities import (
    LARGEST,
    parse_bytes,
    parse_factor,
    parse_joules,
    parse_points,
    parse_seconds,
    parse_share,
)
from autocomp.errors import shown

ALL = "*"  # names what no other name does: the objective, every profile


def read_drops(value: Any) -> Any:
    """Limits on what metrics may lose: numbers in the metric's units, ``0.5pt``, ``1%``; ValueError says what is wrong."""
    return _by_name(value, _drop)


def read_latencies(value: Any) -> Any:
    """Limits on latencies: seconds, ``0.5ms``, ``2x``."""
    return _by_name(value, _latency)


def read_energies(value: Any) -> Any:
    """Limits on energies: joules, ``5mJ``, ``2x``."""
    return _by_name(value, _energy)


def read_size(value: Any) -> Any:
    """A limit on bytes: a whole number, ``500KB``, ``5x``."""
    if value is None:
        return None
    if isinstance(value, str) and not is_number(value):
        value = one_size(value)
        if isinstance(value, str):
            return value
    if type(value) is not int:
        raise ValueError(f"must be a whole number of bytes or a size with its unit, such as 500KB; got {shown(value)}")
    return _within(value, above=0)


def read_family(value: Any) -> Any:
    """Speed-ups: a list of ``2x``, or a text of them with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"must be speed-ups such as 2x,4x; got {shown(value)}")
    return sorted({_factor(part) for part in parts}, key=parse_factor)


def one_drop(text: str) -> float | str:
    """A drop as it stands on a command line."""
    limit: float | str = _drop(float(text) if is_number(text) else text)
    return limit


def one_latency(text: str) -> float | str:
    """A latency as it stands on a command line, always with a unit."""
    return _factor(text) if _is_factor(text) else parse_seconds(text)


def one_energy(text: str) -> float | str:
    """An energy as it stands on a command line, always with a unit."""
    return _factor(text) if _is_factor(text) else parse_joules(text)


def one_size(text: str) -> int | str:
    """A size as it stands on a command line, always with a unit."""
    return _factor(text) if _is_factor(text) else parse_bytes(text)


def _by_name(value: Any, read: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("must name at least one limit; leave it out where there is none")
        return {name: read(limit) for name, limit in value.items()}
    return None if value is None else read(value)


def _drop(value: Any) -> Any:
    if isinstance(value, str):
        if value.strip().endswith("pt"):
            return parse_points(value)
        parse_share(value)
        return value.strip()
    return _within(value, at_least=0)


def _latency(value: Any) -> Any:
    return _with_unit(value, one_latency, "0.5ms")


def _energy(value: Any) -> Any:
    return _with_unit(value, one_energy, "5mJ")


def _with_unit(value: Any, read: Callable[[str], float | str], such: str) -> Any:
    if isinstance(value, str):
        if is_number(value):
            raise ValueError(f"must be a number, or a text with a unit such as {such}; got the text {shown(value)}")
        value = read(value)
    return value if isinstance(value, str) else _within(value, above=0)


def _is_factor(text: str) -> bool:
    return text.strip().lower().endswith("x")


def _factor(text: str) -> str:
    return f"{parse_factor(text):g}x"


def _within(value: Any, above: float | None = None, at_least: float | None = None) -> Any:
    if type(value) not in (int, float):
        raise ValueError(f"must be a number; got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be a finite number; got {shown(value)}")
    if above is not None and not value > above:
        raise ValueError(f"must be greater than {above:g}; got {shown(value)}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"must be greater than or equal to {at_least:g}; got {shown(value)}")
    if value > LARGEST:
        raise ValueError(f"must be less than or equal to {LARGEST:.0e}; got {shown(value)}")
    return value
