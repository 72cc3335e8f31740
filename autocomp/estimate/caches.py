"""Caches and memory in numba: which level a line is found in, and when its data comes, given what the levels hand on a cycle."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from autocomp.estimate.instructions import Core

LINE = 64  # bytes, of every core described here
_LINE_SHIFT = 6
_PENDING = 1 << 15  # entries of the table of lines on their way
_LONGEST = 4000  # cycles a line may queue for a busy memory: bounds the times the model looks ahead


class Hierarchy(NamedTuple):
    """Tags in order of use, one level after the other; and timing in cycles, bandwidth in 1/256 of a cycle a line."""

    tags: np.ndarray  # int64, all levels
    offset: np.ndarray  # of each level's tags
    ways: np.ndarray
    sets: np.ndarray
    extra: np.ndarray  # cycles beyond a first-level hit, of a hit in level 1, 2, ... and of memory
    per_line: np.ndarray  # 256ths of a cycle that a line from level 1, 2, ... or memory holds its link
    free: np.ndarray  # 256ths of a cycle at which that link is free
    pending_line: np.ndarray
    pending_ready: np.ndarray
    misses: np.ndarray  # of each level


def new_hierarchy(core: Core) -> Hierarchy:
    """Empty caches of a core."""
    levels = core.caches
    sets = np.array([max(1, level.bytes // LINE // level.ways) for level in levels], np.int64)
    ways = np.array([level.ways for level in levels], np.int64)
    sizes = sets * ways
    first = levels[0].latency
    memory_cycles = core.memory_latency_s * core.clock_hz
    extra = [level.latency - first for level in levels[1:]] + [round(memory_cycles)]
    rates = [level.bytes_per_cycle for level in levels[1:]] + [core.memory_bytes_per_second / core.clock_hz]
    return Hierarchy(
        np.full(int(sizes.sum()), -1, np.int64),
        np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64),
        ways,
        sets,
        np.array(extra, np.int64),
        np.array([round(256 * LINE / rate) for rate in rates], np.int64),
        np.zeros(len(levels), np.int64),
        np.full(_PENDING, -1, np.int64),
        np.zeros(_PENDING, np.int64),
        np.zeros(len(levels), np.int64),
    )


@numba.njit(cache=True, forceinline=True)
def touch(caches, level, line):  # type: ignore[no-untyped-def]
    """Whether a line is in a level; makes it the most recently used one there either way."""
    ways = caches.ways[level]
    start = caches.offset[level] + (line % caches.sets[level]) * ways
    tags = caches.tags
    way = 0
    while way < ways - 1 and tags[start + way] != line:
        way += 1
    hit = tags[start + way] == line
    while way > 0:
        tags[start + way] = tags[start + way - 1]
        way -= 1
    tags[start] = line
    return hit


@numba.njit(cache=True, forceinline=True)
def holds(caches, level, line):  # type: ignore[no-untyped-def]
    """Whether a line is in a level, without using it."""
    start = caches.offset[level] + (line % caches.sets[level]) * caches.ways[level]
    for way in range(caches.ways[level]):  # noqa: SIM110 - numba compiles no generator here
        if caches.tags[start + way] == line:
            return True
    return False


@numba.njit(cache=True, forceinline=True)
def arrival(caches, line, cycle, transfers):  # type: ignore[no-untyped-def]
    """The cycle at which a line that is wanted at ``cycle`` can be used from the first level: ``cycle`` itself for a hit.

    ``transfers`` is how often the line crosses its links: 2 for a line to be written, which is written back one day.
    """
    slot = line % _PENDING
    if touch(caches, 0, line):
        if caches.pending_line[slot] == line and caches.pending_ready[slot] > cycle:
            return caches.pending_ready[slot]
        return cycle
    caches.misses[0] += 1
    levels = caches.ways.shape[0]
    level = 1
    while level < levels and not touch(caches, level, line):
        caches.misses[level] += 1
        level += 1
    start = cycle * 256
    for link in range(level):
        if caches.free[link] > start:
            start = caches.free[link]
        caches.free[link] = start + transfers * caches.per_line[link]
    ready = min(start >> 8, cycle + _LONGEST) + caches.extra[level - 1]
    caches.pending_line[slot] = line
    caches.pending_ready[slot] = ready
    return ready


@numba.njit(cache=True)
def warm(caches, first, last):  # type: ignore[no-untyped-def]
    """Touch every line from byte address ``first`` to ``last``, as an earlier run of the kernel would have."""
    for line in range(first >> _LINE_SHIFT, ((last - 1) >> _LINE_SHIFT) + 1):
        for level in range(caches.ways.shape[0]):
            touch(caches, level, line)
