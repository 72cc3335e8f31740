"""Products of bytes, or of bfloat16, in matrix registers (Intel AMX): 16 x 16 sums of 64 (32) products each by one instruction.

A register holds up to 16 rows of 64 bytes: 16 rows of sums of a vector of channels, as many rows of inputs, or 16 groups of four weights of
each channel (of two in bfloat16). Inputs are read where they lie, a row a stride; weights are packed as VNNI reads them. So a kernel of bytes
is the same function for both, and which runs it is a matter of its tile. Source: Intel 64 and IA-32 Architectures Software Developer's
Manual, vol. 1 chapter 18 and vol. 2 (LDTILECFG, TILELOADD, TDPBUSD, TDPBF16PS); asking the system for the registers: Linux,
Documentation/arch/x86/xstate.rst.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from autocomp.hardware.profile import Profile
from autocomp.kernels.intrinsics import dot_product
from autocomp.kernels.matrix_code import COLUMNS, REGISTERS, Registers, in_matrix_registers, parts_of, steps_of
from autocomp.kernels.schedules import (
    blocks_named,
    cut_rows_up,
    flatten_rows,
    keep_in_registers,
    part_cropped,
    vectorise_last,
    write_back,
)
from autocomp.kernels.tile import Anchor, Tile, divisors
from autocomp.records.precisions import arithmetic_of

_MOST_UP, _MOST_ROWS = 4, 64
_SHORT = 16  # groups of products, as of 64 channels in bytes
_LEAST_STEPS = 4  # groups of products below which an instruction is mostly empty


def has_kernels(anchor: Anchor, profile: Profile) -> bool:
    """Whether a kernel may use matrix registers on a target."""
    arithmetic = arithmetic_of(anchor.template)
    return (
        arithmetic.dot
        and dot_product(profile, arithmetic.name).matrix
        and anchor.template.startswith(("conv2d", "dense"))
        and profile.cores == 1
        and steps_of(anchor.reduction[-2]) >= _LEAST_STEPS
    )


def candidates(anchor: Anchor, profile: Profile) -> list[Tile]:
    """Tiles in matrix registers, the best guess first."""
    return sorted(_candidates(anchor), key=lambda tile: _cost(tile, anchor))


def _candidates(anchor: Anchor) -> Iterator[Tile]:
    *_, up, across = (1, *anchor.spatial[:-1])
    vectors = anchor.spatial[-1] // COLUMNS
    for rows, count in itertools.product(divisors(across, _MOST_ROWS), divisors(vectors, REGISTERS)):
        ups = divisors(up, _MOST_UP) if rows == across and anchor.template.startswith("conv2d") else [1]
        for rows_up in ups:
            parts = parts_of(rows) * rows_up
            if rows % parts_of(rows) == 0 and parts * count + min(parts, count) + 1 <= REGISTERS:
                for channels_outer in (True, False) if vectors > count else (True,):
                    yield Tile(rows, count, rows_up=rows_up, channels_outer=channels_outer, matrix=True)


def _cost(tile: Tile, anchor: Anchor) -> float:
    """Cycles a product, about: 16 an instruction, 8 a register that is loaded, twice as many for one that is stored at the end.

    An instruction waits for the one before it that adds to the same sums, so several sums at a time are ahead (measured: two take an
    eighth less time than one, four a sixteenth less than two).
    """
    parts = parts_of(tile.rows) * tile.rows_up
    sums, steps = parts * tile.vectors, steps_of(anchor.reduction[-2])
    count = math.prod(anchor.reduction[:-1]) // steps
    cycles = count * max(16 * sums, 8 * (parts + tile.vectors)) + 16 * sums
    waiting = 1 + 0.25 / sums + 0.01 * (not tile.channels_outer)
    return waiting * cycles / (count * tile.rows * tile.rows_up * tile.vectors * steps)


def is_short(anchor: Anchor) -> bool:
    """Whether a sum is so short that beginning and ending it in matrix registers is most of the work."""
    return math.prod(anchor.reduction[:-1]) <= _SHORT


def tile_matrix(schedule: Any, tile: Tile, anchor: Anchor, profile: Profile) -> Any:
    """Schedule a fused function and put matrix instructions in the place of its anchor's inner loops; returns the function."""
    (block,) = blocks_named(schedule, "anchor")
    last = keep_in_registers(schedule, block, profile)
    if len(anchor.spatial) == 2:
        flatten_rows(schedule, last)
    loops = schedule.get_loops(block)
    spatial, reduction = loops[: len(anchor.spatial)], loops[len(anchor.spatial) :]
    *outer, across, channel = spatial
    inner = cut_rows_up(schedule, outer, tile.rows_up)
    across_outer, across_inner = schedule.split(across, [None, tile.rows])
    channel_outer, channel_inner = schedule.split(channel, [None, tile.vectors * COLUMNS])
    outer = [channel_outer, *outer, across_outer] if tile.channels_outer else [*outer, across_outer, channel_outer]
    schedule.reorder(*outer, *reduction, *inner, across_inner, channel_inner)
    schedule.reverse_compute_at(last, outer[-1], preserve_unit_loops=True)
    part_cropped(schedule, last, anchor.spatial[-1], channel_outer)
    write_back(schedule, last, len(outer), COLUMNS)
    schedule.decompose_reduction(block, reduction[0])
    for pad in blocks_named(schedule, "pad", "pack"):
        vectorise_last(schedule, pad, profile)
    dot = dot_product(profile, arithmetic_of(anchor.template).name)
    return in_matrix_registers(schedule.mod["main"], Registers.of(tile, anchor.reduction[-2]), dot, len(outer))
