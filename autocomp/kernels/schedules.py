"""Moves on schedules that the templates share: epilogues, write-backs, and everything that has no anchor."""

from __future__ import annotations

import math
from typing import Any

from autocomp.hardware.profile import Profile

_SQUARE = 16  # floats of a cache line of 64 bytes


def write_back(schedule: Any, last: Any, depth: int, lanes: int) -> None:
    """Vectorise the epilogue over one register, or what divides both it and the channels, and unroll the rest; other edges stay scalar."""
    *rows, channel = schedule.get_loops(last)[depth:]
    width = math.gcd(extent_of(schedule, channel), lanes)
    if width >= 4:
        outer, lane = schedule.split(channel, [None, width])
        schedule.vectorize(lane)
        rows.append(outer)
    for loop in rows:
        schedule.unroll(loop)


def in_registers(schedule: Any, *loops: Any) -> None:
    """Vectorise the last of some loops and unroll the others."""
    *unrolled, lane = loops
    schedule.vectorize(lane)
    for loop in unrolled:
        schedule.unroll(loop)


def cut_rows_up(schedule: Any, outer: list[Any], rows_up: int) -> list[Any]:
    """Split the innermost of the loops over rows, in place, for a tile of several; the inner loop, if there is one."""
    if rows_up == 1:
        return []
    up, inner = schedule.split(outer.pop(), [None, rows_up])
    outer.append(up)
    return [inner]


def part_cropped(schedule: Any, last: Any, channels: int, channel_outer: Any) -> None:
    """Where columns are cropped, whole vectors lose the condition, and with it their scalar stores, to a loop of their own."""
    if int(schedule.get(last).iter_vars[-1].dom.extent) != channels:
        schedule.annotate(channel_outer, "pragma_loop_partition_hint", 1)


def flatten_rows(schedule: Any, last: Any) -> None:
    """Give the epilogue the anchor's two axes (all rows, channels), so that tiles of rows map onto it."""
    from tvm import tirx

    extents = [extent_of(schedule, loop) for loop in schedule.get_loops(last)]
    if len(extents) == 2:
        return

    def flat(*axes: Any) -> list[Any]:
        row: Any = tirx.const(0, "int64")
        for axis, extent in zip(axes[:-1], extents[:-1], strict=True):
            row = row * extent + axis
        return [row, axes[-1]]

    schedule.transform_block_layout(last, tirx.IndexMap.from_func(flat, ndim=len(extents)))


def schedule_rowwise(schedule: Any, profile: Profile) -> None:
    """Elementwise, reduction and data-movement functions: inline what can be, vectorise along the contiguous axis."""
    for block in blocks_of(schedule)[:-1]:
        if is_spatial(schedule, block):
            try:
                schedule.compute_inline(block)
            except Exception:
                continue
    for block in blocks_of(schedule):
        if not is_spatial(schedule, block):
            _schedule_reduction(schedule, block, profile)
        elif not _schedule_transpose(schedule, block):
            vectorise_last(schedule, block, profile)


def _schedule_transpose(schedule: Any, block: Any) -> bool:
    """Where reads and writes are contiguous along different axes, go through squares of 16 x 16: every cache line is used whole.

    False if the block is no such transpose; nothing is changed then.
    """
    node = schedule.get(block)
    loops = schedule.get_loops(block)
    variables = [axis.var for axis in node.iter_vars]
    if len(node.reads) != 1 or len(loops) != len(variables) or len(loops) < 2:
        return False
    inner = node.reads[0].region[-1].min if len(node.reads[0].region) else None
    position = next(
        (index for index, variable in enumerate(variables) if inner is not None and inner.same_as(variable)), None
    )
    if position is None or position == len(loops) - 1:
        return False
    across, down = loops[position], loops[-1]
    if extent_of(schedule, across) < _SQUARE or extent_of(schedule, down) < _SQUARE:
        return False
    across_outer, across_inner = schedule.split(across, [None, math.gcd(extent_of(schedule, across), _SQUARE)])
    down_outer, down_inner = schedule.split(down, [None, math.gcd(extent_of(schedule, down), _SQUARE)])
    schedule.reorder(across_outer, down_outer, across_inner, down_inner)
    schedule.vectorize(down_inner)
    return True


def _schedule_reduction(schedule: Any, block: Any, profile: Profile) -> None:
    loops = schedule.get_loops(block)
    kinds = [int(axis.iter_type) for axis in schedule.get(block).iter_vars]
    if len(kinds) != len(loops) or kinds[-1] == 0:
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 0]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != 0]
    if not spatial or extent_of(schedule, spatial[-1]) % profile.lanes:
        return
    # the contiguous axis is not reduced (a mean over pixels): run it innermost, a vector at a time
    outer, lane = schedule.split(spatial[-1], [None, profile.lanes])
    schedule.reorder(*spatial[:-1], outer, *reduction, lane)
    schedule.vectorize(lane)
    start = schedule.decompose_reduction(block, reduction[0])
    schedule.vectorize(schedule.get_loops(start)[-1])


def vectorise_last(schedule: Any, block: Any, profile: Profile) -> None:
    loops = schedule.get_loops(block)
    if not loops or not is_spatial(schedule, block):
        return
    extent = extent_of(schedule, loops[-1])
    lanes = math.gcd(extent, profile.lanes)
    if lanes >= 4:
        schedule.vectorize(schedule.split(loops[-1], [None, lanes])[1])


def inline_epilogue(schedule: Any, anchor: Any, profile: Profile) -> Any:
    """Inline what follows the anchor into the last block of its own size and return that block; None if there is none.

    Blocks that spread the result over a larger tensor (the gate of a squeeze-and-excite, multiplied with all pixels) stay behind it as
    loops of their own: in the write-back they would be unrolled over that tensor, and compute the gate anew for each of its elements.
    """
    _inline_side_inputs(schedule, anchor, profile)
    reached = reached_from(schedule, anchor)
    after = [block for block in blocks_of(schedule) if schedule.get(block).name_hint in reached]
    size = elements_of(schedule, anchor)
    spread = next((index for index, block in enumerate(after) if elements_of(schedule, block) > size), len(after))
    for block in [*after[: spread - 1], *after[spread:-1]]:
        schedule.compute_inline(block)
    if spread < len(after):
        vectorise_last(schedule, after[-1], profile)
        if profile.cores > 1:
            schedule.parallel(schedule.get_loops(after[-1])[0])
    return after[spread - 1] if spread else None


def _inline_side_inputs(schedule: Any, anchor: Any, profile: Profile) -> None:
    """Inline what an epilogue reads beside the anchor's result and computes itself (the ``x * 2`` of ``x * 2 + f(x)``)."""
    own = {schedule.get(anchor).name_hint, *reached_from(schedule, anchor), *reached_from(schedule, anchor, back=True)}
    for block in blocks_of(schedule):
        if schedule.get(block).name_hint in own:
            continue
        try:
            schedule.compute_inline(block)
        except Exception:  # a reduction, say: it runs before, as loops of its own
            vectorise_last(schedule, block, profile)


def reached_from(schedule: Any, block: Any, back: bool = False) -> set[str]:
    """Names of the blocks that read what a block computes, at once or through others; with ``back``, of those it reads."""
    found: set[str] = set()
    left = [block]
    while left:
        step = left.pop()
        for near in schedule.get_producers(step) if back else schedule.get_consumers(step):
            name = schedule.get(near).name_hint
            if name not in found:
                found.add(name)
                left.append(near)
    return found


def keep_in_registers(schedule: Any, anchor: Any, profile: Profile) -> Any:
    """Give the anchor's result local memory and return the block that writes it out: the epilogue's last, or a copy of it."""
    last = inline_epilogue(schedule, anchor, profile)
    if last is None:
        return schedule.cache_write(anchor, 0, "local")
    schedule.set_scope(anchor, 0, "local")
    return last


def elements_of(schedule: Any, block: Any) -> int:
    """Elements that a block writes."""
    return math.prod(int(axis.dom.extent) for axis in schedule.get(block).iter_vars if axis.iter_type == 0)


def reductions(schedule: Any) -> list[Any]:
    return [block for block in blocks_of(schedule) if not is_spatial(schedule, block)]


def blocks_of(schedule: Any) -> list[Any]:
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def blocks_named(schedule: Any, *names: str) -> list[Any]:
    return [block for block in blocks_of(schedule) if schedule.get(block).name_hint in names]


def is_spatial(schedule: Any, block: Any) -> bool:
    return all(int(axis.iter_type) == 0 for axis in schedule.get(block).iter_vars)


def extent_of(schedule: Any, loop: Any) -> int:
    return int(schedule.get(loop).extent)
