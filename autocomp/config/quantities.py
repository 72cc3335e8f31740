"""Numbers with units, as people write them on a command line or in a config: ``0.5ms``, ``500KB``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from autocomp.errors import shown

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
JOULES = {"j": 1.0, "mj": 1e-3, "uj": 1e-6, "µj": 1e-6}
TRAINING = {
    "s": (1.0, "seconds"), "min": (60.0, "seconds"), "h": (3600.0, "seconds"),
    "step": (1.0, "steps"), "steps": (1.0, "steps"), "epoch": (1.0, "epochs"), "epochs": (1.0, "epochs"),
}  # fmt: skip
BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
LARGEST = 1e18  # seconds, joules or bytes: past all that there is, and whole numbers up to here are exact enough
LEAST_FACTOR = 1.0  # times: a goal of less would ask for a slower or larger model
_LONGEST = 64  # characters
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?)\s*([a-zµ%]*)\s*", re.IGNORECASE)


def parse_seconds(text: str) -> float:
    """Read a duration with its unit (``s``, ``ms``, ``us``, ``ns``) in seconds; ValueError says what is wrong.

    Examples:
        >>> parse_seconds("0.5ms"), parse_seconds("90s")
        (0.0005, 90.0)
        >>> parse_seconds("90")
        Traceback (most recent call last):
        ValueError: must be a duration with its unit, such as 0.5ms or 300us; got '90'
    """
    return _parse(text, SECONDS, "a duration with its unit, such as 0.5ms or 300us")


def parse_bytes(text: str) -> int:
    """Read a size with its unit in bytes: ``KB`` is 1000 bytes, ``KiB`` 1024; ValueError says what is wrong.

    Examples:
        >>> parse_bytes("500KB"), parse_bytes("1.5MiB")
        (500000, 1572864)
    """
    return math.floor(_parse(text, BYTES, "a size with its unit, such as 500KB or 1.5MiB"))


def parse_joules(text: str) -> float:
    """Read an energy with its unit (``J``, ``mJ``, ``uJ``) in joules; ValueError says what is wrong.

    >>> parse_joules("5mJ")
    0.005
    """
    return _parse(text, JOULES, "an energy with its unit, such as 5mJ")


def parse_factor(text: str) -> float:
    """Read ``2x``, how many times faster or smaller than the uncompressed model; ValueError says what is wrong.

    >>> parse_factor("2.5x")
    2.5
    """
    factor = _parse(text, {"x": 1.0}, "how many times, such as 2x")
    if factor < LEAST_FACTOR:
        raise ValueError(f"must be at least {LEAST_FACTOR:.0f}x; got {shown(text)}")
    return factor


def parse_share(text: str) -> float:
    """Read ``1%`` of the uncompressed model's value as 0.01; ValueError says what is wrong."""
    return _percent(text, "%", "a share of the uncompressed model's, such as 1%")


def parse_points(text: str) -> float:
    """Read ``0.5pt``, points of a metric that is a share (hundredths), as 0.005; ValueError says what is wrong."""
    return _percent(text, "pt", "points, such as 0.5pt")


def parse_training(text: str) -> tuple[float, str]:
    """Read how long to train as (amount, ``seconds`` or ``steps`` or ``epochs``); ``0`` is none. ValueError says what is wrong.

    Examples:
        >>> parse_training("10min"), parse_training("500 steps"), parse_training("0")
        ((600.0, 'seconds'), (500.0, 'steps'), (0.0, 'seconds'))
    """
    if text.strip() == "0":
        return 0.0, "seconds"
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    unit = TRAINING.get(match[2].lower()) if match is not None else None
    if match is None or unit is None:
        raise ValueError(f"must be how long to train, such as 10min, 90s, 500steps or 5epochs, or 0; got {shown(text)}")
    amount = float(match[1]) * unit[0]
    if amount > LARGEST or (unit[1] != "seconds" and amount != int(amount)):
        raise ValueError(f"must be a whole number of steps or epochs, or a duration; got {shown(text)}")
    return amount, unit[1]


def _percent(text: str, sign: str, wanted: str) -> float:
    value = _parse(text, {sign: 1.0}, wanted)
    if value > 100:
        raise ValueError(f"must be at most 100{sign}; got {shown(text)}")
    return value / 100


def _parse(text: str, units: dict[str, float] | dict[str, int], wanted: str) -> float:
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None or match[2].lower() not in units:
        raise ValueError(f"must be {wanted}; got {shown(text)}")
    value = float(match[1]) * units[match[2].lower()]
    if value > LARGEST:
        raise ValueError(f"must be at most {LARGEST:.0e}; got {shown(text)}")
    return value


def format_bytes(count: float, digits: int = 3) -> str:
    """Write a size in bytes for people.

    Examples:
        >>> format_bytes(1_604_000), format_bytes(400_640), format_bytes(12)
        ('1.6 MB', '401 kB', '12 B')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.{digits}g} {unit}"
    return f"{count:.0f} B"


def format_milliseconds(seconds: float, digits: int = 3) -> str:
    """Write seconds as milliseconds for people.

    Examples:
        >>> format_milliseconds(0.000284)
        '0.284 ms'
    """
    return f"{seconds * 1e3:.{digits}g} ms"


def format_joules(joules: float, digits: int = 3) -> str:
    """Write an energy in millijoules for people.

    Examples:
        >>> format_joules(0.0123)
        '12.3 mJ'
    """
    return f"{joules * 1e3:.{digits}g} mJ"


def told_apart(write: Callable[[float, int], str], value: float, limit: float, digits: int = 3) -> tuple[str, str]:
    """Write a value and its limit with ``digits``, or with as many as show that they differ.

    Examples:
        >>> told_apart(format_milliseconds, 0.01004, 0.01)
        ('10.04 ms', '10 ms')
    """
    return next(
        (texts for more in range(digits, 10) if (texts := (write(value, more), write(limit, more)))[0] != texts[1]),
        (write(value, digits), write(limit, digits)),
    )
