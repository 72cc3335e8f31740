"""Schedules by template: which tiles a kernel may take, in the order the analytic model likes them, and how each is applied.

A contraction keeps a block of ``rows x vectors`` accumulators in vector registers, runs the whole reduction over it, and writes the
block back through the fused epilogue. A vector is exactly one register's lanes, and registers are unrolled: wider vectors
(48 lanes, say) fall off a cliff in LLVM.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from autocomp.hardware.profile import Profile
from autocomp.kernels import matrix, neon, winograd, winograd_tiles
from autocomp.kernels.compute import FLOPS, RUNS, TEMPLATE
from autocomp.kernels.intrinsics import dot_product
from autocomp.kernels.prefetch import prefetch_weights
from autocomp.kernels.schedules import (
    blocks_named,
    blocks_of,
    cut_rows_up,
    flatten_rows,
    in_registers,
    keep_in_registers,
    part_cropped,
    reductions,
    schedule_rowwise,
    vectorise_last,
    write_back,
)
from autocomp.kernels.tile import Anchor, Tile, divisors, lanes_of
from autocomp.records.precisions import ARITHMETICS, arithmetic_of

VERSION = 8  # raise when a change here makes stored choices worth finding again

_WINOGRAD_TILES = 5  # that are tried: much code each, which takes three times as long to build as another template's
_MATRIX_TILES = 4  # that are tried before tiles of vectors
_MOST_BAND = 14
_NEAR, _FAR = 24 << 10, 1 << 20  # bytes that stay in half of the nearest cache; that half of the next one holds
_BAND_BYTES = 40 << 10  # of 48 KB nearest cache; measured on depthwise layers of MobileNetV2 and V3
_OPERATIONS = ("conv2d", "conv3d", "dense", "batch_matmul", "depthwise", winograd.NAME)
# whose weights lie block after block
_FETCHED = frozenset(
    each.template(name) for each in ARITHMETICS.values() if not each.runs for name in ("conv2d", "dense")
)
CONTRACTIONS = frozenset(each.template(operation) for each in ARITHMETICS.values() for operation in _OPERATIONS)


_SPATIAL, _REDUCTION = "autocomp.spatial", "autocomp.reduction"  # attributes of functions


def describe(function: Any) -> Anchor:
    """Read a fused function's anchor; template ``rowwise`` where it has none."""
    from tvm import s_tir

    if _is_scheduled(function):
        return _stated(function)
    schedule = s_tir.Schedule(function)
    block = _anchor_block(schedule)
    if block is None:
        return Anchor("rowwise", 0)
    node = schedule.get(block)
    spatial = tuple(int(axis.dom.extent) for axis in node.iter_vars if axis.iter_type == 0)
    reduction = tuple(int(axis.dom.extent) for axis in node.iter_vars if axis.iter_type != 0)
    runs = int(node.annotations.get(RUNS, 0))
    return Anchor(
        str(node.annotations[TEMPLATE]), int(node.annotations[FLOPS]), spatial[runs:], (*spatial[:runs], *reduction)
    )


# for what the template cannot schedule: loops over the last axis in vectors, and at the very last the loops as they are
LAST_RESORT = (Tile(vectors=0), Tile(rows=0, vectors=0))


def tiles(anchor: Anchor, profile: Profile) -> list[Tile]:
    """The legal tiles of a kernel, best guess first. Every template has at least one."""
    from autocomp.kernels import weight_only  # which builds on this module

    if weight_only.is_weight_only(anchor):
        return weight_only.tiles(anchor, profile)
    if anchor.template == winograd.NAME:
        found = winograd_tiles.candidates(anchor, profile)
        return sorted(
            found, key=lambda tile: _cost(tile, anchor, profile) + winograd_tiles.band_cost(tile, anchor, profile)
        )[:_WINOGRAD_TILES]
    if anchor.template not in CONTRACTIONS:
        return [Tile()]
    lanes = lanes_of(anchor, profile)
    channels = anchor.spatial[-1]
    if channels % lanes:
        return [Tile(vectors=0)]  # no whole vector: the plain schedule, left to the compiler
    candidates = sorted(
        _contraction_tiles(anchor, channels // lanes, profile), key=lambda tile: _cost(tile, anchor, profile)
    )
    if matrix.has_kernels(anchor, profile):
        ahead = matrix.candidates(anchor, profile)[:_MATRIX_TILES]
        # where a sum is a few instructions long, either may be ahead
        return (
            [*ahead[:1], *candidates[:1], *ahead[1:], *candidates[1:]]
            if matrix.is_short(anchor)
            else ahead + candidates
        )
    return candidates or [Tile()]


def _contraction_tiles(anchor: Anchor, vectors: int, profile: Profile) -> Iterator[Tile]:
    *_, up, across = (1, *anchor.spatial[:-1])
    if anchor.template.startswith("depthwise") and up > 1:
        yield from _depthwise_tiles(anchor, vectors, profile)
        return
    square = anchor.template.startswith(("conv", "depthwise"))
    steps = 1
    unrolls: tuple[int, ...] = (1, 4) if anchor.reduction[-1] % 4 == 0 else (1,)
    if (arithmetic := arithmetic_of(anchor.template)).dot:
        steps, unrolls = dot_product(profile, arithmetic.name).of_width(anchor.reduction[-1]).steps, (1,)
    for rows, count in itertools.product(divisors(across, 28), divisors(vectors, 8)):
        for rows_up in divisors(up, 8) if square and rows == across and rows < 8 else (1,):
            # beside the accumulators: a register of weights for each vector, and the broadcast input (or a depthwise product)
            if rows * rows_up * count + steps * count + 1 > profile.vector_registers:
                continue
            for unroll in unrolls:
                for channels_outer in (True, False) if vectors > count else (True,):
                    yield Tile(rows, count, unroll, channels_outer, rows_up)


def _depthwise_tiles(anchor: Anchor, vectors: int, profile: Profile) -> Iterator[Tile]:
    """Long rows of one or two registers; bands whose padded inputs fit the nearest cache, and the ones beside them."""
    *_, up, across, _ = anchor.spatial
    bands = [band for band in divisors(up, _MOST_BAND) if _band_bytes(band, anchor, profile) <= _BAND_BYTES]
    most = 4 if neon.is_neon(profile) else 2
    for rows, count, band in itertools.product(divisors(across, 14), divisors(vectors, most), [*bands[-2:], 0]):
        if rows * count + count + 1 <= profile.vector_registers:
            yield Tile(rows, count, band=band)


def _band_bytes(band: int, anchor: Anchor, profile: Profile) -> int:
    """Bytes of the inputs of a band of one register's channels, at the stride of 2 that is the most in use."""
    (*depth, height, width), lanes = anchor.reduction, lanes_of(anchor, profile)
    return 4 * lanes * math.prod(depth) * (2 * band + height - 1) * (2 * anchor.spatial[-2] + width - 1)


def _cost(tile: Tile, anchor: Anchor, profile: Profile) -> float:
    """Relative cycles by the analytic model; only the order matters.

    A multiply-add takes one unit where enough independent sums hide its latency, about nine; every row's broadcast serves ``vectors`` of them
    and every register of weights ``rows``. What those loads add was fitted to 40 products of six networks (AVX-512): weights cost three times
    as much from the second-level cache as from the first.
    """
    rows = tile.rows * tile.rows_up
    block = rows * tile.vectors
    if anchor.template.startswith("depthwise"):
        if neon.is_neon(profile):
            return neon.depthwise_cost(tile)
        if len(anchor.spatial) < 4 or anchor.spatial[-3] == 1:  # along one axis
            return 1 / min(block, 14) + 0.01 * (tile.vectors - 1)
        # one register of channels and short bands are ahead; without a band, whole maps pass through the caches
        return 1 / min(block, 7) + 0.05 * (tile.vectors - 1) + 0.002 * abs(tile.rows - 8) + (0.001 * tile.band or 0.2)
    if neon.is_neon(profile):
        return neon.cost(tile, anchor, profile)
    depth, written = 4 * math.prod(anchor.reduction), 4 * math.prod(anchor.spatial)
    panel, weights = depth * tile.vectors * profile.lanes, depth * anchor.spatial[-1]
    cost = max(1.0, 9 / block) + (1.0 if panel <= _NEAR else 1.9) / rows + 0.7 / tile.vectors
    if weights <= _NEAR:  # all weights at once: the data are then read once
        order = 0.01 * tile.channels_outer
    else:  # whole lines of a result that leaves the caches are worth fetching weights again for: a close second
        order = (0.001 if written >= _FAR and weights <= _FAR else 0.02) * (not tile.channels_outer)
    return cost * (1 + 0.02 * (tile.unroll != 1) + order)


def apply(function: Any, tile: Tile, anchor: Anchor, profile: Profile) -> Any:
    """Schedule a fused function with one tile; returns a PrimFunc marked as scheduled."""
    from tvm import s_tir

    if _is_scheduled(function):
        return function
    # held while it is scheduled: TVM changes in place what nobody holds, and the function shares its loops
    short = _short_indices(function)
    schedule = s_tir.Schedule(short)
    return _tiled(schedule, tile, anchor, profile).with_attr("tirx.is_scheduled", True)


def _tiled(schedule: Any, tile: Tile, anchor: Anchor, profile: Profile) -> Any:
    """The schedule's function, by the template of its anchor."""
    from autocomp.kernels import fp16, weight_only

    if not tile.rows or (anchor.template == winograd.NAME and not tile.vectors):
        return schedule.mod["main"]
    if tile.matrix:
        return matrix.tile_matrix(schedule, tile, anchor, profile)
    if not tile.vectors:
        schedule_rowwise(schedule, profile)
    elif anchor.template == winograd.NAME:
        return winograd_tiles.tile_winograd(schedule, tile, profile)
    elif weight_only.is_weight_only(anchor):
        weight_only.tile_weight_only(schedule, tile, anchor, profile)
    elif arithmetic_of(anchor.template).runs and len(reductions(schedule)) > 1:
        fp16.tile_runs(schedule, tile, anchor, profile)
    elif anchor.template in CONTRACTIONS:
        _tile_contraction(schedule, tile, anchor, profile)
        if anchor.template in _FETCHED and not neon.is_neon(profile):
            return prefetch_weights(schedule.mod["main"], 0, tile.vectors)
    else:
        schedule_rowwise(schedule, profile)
    return schedule.mod["main"]


def _short_indices(function: Any) -> Any:
    """The function with 32-bit indices, where its tensors allow it: TVM then proves more of the bounds, and LLVM addresses better."""
    import tvm

    dtypes = [str(parameter.ty.dtype).removeprefix("T.") for parameter in function.params]
    sizes = [math.prod(int(size) for size in parameter.ty.shape) for parameter in function.params]
    if "int64" in dtypes or max(sizes, default=0) >= 2**31:
        return function
    try:
        return tvm.tirx.transform.ForceNarrowIndexToInt32()(tvm.IRModule({"main": function}))["main"]
    except Exception:  # 64-bit values inside: it stays as it is
        return function


def _tile_contraction(schedule: Any, tile: Tile, anchor: Anchor, profile: Profile) -> None:
    block = _anchor_block(schedule)
    last = keep_in_registers(schedule, block, profile)
    lanes = lanes_of(anchor, profile)
    if len(anchor.spatial) == 2:
        flatten_rows(schedule, last)
    loops = schedule.get_loops(block)
    spatial, reduction = loops[: len(anchor.spatial)], loops[len(anchor.spatial) :]
    *outer, across, channel = spatial
    inner = cut_rows_up(schedule, outer, tile.rows_up)
    band: list[Any] = []
    if tile.band:
        up, up_inner = schedule.split(outer.pop(), [None, tile.band])
        outer.append(up)
        band.append(up_inner)
    across_outer, across_inner = schedule.split(across, [None, tile.rows])
    inner.append(across_inner)
    channel_outer, vector, lane = schedule.split(channel, [None, tile.vectors, lanes])
    if tile.band:
        outer.append(channel_outer)
        band.append(across_outer)
    elif tile.channels_outer and anchor.template != "batch_matmul":
        outer = [channel_outer, *outer, across_outer]
    else:
        outer += [across_outer, channel_outer]
    arithmetic = arithmetic_of(anchor.template)
    dot = dot_product(profile, arithmetic.name).of_width(anchor.reduction[-1]) if arithmetic.dot else None
    intrinsic = dot is not None and dot.intrinsic
    lane_reduction = [reduction.pop()] if intrinsic else []
    if tile.unroll > 1:
        step, step_inner = schedule.split(reduction.pop(), [None, tile.unroll])
        reduction += [step, step_inner]
    schedule.reorder(*outer, *band, *reduction, *inner, vector, lane, *lane_reduction)
    schedule.reverse_compute_at(last, [*outer, *band][-1], preserve_unit_loops=True)
    if tile.band:
        for pad in blocks_named(schedule, "pad"):
            schedule.compute_at(pad, outer[-1], preserve_unit_loops=True)
    if profile.cores > 1:
        outer = [schedule.fuse(*outer)]
        schedule.parallel(outer[0])
    else:
        part_cropped(schedule, last, anchor.spatial[-1], channel_outer)
    outer += band
    for loop in (*inner, vector):
        schedule.unroll(loop)
    if tile.unroll > 1:
        schedule.unroll(reduction[-1])
    write_back(schedule, last, len(outer), lanes)
    if not intrinsic:
        schedule.vectorize(lane)
    start = schedule.decompose_reduction(block, reduction[0])
    if dot is not None and dot.intrinsic:
        schedule.tensorize(lane, dot.register())
        if dot.source:
            schedule.annotate(outer[0], "pragma_import_llvm", dot.source)
    in_registers(schedule, *schedule.get_loops(start)[len(outer) :])
    for pad in blocks_named(schedule, "pad", "pack"):
        vectorise_last(schedule, pad, profile)


def _is_scheduled(function: Any) -> bool:
    """Whether a function was written as loops already (``kernels.rows``)."""
    return bool(function.attrs and function.attrs.get("tirx.is_scheduled", False))


def _stated(function: Any) -> Anchor:
    """What a function that was written as loops says of itself, as `stating` has it."""
    if TEMPLATE not in function.attrs:
        return Anchor("rowwise", 0)
    spatial, reduction = (tuple(int(size) for size in function.attrs[name]) for name in (_SPATIAL, _REDUCTION))
    return Anchor(str(function.attrs[TEMPLATE]), 2 * math.prod((*spatial, *reduction)), spatial, reduction)


def stating(function: Any, template: str, spatial: Sequence[int], reduction: Sequence[int]) -> Any:
    """A function that was written as loops, with what its products are, so that its time is known by its size."""
    stated = {TEMPLATE: template, _SPATIAL: list(spatial), _REDUCTION: list(reduction)}
    for name, value in stated.items():
        function = function.with_attr(name, value)
    return function


def _anchor_block(schedule: Any) -> Any:
    for block in blocks_of(schedule):
        if TEMPLATE in schedule.get(block).annotations:
            return block
    return None
