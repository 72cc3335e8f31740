"""The core's model on snippets of known cost. Encodings: Arm Architecture Reference Manual for A-profile, C7.2 and C6.2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.estimate import load_core
from autocomp.estimate.arm64 import decode_arm64
from autocomp.estimate.core import simulate

CORE = load_core("cortex-a76")
START = 0x1000_0000
BRANCH_BACK = 0x5400_0001  # b.ne


def fmla(d: int, n: int, m: int) -> int:
    return 0x4E20_CC00 | m << 16 | n << 5 | d


def sdot(d: int, n: int, m: int) -> int:
    return 0x4E80_9400 | m << 16 | n << 5 | d


def fmul(d: int, n: int, m: int) -> int:
    return 0x6E20_DC00 | m << 16 | n << 5 | d


def load_q(t: int, base: int) -> int:
    return 0x3DC0_0000 | base << 5 | t


def store_q(t: int, base: int) -> int:
    return 0x3D80_0000 | base << 5 | t


def load_x(t: int, base: int) -> int:
    return 0xF940_0000 | base << 5 | t


def add_x(d: int, n: int, m: int) -> int:
    return 0x8B00_0000 | m << 16 | n << 5 | d


def cycles(
    words: Sequence[int], addresses: Sequence[int] = (), *, repeats: int = 1, warmed: Sequence = (), core=CORE
) -> int:
    """Cycles of a straight line of code, run a number of times; ``addresses`` are those of its accesses, in order."""
    code = b"".join(word.to_bytes(4, "little") for word in words)
    instructions = decode_arm64(code, START)
    where = iter(addresses)
    trace = [
        (number, next(where, -1) if instruction.access else -1, 1)
        for _ in range(repeats)
        for number, instruction in enumerate(instructions)
    ]
    return simulate(np.array(trace, np.int64), instructions, core, warmed).cycles


def per_instruction(words: Sequence[int], repeats: int, addresses: Sequence[int] = (), **settings) -> float:
    """Cycles an instruction takes once the pipeline is full: the difference of a long and a short run."""
    long = cycles(words, addresses, repeats=2 * repeats, **settings)
    return (long - cycles(words, addresses, repeats=repeats, **settings)) / (repeats * len(words))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (fmla(0, 1, 2), 2.0),  # the accumulator is forwarded: latency 4, of which the addition waits for 2
        (fmla(0, 0, 2), 4.0),  # a factor is not
        (sdot(0, 1, 2), 1.0),  # latency 3, forwarded after 1
        (fmul(0, 0, 2), 3.0),
        (add_x(0, 0, 1), 1.0),
    ],
)
def test_dependent_chain_takes_its_latency(word: int, expected: float) -> None:
    assert per_instruction([word], 400) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ([fmla(d, 30, 31) for d in range(12)], 2),  # two vector pipelines
        ([sdot(d, 30, 31) for d in range(12)], 2),
        ([add_x(d, 30, 29) for d in range(12)], 3),  # three integer pipelines
        ([add_x(d, 30, 29) for d in range(6)] + [fmla(d, 30, 31) for d in range(6)], 4),  # four are dispatched a cycle
    ],
)
def test_independent_instructions_fill_the_pipelines(words: list[int], rate: float) -> None:
    assert 1 / per_instruction(words, 100) == pytest.approx(rate, rel=0.02)


def test_two_loads_a_cycle() -> None:
    words = [load_q(t, 20) for t in range(12)]
    lines = [0x4000_0000 + 16 * t for t in range(12)] * 400
    warmed = [(0x4000_0000, 0x4000_0100)]
    assert 1 / per_instruction(words, 100, lines, warmed=warmed) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(("level", "span"), [("l1d", 0), ("l2", 40 << 10), ("l3", 1 << 20), ("memory", 4 << 20)])
def test_each_level_has_its_latency(level: str, span: int) -> None:
    """A chain of loads, each of whose address is the last one's data: through as many lines as fit the level, in no order."""
    latency = {cache.name: cache.latency for cache in CORE.caches}
    latency["memory"] = latency["l1d"] + round(CORE.memory_latency_s * CORE.clock_hz)
    if level == "l1d":
        lines = [0x4000_0000] * 1600
        warmed = [(0x4000_0000, 0x4000_0040)]
    else:
        order = np.random.default_rng(0).permutation(span // 64)
        # all lines of the region are warm, and those read last were touched longest ago
        lines = [0x4000_0000 + 64 * int(line) for line in order][:1600]
        warmed = [(0x4000_0000, 0x4000_0000 + 2 * span)] if level != "memory" else []
        if level == "l2":
            warmed = [*warmed, (0x5000_0000, 0x5001_0000)]  # 64 KiB of something else push it out of the first level
    measured = cycles([load_x(0, 0)], lines, repeats=len(lines), warmed=warmed) / len(lines)
    assert measured == pytest.approx(latency[level], rel=0.1, abs=0.2)


def test_stored_data_is_forwarded_to_a_load() -> None:
    words = [store_q(0, 20), load_q(0, 20)]
    once = per_instruction(words, 200, [0x4000_0000] * 1600, warmed=[(0x4000_0000, 0x4000_0040)])
    assert 2 * once == pytest.approx(CORE.store_forward + 1, abs=1.5), "a chain through memory"
    apart = [address for _ in range(400) for address in (0x4000_0000, 0x4000_0080)]
    assert per_instruction([store_q(1, 20), load_q(0, 20)], 200, apart, warmed=[(0x4000_0000, 0x4000_0100)]) < once


def loop(trips: int, runs: int) -> int:
    """Cycles of a loop of two additions that runs so often, several times."""
    code = b"".join(
        word.to_bytes(4, "little") for word in (add_x(1, 1, 2), BRANCH_BACK | (-1 & 0x7FFFF) << 5, add_x(3, 3, 2))
    )
    instructions = decode_arm64(code, START)
    numbers = ([0, 1] * trips + [2]) * runs
    return simulate(np.array([(n, -1, 1) for n in numbers], np.int64), instructions, CORE).mispredicts


def test_the_exit_of_a_short_loop_is_predicted_and_that_of_a_long_one_is_not() -> None:
    assert loop(CORE.history, 20) <= 2
    assert loop(CORE.history + 2, 20) >= 18


def test_more_trips_than_last_time_are_mispredicted() -> None:
    code = b"".join(
        word.to_bytes(4, "little") for word in (add_x(1, 1, 2), BRANCH_BACK | (-1 & 0x7FFFF) << 5, add_x(3, 3, 2))
    )
    instructions = decode_arm64(code, START)

    def missed(trips: Sequence[int]) -> int:
        numbers = [n for count in trips for n in [0, 1] * count + [2]]
        return simulate(np.array([(n, -1, 1) for n in numbers], np.int64), instructions, CORE).mispredicts

    assert missed([5] * 30) < missed([5, 9] * 15)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40))
def test_more_work_never_takes_less_and_a_rate_is_never_exceeded(registers: list[tuple[int, int, int]]) -> None:
    words = [fmla(*three) for three in registers]
    assert cycles(words) <= cycles([*words, fmla(0, 1, 2)])
    assert cycles(words, repeats=20) >= 20 * len(words) / 2


def test_a_profile_changes_the_core() -> None:
    small = CORE.adapted(caches={"l3": 0, "l2": 1 << 18}, clock_hz=1.8e9, memory_bytes_per_second=5e9)
    assert [cache.name for cache in small.caches] == ["l1d", "l2"]
    assert small.caches[1].bytes == 1 << 18
    assert small.clock_hz == 1.8e9
    assert small.digest != CORE.digest
    assert CORE.adapted().digest == CORE.adapted().digest
    stream = [0x4000_0000 + 64 * line for line in range(4000)]
    assert cycles([load_q(0, 20)], stream, repeats=4000, core=small) > cycles([load_q(0, 20)], stream, repeats=4000)
