"""An out-of-order core as a scoreboard: each traced instruction gets the cycles at which it is dispatched, issued, done and retired.

Modelled: width of dispatch, the window, issue queues, pipelines, latencies with accumulator forwarding, store forwarding, the store
buffer, caches with their bandwidth and a stride prefetcher, and branches that a loop predictor would miss. Not modelled: instruction
cache, translation of addresses, other cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np

from autocomp.estimate.caches import LINE, arrival, holds, new_hierarchy, warm
from autocomp.estimate.decode import LOAD, LOAD_AND_STORE, REGISTERS, STORE, Instruction
from autocomp.estimate.instructions import Core

_OPERATIONS, _SOURCES = 10, 6  # most that one instruction has
_COMPUTE, _LOAD_OPERATION, _ADDRESS_OPERATION = 0, 1, 2

_HORIZON = 1 << 14  # cycles the calendars of pipelines and queues look ahead: more than caches._LONGEST
_FORWARDED = 1 << 14  # entries of the table of stored words
_STEADY = 2  # equal strides after which the prefetcher starts

# slots of the parameter vector
_WIDTH, _WINDOW, _RETIRE, _MISPREDICT, _HISTORY, _STORE_FORWARD, _STORE_BUFFER, _PREFETCH = range(8)


class Program(NamedTuple):
    """The static facts of a trace's instructions, as arrays by instruction number."""

    address: np.ndarray
    next_address: np.ndarray
    slots: np.ndarray
    latency: np.ndarray
    load_latency: np.ndarray
    access: np.ndarray
    accessed: np.ndarray
    branch: np.ndarray
    written_back: np.ndarray
    operations: np.ndarray  # how many
    pipelines: np.ndarray  # [n, _OPERATIONS] masks
    holds: np.ndarray  # [n, _OPERATIONS] cycles
    kind: np.ndarray  # [n, _OPERATIONS]
    first: np.ndarray  # [n, _OPERATIONS] lowest pipeline of the mask
    last: np.ndarray  # [n, _OPERATIONS] highest one
    queue: np.ndarray  # [n, _OPERATIONS] where the operation waits
    needs: np.ndarray  # [n, queues] operations by queue
    reads: np.ndarray  # [n, _SOURCES], -1 after the last
    early: np.ndarray  # [n, _SOURCES] cycles by which a source is needed later
    address_reads: np.ndarray
    writes: np.ndarray


class _Machine(NamedTuple):
    """What is busy until when: calendars tagged with their cycle, so that they need no clearing."""

    busy: np.ndarray  # [pipeline, cycle mod horizon] = cycle
    lowest: np.ndarray  # first cycle at which a pipeline may be free
    used: np.ndarray  # operations a pipeline ran
    entries: np.ndarray
    waiting: np.ndarray
    leaving: np.ndarray  # [queue, cycle mod horizon] operations that leave
    leaving_at: np.ndarray  # the cycle that entry is for


@dataclass(frozen=True)
class Simulated:
    """The outcome of a trace: cycles in all, and by instruction number the cycles attributed to it and its executions."""

    cycles: int
    instruction_cycles: np.ndarray
    executions: np.ndarray
    misses: tuple[int, ...]
    mispredicts: int


def simulate(
    trace: np.ndarray, instructions: Sequence[Instruction], core: Core, warmed: Sequence[tuple[int, int]] = ()
) -> Simulated:
    """Time a trace of (instruction number, address of its access, whether its time is attributed) on a core.

    ``warmed`` are address ranges (from, to) that are in the caches as far as they fit, in order.
    """
    caches = new_hierarchy(core)
    for first, last in warmed:
        if last > first:
            warm(caches, first, last)
    caches.misses[:] = 0
    count = len(instructions)
    cycles, executions = np.zeros(count, np.int64), np.zeros(count, np.int64)
    parameters = np.array(
        [core.width, core.window, core.retire, core.mispredict, core.history, core.store_forward, core.store_buffer, core.prefetch],
        np.int64,
    )  # fmt: skip
    total, mispredicts = _simulate(
        trace, program(instructions, core), parameters, _machine(core), caches, cycles, executions
    )
    return Simulated(int(total), cycles, executions, tuple(int(n) for n in caches.misses), int(mispredicts))


def program(instructions: Sequence[Instruction], core: Core) -> Program:
    """Pack instructions and their timings into arrays."""
    n = len(instructions)
    scalars = np.zeros((10, n), np.int64)
    pipelines, cycles, kind, first, last, queue = (np.zeros((n, _OPERATIONS), np.int64) for _ in range(6))
    needs = np.zeros((n, len(core.queues)), np.int64)
    reads, address_reads, writes = (np.full((n, _SOURCES), -1, np.int64) for _ in range(3))
    early = np.zeros((n, _SOURCES), np.int64)
    for at, instruction in enumerate(instructions):
        timing = core.timing(instruction)
        operations = timing.operations[:_OPERATIONS]
        scalars[:, at] = (
            instruction.address, instruction.address + instruction.length, timing.slots, timing.latency,
            timing.load_latency, instruction.access, max(instruction.accessed, 1), instruction.branch,
            instruction.written_back, len(operations),
        )  # fmt: skip
        for index, operation in enumerate(operations):
            pipelines[at, index], cycles[at, index] = operation.pipelines, operation.cycles
            kind[at, index] = _kind(operation.pipelines, operation.address, instruction, core)
            first[at, index] = (operation.pipelines & -operation.pipelines).bit_length() - 1
            last[at, index] = operation.pipelines.bit_length() - 1
            queue[at, index] = next(q for q, fed in enumerate(core.queues) if operation.pipelines & fed.pipelines)
            needs[at, queue[at, index]] += 1
        for index, register in enumerate(instruction.reads[:_SOURCES]):
            reads[at, index] = register
            early[at, index] = timing.forward if register == instruction.accumulator else 0
        address_reads[at, : len(instruction.address_reads)] = instruction.address_reads[:_SOURCES]
        writes[at, : len(instruction.writes[:_SOURCES])] = instruction.writes[:_SOURCES]
    return Program(  # type: ignore[call-arg]  # the scalars are ten fields
        *scalars, pipelines, cycles, kind, first, last, queue, needs, reads, early, address_reads, writes
    )


def _kind(pipelines: int, address: bool, instruction: Instruction, core: Core) -> int:
    if address:
        return _ADDRESS_OPERATION
    generates = not pipelines & ~core.load_pipelines
    if generates and instruction.access in (LOAD, LOAD_AND_STORE):
        return _LOAD_OPERATION
    return _ADDRESS_OPERATION if generates and instruction.access == STORE else _COMPUTE


def _machine(core: Core) -> _Machine:
    pipelines, queues = len(core.pipelines), len(core.queues)
    return _Machine(
        np.full((pipelines, _HORIZON), -1, np.int64),
        np.zeros(pipelines, np.int64),
        np.zeros(pipelines, np.int64),
        np.array([queue.entries for queue in core.queues], np.int64),
        np.zeros(queues, np.int64),
        np.zeros((queues, _HORIZON), np.int64),
        np.full((queues, _HORIZON), -1, np.int64),
    )


@numba.njit(cache=True, forceinline=True)
def _issue(machine, code, at, index, earliest):  # type: ignore[no-untyped-def]
    """Start an operation on that of its pipelines that is free first; of equals, the one used least. Returns the cycle."""
    mask, held = code.pipelines[at, index], code.holds[at, index]
    best, best_cycle = -1, np.int64(1) << 60
    for pipeline in range(code.first[at, index], code.last[at, index] + 1):
        if (mask >> pipeline) & 1:
            cycle = max(earliest, machine.lowest[pipeline])
            while machine.busy[pipeline, cycle & (_HORIZON - 1)] == cycle:
                cycle += 1
            if cycle < best_cycle or (cycle == best_cycle and machine.used[pipeline] < machine.used[best]):
                best, best_cycle = pipeline, cycle
    for cycle in range(best_cycle, best_cycle + held):
        machine.busy[best, cycle & (_HORIZON - 1)] = cycle
    machine.used[best] += held
    while machine.busy[best, machine.lowest[best] & (_HORIZON - 1)] == machine.lowest[best]:
        machine.lowest[best] += 1
    queue = code.queue[at, index]
    slot = best_cycle & (_HORIZON - 1)
    if machine.leaving_at[queue, slot] != best_cycle:
        machine.leaving_at[queue, slot] = best_cycle
        machine.leaving[queue, slot] = 0
    machine.leaving[queue, slot] += 1
    return best_cycle


@numba.njit(cache=True, forceinline=True)
def _enter_queues(machine, needed, cycle, clock):  # type: ignore[no-untyped-def]
    """The first cycle from ``cycle`` on at which all operations of an instruction find room in their queues.

    ``clock[0]`` is the cycle up to which departures have been counted.
    """
    while True:
        while clock[0] < cycle:
            clock[0] += 1
            slot = clock[0] & (_HORIZON - 1)
            for queue in range(needed.shape[0]):
                if machine.leaving_at[queue, slot] == clock[0]:
                    machine.waiting[queue] -= machine.leaving[queue, slot]
        room = True
        for queue in range(needed.shape[0]):
            if (
                needed[queue]
                and machine.waiting[queue]
                and machine.waiting[queue] + needed[queue] > machine.entries[queue]
            ):
                room = False
        if room:
            break
        cycle += 1
    for queue in range(needed.shape[0]):
        machine.waiting[queue] += needed[queue]
    return cycle


@numba.njit(cache=True, forceinline=True)
def _mispredicted(at, taken, history, direction, run, last):  # type: ignore[no-untyped-def]
    """Whether a predictor that remembers how often a branch went one way in a row would miss this time."""
    missed = False
    if taken == direction[at]:
        run[at] += 1
        previous = last[at, taken]
        missed = 0 < previous <= history and run[at] == previous + 1
    else:
        if direction[at] >= 0:
            previous = last[at, direction[at]]
            missed = not (run[at] == previous and previous <= history)
            last[at, direction[at]] = run[at]
        direction[at] = taken
        run[at] = 1
    return missed


@numba.njit(cache=True, forceinline=True)
def _prefetch(caches, at, address, cycle, ahead, previous, stride, steady, started):  # type: ignore[no-untyped-def]
    """Fetch lines ahead of an instruction whose addresses advance steadily."""
    step = address - previous[at]
    if step == 0:
        return
    if step == stride[at]:
        steady[at] += 1
    else:
        steady[at] = 0
        stride[at] = step
        started[at] = 0
    crossed = address // LINE != previous[at] // LINE
    previous[at] = address
    if steady[at] < _STEADY or not crossed:
        return
    reach = step if abs(step) >= LINE else (LINE if step > 0 else -LINE)
    nearest = ahead if started[at] else 1  # the lines between were fetched when earlier ones were touched
    started[at] = 1
    for distance in range(nearest, ahead + 1):
        line = (address + reach * distance) // LINE
        if not holds(caches, 0, line):
            arrival(caches, line, cycle, 1)
            caches.misses[0] -= 1  # only misses that an instruction waits for are counted


@numba.njit(cache=True)
def _simulate(trace, code, parameters, machine, caches, cycles, executions):  # type: ignore[no-untyped-def]
    width, window, retire = parameters[_WIDTH], parameters[_WINDOW], parameters[_RETIRE]
    ready = np.zeros(REGISTERS, np.int64)
    in_window = np.zeros(window, np.int64)  # retirement of the last instructions
    stores = np.zeros(parameters[_STORE_BUFFER], np.int64)  # when the last stores left the buffer
    stored_word, stored_ready = np.full(_FORWARDED, -1, np.int64), np.zeros(_FORWARDED, np.int64)
    count = code.address.shape[0]
    previous, stride = np.zeros(count, np.int64), np.zeros(count, np.int64)
    steady, started = np.zeros(count, np.int64), np.zeros(count, np.int64)
    direction, run, last_run = np.full(count, -1, np.int64), np.zeros(count, np.int64), np.zeros((count, 2), np.int64)
    clock = np.zeros(1, np.int64)
    dispatch = used = retired = retired_now = redirect = drained = 0
    window_slot = store_slot = mispredicts = 0
    for step in range(trace.shape[0]):
        at, address = trace[step, 0], trace[step, 1]
        access = code.access[at]
        if access and address < 0:
            access = 0  # its address is not known: it is timed as if it touched no memory
        # dispatch: in order, as wide as the core, with room in the window, the store buffer and the queues
        start = max(dispatch, redirect, in_window[window_slot])
        if access >= STORE:
            start = max(start, stores[store_slot])
        if start > dispatch:
            dispatch, used = start, 0
        if used and used + code.slots[at] > width:
            dispatch, used = dispatch + 1, 0
        start = _enter_queues(machine, code.needs[at], dispatch, clock)
        if start > dispatch:
            dispatch, used = start, 0
        used += code.slots[at]
        while used > width:
            dispatch, used = dispatch + 1, used - width
        # operands
        address_ready = data_ready = dispatch + 1
        for index in range(_SOURCES):
            if code.address_reads[at, index] < 0:
                break
            address_ready = max(address_ready, ready[code.address_reads[at, index]])
        for index in range(_SOURCES):
            if code.reads[at, index] < 0:
                break
            data_ready = max(data_ready, ready[code.reads[at, index]] - code.early[at, index])
        # the address: loads, and the address halves of stores
        done = data_ready
        addressed = address_ready
        for index in range(code.operations[at]):
            if code.kind[at, index]:
                begun = _issue(machine, code, at, index, address_ready)
                if code.kind[at, index] == _LOAD_OPERATION or access == STORE:
                    addressed = max(addressed, begun)
        if access in (LOAD, LOAD_AND_STORE):
            arrived = addressed
            for line in range(address // LINE, (address + code.accessed[at] - 1) // LINE + 1):
                arrived = max(arrived, arrival(caches, line, addressed, 1))
            if parameters[_PREFETCH]:
                _prefetch(caches, at, address, addressed, parameters[_PREFETCH], previous, stride, steady, started)
            loaded = arrived + code.load_latency[at]
            for word in ((address >> 2), (address + code.accessed[at] - 1) >> 2):
                if stored_word[word % _FORWARDED] == word:
                    loaded = max(loaded, stored_ready[word % _FORWARDED] + parameters[_STORE_FORWARD])
            done = max(done, loaded)
        elif code.load_latency[at]:
            done = max(done, addressed + code.load_latency[at])
        # the operation itself
        begun = done
        for index in range(code.operations[at]):
            if code.kind[at, index] == _COMPUTE:
                begun = max(begun, _issue(machine, code, at, index, done))
        begun = max(begun, addressed)
        done = begun + code.latency[at]
        if access >= STORE:
            for word in range(address >> 2, ((address + code.accessed[at] - 1) >> 2) + 1):
                stored_word[word % _FORWARDED] = word
                stored_ready[word % _FORWARDED] = begun
            arrived = begun
            for line in range(address // LINE, (address + code.accessed[at] - 1) // LINE + 1):
                arrived = max(arrived, arrival(caches, line, begun, 2))
            drained = max(drained + 1, done, retired, arrived)
            stores[store_slot] = drained
            store_slot += 1
            if store_slot == stores.shape[0]:
                store_slot = 0
        for index in range(_SOURCES):
            if code.writes[at, index] < 0:
                break
            ready[code.writes[at, index]] = done
        if code.written_back[at] >= 0:
            ready[code.written_back[at]] = address_ready + 1
        if code.branch[at] and step + 1 < trace.shape[0]:
            taken = 1 if code.address[trace[step + 1, 0]] != code.next_address[at] else 0
            if _mispredicted(at, taken, parameters[_HISTORY], direction, run, last_run):
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
            cycles[at] += retired - before
            executions[at] += 1
        in_window[window_slot] = retired
        window_slot += 1
        if window_slot == window:
            window_slot = 0
    return retired, mispredicts
