"""Hooks that the emulator calls natively: compiled by numba, they cost nanoseconds where a Python hook costs microseconds.

All share one int64 array per run, whose address the emulator hands them; its slots are named here. Addresses of arrays and of
``uc_emu_stop`` are passed as integers, as numba caches no function that holds a pointer.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types

BYTES = 0  # of code executed
LIMIT = 1  # stop when so many bytes were executed
STOP = 2  # address of uc_emu_stop
STOPPED = 3  # 1 if the limit stopped the run
LOW, HIGH = 4, 5  # addresses of code
COUNTS, SIZES, FIRST = (
    6,
    7,
    8,
)  # addresses of int64 arrays by code offset: executions, block size, bytes executed before the first
BUFFER, RECORDS, CAPACITY = 9, 10, 11  # address of the trace, records in it, records it holds
SLOTS = 12

# A record of a trace: a block (sign bit, its size in bits 48 to 62, its address) or an access (size in bits 48 to 62, address).
BLOCK = -(1 << 63)
SIZE_SHIFT = 48
ADDRESS_MASK = (1 << 48) - 1
BLOCK_ACCESSES = 4096  # records one block can write at most: 512 instructions, 64 bytes each in parts of 8


@numba.extending.intrinsic
def _array_at(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(address), generate


@numba.extending.intrinsic
def _call(typing_context: Any, function: Any, argument: Any) -> Any:
    """Call ``int function(void *)`` given by its address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(8).as_pointer()])
        pointer = builder.inttoptr(arguments[0], kind.as_pointer())
        return builder.call(pointer, [builder.bitcast(arguments[1], ir.IntType(8).as_pointer())])

    return types.int32(function, argument), generate


_BLOCK_HOOK = types.void(types.voidptr, types.uint64, types.uint32, types.CPointer(types.int64))
_MEMORY_HOOK = types.void(
    types.voidptr, types.int32, types.uint64, types.int32, types.int64, types.CPointer(types.int64)
)


@numba.cfunc(_BLOCK_HOOK, cache=True)
def count_block(engine, address, size, slots):
    """Count executions of every block."""
    if slots[BYTES] >= slots[LIMIT]:
        slots[STOPPED] = 1
        _call(slots[STOP], engine)
        return
    offset = types.int64(address) - slots[LOW]
    if offset >= 0 and offset < slots[HIGH] - slots[LOW]:
        counts = _array_at(slots[COUNTS])
        if counts[offset] == 0:
            _array_at(slots[SIZES])[offset] = size
            _array_at(slots[FIRST])[offset] = slots[BYTES]
        counts[offset] += 1
    slots[BYTES] += size


@numba.cfunc(_BLOCK_HOOK, cache=True)
def skip_block(engine, address, size, slots):
    """Only run to the limit."""
    if slots[BYTES] >= slots[LIMIT]:
        slots[STOPPED] = 1
        _call(slots[STOP], engine)
        return
    slots[BYTES] += size


@numba.cfunc(_BLOCK_HOOK, cache=True)
def trace_block(engine, address, size, slots):
    """Record every block."""
    at = slots[RECORDS]
    if slots[BYTES] >= slots[LIMIT] or at + BLOCK_ACCESSES >= slots[CAPACITY]:
        slots[STOPPED] = 1
        _call(slots[STOP], engine)
        return
    _array_at(slots[BUFFER])[at] = types.int64(BLOCK) | (types.int64(size) << SIZE_SHIFT) | types.int64(address)
    slots[RECORDS] = at + 1
    slots[BYTES] += size


@numba.cfunc(_MEMORY_HOOK, cache=True)
def trace_access(engine, kind, address, size, value, slots):
    """Record every access to memory."""
    at = slots[RECORDS]
    if at < slots[CAPACITY]:
        _array_at(slots[BUFFER])[at] = (types.int64(size) << SIZE_SHIFT) | types.int64(address)
        slots[RECORDS] = at + 1


@numba.njit(cache=True)
def match_accesses(raw, low, number_at, length, accessed, out):
    """Give each access to the instruction of its block that made it; wide ones, which the emulator splits, become one.

    ``number_at`` is the number of the instruction at each code offset, ``length`` the code bytes and ``accessed`` the bytes of
    memory that an instruction touches. Writes to ``out`` rows (instruction number, address or -1, 1); returns how many.
    """
    position, total, records = 0, 0, raw.shape[0]
    while position < records:
        record = raw[position]
        position += 1
        if record >= 0:
            continue
        offset = (record & ADDRESS_MASK) - low
        end = offset + ((record >> SIZE_SHIFT) & 0x7FFF)
        while offset < end:
            number = number_at[offset]
            if number < 0:
                break
            address = -1
            got = 0
            while got < accessed[number] and position < records and raw[position] >= 0:
                if address < 0:
                    address = raw[position] & ADDRESS_MASK
                got += raw[position] >> SIZE_SHIFT
                position += 1
            out[total, 0] = number
            out[total, 1] = address
            out[total, 2] = 1
            total += 1
            offset += length[number]
    return total


def new_slots() -> np.ndarray:
    slots = np.zeros(SLOTS, np.int64)
    slots[LIMIT] = np.iinfo(np.int64).max
    return slots
