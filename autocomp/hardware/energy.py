"""Joules by this machine's own counters (RAPL), where the system lets one read them.

Linux keeps what each processor package has drawn since it started under ``/sys/class/powercap``, for Intel and AMD:
https://docs.kernel.org/power/powercap/powercap.html. Reading it is root's alone since 2020, where nobody allowed it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from autocomp.hardware.timing import median_and_spread, quiet_core

POWERCAP = Path("/sys/class/powercap")
SECONDS = 2.0  # of inferences, whose energy is counted; as long is the machine left idle before
_WINDOWS = 4  # that they are counted in: the spread is between these


@dataclass(frozen=True)
class Energy:
    """Joules of one inference above the idle machine: the median of several windows, and their interquartile range over it."""

    joules: float
    spread: float


class Counters:
    """The energy counters of a machine's processor packages; `Counters.open` finds them."""

    def __init__(self, packages: Sequence[Path]) -> None:
        self._packages = tuple(packages)
        self._ranges = [int((package / "max_energy_range_uj").read_text()) for package in packages]
        self._last = self._read()
        self._drawn = 0

    @classmethod
    def open(cls, root: Path | None = None) -> Counters | None:
        """The counters under ``root``; None where there are none, or they may not be read."""
        found = []
        try:
            for place in sorted((root or POWERCAP).glob("*-rapl:*")):
                # parts of a package (core, uncore) have two numbers, and are counted within it
                if re.fullmatch(r"\w+-rapl:[0-9]+", place.name) and (place / "name").read_text().startswith("package"):
                    found.append(place)
            return cls(found) if found else None
        except (OSError, ValueError):
            return None

    def joules(self) -> float:
        """What the packages have drawn since this was opened. Read more often than a counter runs over, within the hour."""
        now = self._read()
        for last, after, most in zip(self._last, now, self._ranges, strict=True):
            self._drawn += after - last if after >= last else after - last + most
        self._last = now
        return self._drawn * 1e-6

    def _read(self) -> list[int]:
        return [int((package / "energy_uj").read_text()) for package in self._packages]


def energies(
    calls: Sequence[Callable[[], object]], counters: Counters, cores: int = 1, seconds: float | None = None
) -> list[Energy]:
    """The energy of one call of each, above what the machine draws when it is left alone; nothing else should run meanwhile.

    Each is called for ``seconds``, `SECONDS` unless given. A spread as large as the energy itself says that other work was counted too.
    """
    seconds = SECONDS if seconds is None else seconds
    with quiet_core(cores):
        idle = _watts(partial(time.sleep, seconds), counters)
        found = []
        for call in calls:
            call()
            taken = [_one(call, counters, idle, seconds / _WINDOWS) for _ in range(_WINDOWS)]
            found.append(Energy(*median_and_spread(taken)))
    return found


def power(counters: Counters, cores: int = 1, seconds: float | None = None) -> dict[str, float]:
    """Watts of the packages, idle and with so many ``cores`` at work on products, as a profile states its ``power``."""
    import torch

    seconds = SECONDS if seconds is None else seconds
    a = torch.ones(128, 128)
    with quiet_core(cores):
        idle = _watts(partial(time.sleep, seconds), counters)
        load = _watts(partial(_repeated, partial(torch.mm, a, a), seconds), counters)
    return {"idle": idle, "load": load, "cores": cores}


def _one(call: Callable[[], object], counters: Counters, idle: float, seconds: float) -> float:
    """Joules of one call above ``idle`` watts."""
    start, before = time.perf_counter(), counters.joules()
    count = _repeated(call, seconds)
    drawn, spent = counters.joules() - before, time.perf_counter() - start
    return float(np.maximum(drawn - idle * spent, 0.0) / count)


def _watts(work: Callable[[], object], counters: Counters) -> float:
    start, before = time.perf_counter(), counters.joules()
    work()
    return (counters.joules() - before) / (time.perf_counter() - start)


def _repeated(call: Callable[[], object], seconds: float) -> int:
    """Call again and again for so long; how often that was."""
    count, end = 0, time.perf_counter() + seconds
    while count == 0 or time.perf_counter() < end:
        call()
        count += 1
    return count
