"""Caches and memory in numba: which level a line is found in, and when its data comes, given what the levels hand on a cycle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np

from autocomp.estimate.instructions import Core

LINE = 64  # bytes, of every core described here
_PENDING = 1 << 15  # entries of the table of lines on their way
LONGEST_WAIT = 4000  # cycles a line may queue for a busy memory: bounds the times the model looks ahead


# Columns of the table of levels. Times beyond a first-level hit are in cycles; rates in 256ths of a cycle a line.
_OFFSET, _WAYS, _SETS = 0, 1, 2  # of a level's tags
_EXTRA, _PER_LINE, _FREE = (
    3,
    4,
    5,
)  # of the next level (or memory): what a hit there adds, how long a line holds the link, until when
_MISSES = 6
_COLUMNS = 7

# Lines on their way: which, and when they can be used.
_ON_WAY, _READY = 0, 1


class Caches(NamedTuple):
    """Tags in order of use, one level after the other; the table of levels; and the lines on their way."""

    tags: np.ndarray
    levels: np.ndarray
    pending: np.ndarray

    @property
    def misses(self) -> tuple[int, ...]:
        """Misses that an instruction met, by level."""
        return tuple(int(count) for count in self.levels[:, _MISSES])


def new_caches(core: Core) -> Caches:
    """The empty caches of a core."""
    table = np.zeros((len(core.caches), _COLUMNS), np.int64)
    rates = [level.bytes_per_cycle for level in core.caches[1:]] + [core.memory_bytes_per_second / core.clock_hz]
    latencies = [level.latency for level in core.caches[1:]]
    latencies.append(core.caches[0].latency + round(core.memory_latency_s * core.clock_hz))
    offset = 0
    for row, level, latency, rate in zip(table, core.caches, latencies, rates, strict=True):
        sets = max(1, level.bytes // LINE // level.ways)
        row[[_OFFSET, _WAYS, _SETS]] = offset, level.ways, sets
        row[[_EXTRA, _PER_LINE]] = latency - core.caches[0].latency, round(256 * LINE / rate)
        offset += sets * level.ways
    return Caches(np.full(offset, -1, np.int64), table, np.full((_PENDING, 2), -1, np.int64))


def warm_ranges(caches: Caches, ranges: Sequence[tuple[int, int]]) -> None:
    """Fill caches with address ranges (from, to), as far as they fit, in order."""
    for first, last in ranges:
        _warm(caches.tags, caches.levels, first // LINE, -(-last // LINE))


@numba.njit(cache=True)
def touch(tags, levels, level, line):
    """Whether a line is in a level; makes it the most recently used one there either way."""
    ways = levels[level, _WAYS]
    start = levels[level, _OFFSET] + (line % levels[level, _SETS]) * ways
    way = 0
    while way < ways - 1 and tags[start + way] != line:
        way += 1
    hit = tags[start + way] == line
    while way > 0:
        tags[start + way] = tags[start + way - 1]
        way -= 1
    tags[start] = line
    return hit


@numba.njit(cache=True)
def holds(tags, levels, level, line):
    """Whether a line is in a level, without using it."""
    ways = levels[level, _WAYS]
    start = levels[level, _OFFSET] + (line % levels[level, _SETS]) * ways
    for way in range(ways):  # noqa: SIM110 - numba compiles no generator here
        if tags[start + way] == line:
            return True
    return False


@numba.njit(cache=True)
def arrival(tags, levels, pending, line, cycle, transfers, waited):
    """The cycle at which a line that is wanted at ``cycle`` can be used from the first level: ``cycle`` itself for a hit.

    ``transfers`` is how often the line crosses the link to memory: 2 for a line to be written, which is written back one day. Misses are
    counted where ``waited`` is 1.
    """
    slot = line % _PENDING
    if touch(tags, levels, 0, line):
        if pending[slot, _ON_WAY] == line and pending[slot, _READY] > cycle:
            return pending[slot, _READY]
        return cycle
    levels[0, _MISSES] += waited
    level = 1
    while level < levels.shape[0] and not touch(tags, levels, level, line):
        levels[level, _MISSES] += waited
        level += 1
    start = cycle * 256
    for link in range(level):
        if levels[link, _FREE] > start:
            start = levels[link, _FREE]
        crossings = transfers if link == levels.shape[0] - 1 else 1  # caches write back on paths of their own
        levels[link, _FREE] = start + crossings * levels[link, _PER_LINE]
    ready = min(start >> 8, cycle + LONGEST_WAIT) + levels[level - 1, _EXTRA]
    pending[slot, _ON_WAY] = line
    pending[slot, _READY] = ready
    return ready


@numba.njit(cache=True)
def _warm(tags, levels, first, last):
    """Touch lines in order, as an earlier run of the kernel would have."""
    for line in range(first, last):
        for level in range(levels.shape[0]):
            touch(tags, levels, level, line)


@numba.njit(cache=True)
def warm_accesses(tags, levels, trace):
    """Touch what a trace of (instruction, address, ...) reads and writes, in its order."""
    for step in range(trace.shape[0]):
        line = trace[step, 1] // LINE
        if line >= 0 and not touch(tags, levels, 0, line):
            level = 1
            while level < levels.shape[0] and not touch(tags, levels, level, line):
                level += 1
