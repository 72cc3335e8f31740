"""An out-of-order core as a scoreboard: each traced instruction gets the cycles at which it is dispatched, issued, done and retired.

Modelled: width of dispatch, the window, issue queues, pipelines, latencies with accumulator forwarding, store forwarding, the store
buffer, caches with their bandwidth and a stride prefetcher, and branches that a loop predictor would miss. Not modelled: instruction
cache, translation of addresses, other cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from autocomp.estimate.caches import LINE, arrival, holds, new_caches, warm_accesses, warm_ranges
from autocomp.estimate.instruction import LOAD, LOAD_AND_STORE, REGISTERS, STORE, Instruction
from autocomp.estimate.instructions import Core, MicroOperation

# Arrays are few and plain, with named columns: numba counts references to each array it takes out of a tuple, which costs more
# than the model itself.

# Columns of a program: the static facts of an instruction, and blocks of columns that end before their first -1.
_ADDRESS, _NEXT, _SLOTS, _LATENCY, _LOAD_LATENCY, _ACCESS, _ACCESSED, _BRANCH, _WRITTEN_BACK, _COUNT = range(10)
_QUEUES = 4
_NEEDS = 10  # operations by queue
_SOURCES = 6
_READS = _NEEDS + _QUEUES
_EARLY = _READS + _SOURCES  # cycles by which each of these is needed later than its result is said to come
_ADDRESS_READS = _EARLY + _SOURCES
_WRITES = _ADDRESS_READS + _SOURCES
_OPERATIONS = _WRITES + _SOURCES
_MOST_OPERATIONS = 10
_MASK, _HOLD, _KIND, _LOWEST, _HIGHEST, _QUEUE, _STRIDE = range(
    7
)  # of each operation; lowest and highest pipeline of its mask
_PROGRAM_COLUMNS = _OPERATIONS + _STRIDE * _MOST_OPERATIONS

_COMPUTE, _LOAD_OPERATION, _ADDRESS_OPERATION = 0, 1, 2  # kinds of operations

# What is busy until when is kept in calendars whose entries are tagged with their cycle, so that they need no clearing.
_HORIZON = 1 << 14  # cycles they look ahead: more than caches.LONGEST_WAIT and what can queue behind it
_FREE_FROM, _USED = 0, 1  # columns of pipelines
_WAITING, _ENTRIES = 0, 1  # columns of queues
_CYCLE, _LEAVING = 0, 1  # last axis of departures from queues

_WORDS = 1 << 14  # entries of the table of stored words: which, and when its data is there
_WORD, _AT = 0, 1

_STEADY = 2  # equal strides after which the prefetcher starts
_REACH = 4096  # bytes it looks ahead at most: translations are by pages of 4 KiB
_BEFORE, _STEP, _EQUAL, _STARTED = range(4)  # columns of the prefetcher, by instruction
_DIRECTION, _RUN, _LAST = 0, 1, 2  # columns of the branch predictor; two of _LAST, by direction

_WIDTH, _WINDOW, _RETIRE, _MISPREDICT, _HISTORY, _STORE_FORWARD, _STORE_BUFFER, _STORES, _PREFETCH = range(9)


@dataclass(frozen=True)
class Simulated:
    """The outcome of a trace: cycles in all, and by instruction number the cycles attributed to it and its executions."""

    cycles: int
    instruction_cycles: np.ndarray
    executions: np.ndarray
    misses: tuple[int, ...]
    mispredicts: int


def simulate(
    trace: np.ndarray,
    instructions: Sequence[Instruction],
    core: Core,
    warmed: Sequence[tuple[int, int]] = (),
    *,
    repeated: bool = False,
) -> Simulated:
    """Time a trace of (instruction number, address of its access or -1, whether its time is attributed) on a core.

    ``warmed`` are address ranges (from, to) that are in the caches as far as they fit, in order; ``repeated`` says that the trace
    ran before, and left its own lines there.
    """
    caches = new_caches(core)
    warm_ranges(caches, warmed)
    if repeated:
        warm_accesses(caches.tags, caches.levels, trace)
    cost = np.zeros((len(instructions), 2), np.int64)
    parameters = np.array(
        [core.width, core.window, core.retire, core.mispredict, core.history, core.store_forward, core.store_buffer, core.stores, core.prefetch],
        np.int64,
    )  # fmt: skip
    queues = np.array([[0, queue.entries] for queue in core.queues], np.int64)
    cycles, mispredicts = _simulate(
        trace, program(instructions, core), parameters, len(core.pipelines), queues, *caches, cost
    )
    return Simulated(int(cycles), cost[:, 0], cost[:, 1], caches.misses, int(mispredicts))


def program(instructions: Sequence[Instruction], core: Core) -> np.ndarray:
    """Instructions and their timings as an array, a row each."""
    rows = np.full((len(instructions), _PROGRAM_COLUMNS), -1, np.int32)
    rows[:, _NEEDS:_READS] = 0
    rows[:, _EARLY:_ADDRESS_READS] = 0
    for row, instruction in zip(rows, instructions, strict=True):
        timing = core.timing(instruction)
        operations = timing.operations[:_MOST_OPERATIONS]
        row[: _COUNT + 1] = (
            instruction.address, instruction.address + instruction.length, timing.slots, timing.latency,
            timing.load_latency, instruction.access, max(instruction.accessed, 1), instruction.branch,
            instruction.written_back, len(operations),
        )  # fmt: skip
        for index, operation in enumerate(operations):
            mask = operation.pipelines
            queue = next(number for number, fed in enumerate(core.queues) if mask & fed.pipelines)
            at = _OPERATIONS + _STRIDE * index
            row[at : at + _STRIDE] = (
                mask, operation.cycles, _kind(operation, instruction, core), (mask & -mask).bit_length() - 1,
                mask.bit_length() - 1, queue,
            )  # fmt: skip
            row[_NEEDS + queue] += 1
        for index, register in enumerate(instruction.reads[:_SOURCES]):
            row[_READS + index] = register
            row[_EARLY + index] = timing.forward if register == instruction.accumulator else 0
        for start, registers in ((_ADDRESS_READS, instruction.address_reads), (_WRITES, instruction.writes)):
            row[start : start + len(registers[:_SOURCES])] = registers[:_SOURCES]
    return rows


def _kind(operation: MicroOperation, instruction: Instruction, core: Core) -> int:
    if operation.address:
        return _ADDRESS_OPERATION
    generates = not operation.pipelines & ~core.load_pipelines
    if generates and instruction.access in (LOAD, LOAD_AND_STORE):
        return _LOAD_OPERATION
    return _ADDRESS_OPERATION if generates and instruction.access == STORE else _COMPUTE


@numba.njit(cache=True)
def _issue(code, at, operation, busy, pipelines, departures, earliest):
    """Start an operation on that of its pipelines that is free first; of equals, the one used least. Returns the cycle."""
    mask, held = code[at, operation + _MASK], code[at, operation + _HOLD]
    best, best_cycle = -1, np.int64(1) << 60
    for pipeline in range(code[at, operation + _LOWEST], code[at, operation + _HIGHEST] + 1):
        if (mask >> pipeline) & 1:
            cycle = max(earliest, pipelines[pipeline, _FREE_FROM])
            while busy[pipeline, cycle & (_HORIZON - 1)] == cycle:
                cycle += 1
            if cycle < best_cycle or (cycle == best_cycle and pipelines[pipeline, _USED] < pipelines[best, _USED]):
                best, best_cycle = pipeline, cycle
    for cycle in range(best_cycle, best_cycle + held):
        busy[best, cycle & (_HORIZON - 1)] = cycle
    pipelines[best, _USED] += held
    free = pipelines[best, _FREE_FROM]
    while busy[best, free & (_HORIZON - 1)] == free:
        free += 1
    pipelines[best, _FREE_FROM] = free
    queue, slot = code[at, operation + _QUEUE], best_cycle & (_HORIZON - 1)
    if departures[queue, slot, _CYCLE] != best_cycle:
        departures[queue, slot, _CYCLE] = best_cycle
        departures[queue, slot, _LEAVING] = 0
    departures[queue, slot, _LEAVING] += 1
    return best_cycle


@numba.njit(cache=True)
def _wait_for_room(code, at, queues, departures, clock, cycle):
    """The first cycle from ``cycle`` on at which all operations of an instruction find room in their queues; they enter them.

    ``clock[0]`` is the cycle up to which departures have been counted.
    """
    while True:
        while clock[0] < cycle:
            clock[0] += 1
            slot = clock[0] & (_HORIZON - 1)
            for queue in range(queues.shape[0]):
                if departures[queue, slot, _CYCLE] == clock[0]:
                    queues[queue, _WAITING] -= departures[queue, slot, _LEAVING]
        room = True
        for queue in range(queues.shape[0]):
            wanted, waiting = code[at, _NEEDS + queue], queues[queue, _WAITING]
            if wanted and waiting and waiting + wanted > queues[queue, _ENTRIES]:
                room = False
        if room:
            break
        cycle += 1
    for queue in range(queues.shape[0]):
        queues[queue, _WAITING] += code[at, _NEEDS + queue]
    return cycle


@numba.njit(cache=True)
def _mispredicted(branches, at, taken, history):
    """Whether a predictor that remembers how often a branch went one way in a row would miss this time."""
    if taken == branches[at, _DIRECTION]:
        branches[at, _RUN] += 1
        previous = branches[at, _LAST + taken]
        return 0 < previous <= history and branches[at, _RUN] == previous + 1
    missed = False
    if branches[at, _DIRECTION] >= 0:
        other = _LAST + branches[at, _DIRECTION]
        missed = not (branches[at, _RUN] == branches[at, other] and branches[at, other] <= history)
        branches[at, other] = branches[at, _RUN]
    branches[at, _DIRECTION] = taken
    branches[at, _RUN] = 1
    return missed


@numba.njit(cache=True)
def _prefetch(streams, at, address, cycle, ahead, tags, levels, pending):
    """Fetch lines ahead of an instruction whose addresses advance steadily."""
    step = address - streams[at, _BEFORE]
    if step == 0:
        return
    if step == streams[at, _STEP]:
        streams[at, _EQUAL] += 1
    else:
        streams[at, _STEP], streams[at, _EQUAL], streams[at, _STARTED] = step, 0, 0
    crossed = address // LINE != streams[at, _BEFORE] // LINE
    streams[at, _BEFORE] = address
    if streams[at, _EQUAL] < _STEADY or not crossed:
        return
    reach = step if abs(step) >= LINE else (LINE if step > 0 else -LINE)
    ahead = min(ahead, _REACH // abs(reach))
    nearest = ahead if streams[at, _STARTED] else 1  # the lines between were fetched when earlier ones were touched
    streams[at, _STARTED] = 1
    for distance in range(max(nearest, 1), ahead + 1):
        line = (address + reach * distance) // LINE
        if not holds(tags, levels, 0, line):
            arrival(tags, levels, pending, line, cycle, 1, 0)


@numba.njit(cache=True)
def _simulate(trace, code, parameters, pipeline_count, queues, tags, levels, pending, cost):
    width, window, retire, history = parameters[_WIDTH], parameters[_WINDOW], parameters[_RETIRE], parameters[_HISTORY]
    forward, ahead, drains = parameters[_STORE_FORWARD], parameters[_PREFETCH], parameters[_STORES]
    busy = np.full((pipeline_count, _HORIZON), -1, np.int64)
    pipelines = np.zeros((pipeline_count, 2), np.int64)
    departures = np.full((queues.shape[0], _HORIZON, 2), -1, np.int64)
    ready = np.zeros(REGISTERS, np.int64)
    in_window = np.zeros(window, np.int64)  # retirement of the last instructions
    stores = np.zeros(parameters[_STORE_BUFFER], np.int64)  # when the last stores left the buffer
    stored = np.full((_WORDS, 2), -1, np.int64)
    streams = np.zeros((code.shape[0], 4), np.int64)
    branches = np.zeros((code.shape[0], 4), np.int64)
    branches[:, _DIRECTION] = -1
    clock = np.zeros(1, np.int64)
    dispatch = used = retired = retired_now = redirect = drained = drained_now = 0
    window_slot = store_slot = mispredicts = 0
    for step in range(trace.shape[0]):
        at, address = trace[step, 0], trace[step, 1]
        access = code[at, _ACCESS]
        if address < 0:
            access = 0  # where it reads is not known: it is timed as if it touched no memory
        last = address + code[at, _ACCESSED] - 1
        # dispatch: in order, as wide as the core, with room in the window, the store buffer and the queues
        start = max(dispatch, redirect, in_window[window_slot])
        if access >= STORE:
            start = max(start, stores[store_slot])
        if start > dispatch:
            dispatch, used = start, 0
        if used and used + code[at, _SLOTS] > width:
            dispatch, used = dispatch + 1, 0
        if code[at, _COUNT]:
            start = _wait_for_room(code, at, queues, departures, clock, dispatch)
            if start > dispatch:
                dispatch, used = start, 0
        used += code[at, _SLOTS]
        while used > width:
            dispatch, used = dispatch + 1, used - width
        # operands
        address_ready = data_ready = dispatch + 1
        column = _ADDRESS_READS
        while column < _WRITES and code[at, column] >= 0:
            address_ready = max(address_ready, ready[code[at, column]])
            column += 1
        column = _READS
        while column < _EARLY and code[at, column] >= 0:
            data_ready = max(data_ready, ready[code[at, column]] - code[at, column + _SOURCES])
            column += 1
        # the address: loads, and the address halves of stores
        end = _OPERATIONS + _STRIDE * code[at, _COUNT]
        addressed = address_ready
        for operation in range(_OPERATIONS, end, _STRIDE):
            if code[at, operation + _KIND]:
                begun = _issue(code, at, operation, busy, pipelines, departures, address_ready)
                if code[at, operation + _KIND] == _LOAD_OPERATION or access == STORE:
                    addressed = max(addressed, begun)
        done = data_ready
        if access == LOAD or access == LOAD_AND_STORE:  # noqa: SIM109 - numba compares with a tuple slowly
            arrived = addressed
            for line in range(address // LINE, last // LINE + 1):
                arrived = max(arrived, arrival(tags, levels, pending, line, addressed, 1, 1))
            if ahead:
                _prefetch(streams, at, address, addressed, ahead, tags, levels, pending)
            loaded = arrived + code[at, _LOAD_LATENCY]
            if stored[(address >> 2) & (_WORDS - 1), _WORD] == address >> 2:
                loaded = max(loaded, stored[(address >> 2) & (_WORDS - 1), _AT] + forward)
            if stored[(last >> 2) & (_WORDS - 1), _WORD] == last >> 2:
                loaded = max(loaded, stored[(last >> 2) & (_WORDS - 1), _AT] + forward)
            done = max(done, loaded)
        elif code[at, _LOAD_LATENCY] > 0:
            done = max(done, addressed + code[at, _LOAD_LATENCY])
        # the operation itself
        begun = max(done, addressed)
        for operation in range(_OPERATIONS, end, _STRIDE):
            if code[at, operation + _KIND] == _COMPUTE:
                begun = max(begun, _issue(code, at, operation, busy, pipelines, departures, done))
        done = begun + code[at, _LATENCY]
        if access >= STORE:
            for word in range(address >> 2, (last >> 2) + 1):
                stored[word & (_WORDS - 1), _WORD] = word
                stored[word & (_WORDS - 1), _AT] = begun
            # the line is asked for as soon as the address is known: links are booked in the program's order, and a request dated
            # when the data is ready would hold up loads that come after it but start before
            arrived = begun
            for line in range(address // LINE, last // LINE + 1):
                arrived = max(arrived, arrival(tags, levels, pending, line, addressed, 2, 1))
            start = max(done, retired, arrived)
            if start > drained:
                drained, drained_now = start, 0
            drained_now += 1
            if drained_now > drains:
                drained, drained_now = drained + 1, 1
            stores[store_slot] = drained
            store_slot += 1
            if store_slot == stores.shape[0]:
                store_slot = 0
        column = _WRITES
        while column < _OPERATIONS and code[at, column] >= 0:
            ready[code[at, column]] = done
            column += 1
        if code[at, _WRITTEN_BACK] >= 0:
            ready[code[at, _WRITTEN_BACK]] = address_ready + 1
        if code[at, _BRANCH] and step + 1 < trace.shape[0]:
            taken = 1 if code[trace[step + 1, 0], _ADDRESS] != code[at, _NEXT] else 0
            if _mispredicted(branches, at, taken, history):
                mispredicts += 1
                redirect = max(redirect, done + parameters[_MISPREDICT])
        # retirement, in order; what passes since the last one is this instruction's share of the time
        before = retired
        if done > retired:
            retired, retired_now = done, 1
        else:
            retired_now += 1
            if retired_now > retire:
                retired, retired_now = retired + 1, 1
        if trace[step, 2]:
            cost[at, 0] += retired - before
            cost[at, 1] += 1
        in_window[window_slot] = retired
        window_slot += 1
        if window_slot == window:
            window_slot = 0
    return retired, mispredicts
