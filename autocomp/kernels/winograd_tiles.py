"""How a Winograd kernel is cut: register tiles over the tiles of a picture, and bands of those that stay in the nearer caches.

A kernel works on ``band`` rows of tiles at a time: it pads and transforms their inputs, multiplies, and transforms back, into which what
follows the convolution is fused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from autocomp.hardware.profile import Profile
from autocomp.kernels import neon
from autocomp.kernels.prefetch import prefetch_weights
from autocomp.kernels.schedules import blocks_named, extent_of, in_registers, inline_epilogue, vectorise_last
from autocomp.kernels.tile import Anchor, Tile, divisors
from autocomp.kernels.winograd import BLOCKS_AXIS, OUTPUTS

_WIDEST = 14  # tiles of a row that one register tile may hold
_MOST_UP = 8
_NEAR, _FAR = 1 << 20, 1 << 22  # bytes of caches: what a core has for itself, about, and what a band may fill at most
_NEAR_RATE, _FAR_RATE = 32, 8  # bytes a cycle that come from there


def candidates(anchor: Anchor, profile: Profile) -> Iterator[Tile]:
    """The legal tiles of a kernel."""
    *_, down, across, channels = anchor.spatial
    bands = [band for band in divisors(down, down) if _band_bytes(band, anchor) <= _FAR] or [1]
    unrolls = (1, 4) if neon.is_neon(profile) and anchor.reduction[-1] % 4 == 0 else (1,)
    for band, rows in itertools.product(bands, divisors(across, _WIDEST)):
        ups = divisors(band, _MOST_UP) if rows == across else [1]
        for up, count, unroll in itertools.product(ups, divisors(channels // profile.lanes, 8), unrolls):
            if rows * up * count + count + 1 <= profile.vector_registers:
                yield Tile(rows, count, unroll, rows_up=up, band=band)


def band_cost(tile: Tile, anchor: Anchor, profile: Profile) -> float:
    """Cycles a product, of one vector, for what moves between the caches beside a register tile's own loads; only the order matters."""
    *points, batch, down, _, channels = anchor.spatial
    depth = anchor.reduction[-1]
    weights, moved = 4 * math.prod(points) * depth * channels, _band_bytes(tile.band, anchor)
    bands = batch * down // tile.band
    cycles = bands * weights / (_NEAR_RATE if weights + moved <= _NEAR else _FAR_RATE)
    cycles += 2 * bands * moved / (_NEAR_RATE if moved <= _NEAR else _FAR_RATE)
    return cycles / (math.prod(anchor.spatial) * depth / profile.lanes)


def _band_bytes(band: int, anchor: Anchor) -> int:
    """Bytes of a band's transformed inputs and of its products."""
    *points, _, _, across, channels = anchor.spatial
    return 4 * math.prod(points) * band * across * (anchor.reduction[-1] + channels)


def tile_winograd(schedule: Any, tile: Tile, profile: Profile) -> Any:
    """Cut a kernel into bands, each of inputs transformed, products, and back through the epilogue; returns the function."""
    lanes = profile.lanes
    (block,), (back,), (columns,), (points,), (rows,) = (
        blocks_named(schedule, name) for name in ("anchor", "back", "columns", "points", "rows")
    )
    out = _back(schedule, columns, back, tile, profile)
    _products(schedule, block, out, tile, lanes)
    _forth(schedule, points, rows, out, lanes)
    for pad in blocks_named(schedule, "pad"):
        schedule.compute_at(pad, out, preserve_unit_loops=True)
        vectorise_last(schedule, pad, profile)
    return prefetch_weights(schedule.mod["main"], BLOCKS_AXIS, tile.vectors)


def _back(schedule: Any, columns: Any, back: Any, tile: Tile, profile: Profile) -> Any:
    """The transform back and what is fused to it, a vector of one tile at a time; returns the loop over bands."""
    epilogue = inline_epilogue(schedule, back, profile)
    if epilogue is not None and _extents(schedule, epilogue) != _extents(schedule, back):
        vectorise_last(schedule, epilogue, profile)  # over other axes: it runs behind
        epilogue = None
    last = back if epilogue is None else epilogue
    down, across, lanes = *_outputs(schedule, columns), profile.lanes
    n, h, w, o = schedule.get_loops(last)
    band, up, p = schedule.split(h, [None, tile.band, down])
    left, q = schedule.split(w, [None, across])
    vector, lane = schedule.split(o, [None, lanes])
    schedule.reorder(n, band, up, left, vector, p, q, lane)
    if epilogue is not None:
        schedule.set_scope(back, 0, "local")
        schedule.compute_at(back, vector, preserve_unit_loops=True)
        in_registers(schedule, *schedule.get_loops(back)[-3:])
    schedule.set_scope(columns, 0, "local")
    schedule.compute_at(columns, vector, preserve_unit_loops=True)
    in_registers(schedule, *schedule.get_loops(columns)[-3:])
    in_registers(schedule, p, q, lane)
    if profile.cores > 1:
        band = schedule.fuse(n, band)
        schedule.parallel(band)
    return band


def _extents(schedule: Any, block: Any) -> list[int]:
    return [extent_of(schedule, loop) for loop in schedule.get_loops(block)]


def _outputs(schedule: Any, columns: Any) -> tuple[int, int]:
    """Outputs of a tile (down, across)."""
    node = schedule.get(columns)
    return int(node.iter_vars[-3].dom.extent), int(node.annotations[OUTPUTS])


def _products(schedule: Any, block: Any, band: Any, tile: Tile, lanes: int) -> None:
    copy = schedule.cache_write(block, 0, "local")
    schedule.compute_at(copy, band, preserve_unit_loops=True)
    i, j, n, h, w, o = schedule.get_loops(copy)[-6:]
    up, up_inner = schedule.split(h, [None, tile.rows_up])
    left, left_inner = schedule.split(w, [None, tile.rows])
    vector, vector_inner, lane = schedule.split(o, [None, tile.vectors, lanes])
    schedule.reorder(i, j, n, vector, up, left, up_inner, left_inner, vector_inner, lane)
    in_registers(schedule, up_inner, left_inner, vector_inner, lane)
    schedule.compute_at(block, left, preserve_unit_loops=True)
    *_, b_i, b_j, b_n, b_h, b_w, b_o, rc = schedule.get_loops(block)
    b_vector, b_lane = schedule.split(b_o, [None, lanes])
    steps = [rc] if tile.unroll == 1 else list(schedule.split(rc, [None, tile.unroll]))
    schedule.reorder(*steps, b_i, b_j, b_n, b_h, b_w, b_vector, b_lane)
    in_registers(schedule, *steps[1:], b_h, b_w, b_vector, b_lane)
    start = schedule.decompose_reduction(block, steps[0])
    in_registers(schedule, *schedule.get_loops(start)[-4:])


def _forth(schedule: Any, points: Any, rows: Any, band: Any, lanes: int) -> None:
    schedule.compute_at(points, band, preserve_unit_loops=True)
    i, j, n, h, w, c = schedule.get_loops(points)[-6:]
    width = math.gcd(extent_of(schedule, c), lanes)
    vector, lane = schedule.split(c, [None, width])
    schedule.reorder(n, h, w, vector, i, j, lane)
    in_registers(schedule, i, j, lane)
    schedule.set_scope(rows, 0, "local")
    schedule.compute_at(rows, vector, preserve_unit_loops=True)
    in_registers(schedule, *schedule.get_loops(rows)[-3:])
