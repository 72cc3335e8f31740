"""Dense layers whose weights are stored in 8 or 4 bits and multiplied in float32.

Weights are packed when the module is built, to blocks of V vector registers of L lanes: ``[N/VL][G][g][V][L]`` int8, or
``[N/VL][G][g/8][V][L]`` int32 words that hold eight successive weights of one output each. G groups of g weights along K share
a scale, ``[N/VL][G][V][L]``. V is the registers of one tile where that is known, so that a tile's weights lie in one piece, else 1.

There are two forms. With few rows (``gemv``) the time is that of reading the weights, so as little as possible is done to each:
a group's products are summed unscaled, then scaled once. Four-bit fields are not even shifted: one is masked where it
stands, which multiplies it by a power of 16 that the activation was divided by beforehand, exactly. With more rows
(``dense``) each weight is dequantised once for a tile of rows in registers, or once for all rows in a panel that the cache holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocomp.hardware.profile import Profile
from autocomp.kernels.compute import FLOPS, TEMPLATE, round_up
from autocomp.kernels.schedules import blocks_of, flatten_rows, inline_epilogue, vectorise_last, write_back
from autocomp.kernels.specs import padded_rows
from autocomp.kernels.tile import Anchor, Tile
from autocomp.records.precisions import Format, group_of, weight_bytes_of

FIELDS = 8  # four-bit weights in one 32-bit word
_OFFSET = (
    8  # added to a four-bit weight so that its field is not negative; the field at the top of a word keeps its sign
)
_GEMV_ROWS = 4  # rows up to which reading the weights outweighs the arithmetic
_GEMV_SUMS = 8  # registers of sums in a tile then: two additions a cycle, of four cycles each


@dataclass(frozen=True)
class WeightOnlySpec:
    """Shapes of one product of float rows ``[..., K]`` with a constant weight of ``bits`` bits, scaled by groups along K."""

    leading: tuple[int, ...]
    depth: int
    out_features: int
    bits: int
    group: int
    lanes: int

    @property
    def rows(self) -> int:
        return math.prod(self.leading)

    @property
    def groups(self) -> int:
        return -(-self.depth // self.group)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.depth * self.out_features

    @property
    def is_gemv(self) -> bool:
        return self.rows <= _GEMV_ROWS

    @property
    def vectors(self) -> int:
        """Registers of outputs whose weights are interleaved."""
        blocks = round_up(self.out_features, self.lanes) // self.lanes
        wanted = _GEMV_SUMS // self.rows if self.is_gemv else 1
        return max(divisor for divisor in _divisors(blocks, wanted))

    @property
    def template(self) -> str:
        return f"{'gemv' if self.is_gemv else 'dense'}_w{self.bits}"


def pack_weight(levels: np.ndarray, spec: WeightOnlySpec) -> np.ndarray:
    """Integer weights ``[N, G*g]`` → packed (see the module), outputs padded with zeros to whole vectors."""
    blocks = _interleaved(levels, spec).reshape(-1, spec.groups, spec.group, spec.vectors, spec.lanes)
    if spec.bits == 8:
        return np.ascontiguousarray(blocks)
    fields = blocks.reshape(-1, spec.groups, spec.group // FIELDS, FIELDS, spec.vectors, spec.lanes).astype("int64")
    fields[:, :, :, : FIELDS - 1] += _OFFSET
    shifts = 4 * np.arange(FIELDS).reshape(-1, 1, 1)
    result: np.ndarray = ((fields & 15) << shifts).sum(3).astype("uint32").view("int32")
    return result


def pack_scales(scales: np.ndarray, spec: WeightOnlySpec) -> np.ndarray:
    """Scales ``[N, G]`` → ``[N/VL][G][V][L]``; outputs that pad a vector have scale 0."""
    return np.ascontiguousarray(_interleaved(scales, spec))


def _interleaved(rows: np.ndarray, spec: WeightOnlySpec) -> np.ndarray:
    """``[N, X]`` → ``[N/VL, X, V, L]``, padded with zeros."""
    n, size = rows.shape
    padded = np.zeros((round_up(n, spec.lanes), size), rows.dtype)
    padded[:n] = rows
    return padded.reshape(-1, spec.vectors, spec.lanes, size).transpose(0, 3, 1, 2)


def dense(data: Any, weight: Any, scale: Any, spec: WeightOnlySpec) -> Any:
    """Rows ``[..., K]`` times a packed weight → ``[..., N]`` float32, the form chosen by the number of rows."""
    from tvm import te

    product = _gemv(data, weight, scale, spec) if spec.is_gemv else _dense(data, weight, scale, spec)
    return te.compute((*spec.leading, spec.out_features), lambda *i: product[_row(i[:-1], spec), i[-1]], name="crop")


def _gemv(data: Any, weight: Any, scale: Any, spec: WeightOnlySpec) -> Any:
    from tvm import te, tirx

    rows, groups, lanes, outputs = spec.rows, spec.groups, spec.lanes, round_up(spec.out_features, spec.lanes)
    shape, attrs = (rows, groups, outputs), {TEMPLATE: spec.template, FLOPS: spec.flops}
    rg = te.reduce_axis((0, groups), "rg")

    def at(source: Any, n: Any, *index: Any) -> Any:
        return source[(n // (lanes * spec.vectors), *index, n // lanes % spec.vectors, n % lanes)]

    if spec.bits == 8:
        read = _padded(data, spec, rows)
        rk = te.reduce_axis((0, spec.group), "rk")
        sums = te.compute(
            shape,
            lambda m, g, n: te.sum(read(m, g * spec.group + rk) * at(weight, n, g, rk).astype("float32"), [rk]),
            name="anchor",
            attrs=attrs,
        )
        return te.compute(
            (rows, outputs),
            lambda m, n: te.sum(sums[m, rg, n] * at(scale, n, rg), [rg]),
            name="scaled",
        )
    words = spec.group // FIELDS
    read = _padded(data, spec, rows)
    # what a weight that is masked in place is too large by, taken off the activation: a power of two, so nothing is rounded
    prepared = te.compute(
        (rows, groups, words, FIELDS),
        lambda m, g, k, f: read(m, g * spec.group + k * FIELDS + f) * _power(f),
        name="prepare",
    )
    rs, rf = te.reduce_axis((0, words), "rs"), te.reduce_axis((0, FIELDS), "rf")
    by_field = te.compute(
        (rows, groups, FIELDS),
        lambda m, g, f: te.sum(read(m, g * spec.group + rs * FIELDS + f), [rs]),
        name="by_field",
    )
    surplus = te.compute(  # the offsets' share of a group's sum
        (rows, groups),
        lambda m, g: te.sum(
            by_field[m, g, rf] * tirx.Select(rf == FIELDS - 1, tirx.const(0.0, "float32"), tirx.const(8.0, "float32")),
            [rf],
        ),
        name="surplus",
    )
    rk, rj = te.reduce_axis((0, words), "rk"), te.reduce_axis((0, FIELDS), "rj")

    def product(m: Any, g: Any, n: Any) -> Any:
        mask = tirx.reinterpret("int32", tirx.const(15, "uint32") << (rj * 4).astype("uint32"))
        return prepared[m, g, rk, rj] * (at(weight, n, g, rk) & mask).astype("float32")

    sums = te.compute(shape, lambda m, g, n: te.sum(product(m, g, n), [rk, rj]), name="anchor", attrs=attrs)
    return te.compute(
        (rows, outputs),
        lambda m, n: te.sum((sums[m, rg, n] - surplus[m, rg]) * at(scale, n, rg), [rg]),
        name="scaled",
    )


def _power(field: Any) -> Any:
    """``16 ** -field`` as an expression of constants."""
    from tvm import tirx

    value = tirx.const(1.0, "float32")
    for position in range(1, FIELDS):
        value = tirx.Select(field == position, tirx.const(16.0**-position, "float32"), value)
    return value


def _dense(data: Any, weight: Any, scale: Any, spec: WeightOnlySpec) -> Any:
    from tvm import te, tirx

    lanes, outputs, rows = spec.lanes, round_up(spec.out_features, spec.lanes), padded_rows(spec.rows)
    read = _padded(data, spec, rows)
    fields = FIELDS if spec.bits == 4 else 1

    def value(o: Any, g: Any, k: Any, f: Any, lane: Any) -> Any:
        level = weight[o, g, k, 0, lane]
        if spec.bits == 4:
            top = f == FIELDS - 1  # its sign comes down with the shift
            level = level >> (f * 4).astype("int32")
            level = tirx.Select(top, level, (level & 15) - _OFFSET)
        return level.astype("float32") * scale[o, g, 0, lane]

    values = te.compute(
        (outputs // lanes, spec.groups, spec.group // fields, fields, lanes), value, name="dequantised_weight"
    )
    rg, rk = te.reduce_axis((0, spec.groups), "rg"), te.reduce_axis((0, spec.group), "rk")
    return te.compute(
        (rows, outputs),
        lambda m, n: te.sum(
            read(m, rg * spec.group + rk) * values[n // lanes, rg, rk // fields, rk % fields, n % lanes], [rg, rk]
        ),
        name="anchor",
        attrs={TEMPLATE: spec.template, FLOPS: spec.flops},
    )


def _padded(data: Any, spec: WeightOnlySpec, rows: int) -> Any:
    """A function that reads (row, k) of ``data``; beyond its rows and its depth there are zeros."""
    from tvm import te, tirx

    def read(m: Any, k: Any) -> Any:
        index: list[Any] = []
        rest = m
        for size in reversed(spec.leading):
            index.append(rest % size if len(index) + 1 < len(spec.leading) else rest)
            rest = rest // size
        return data[(*reversed(index), k)]

    if rows == spec.rows and spec.groups * spec.group == spec.depth:
        return read
    padded = te.compute(
        (rows, spec.groups * spec.group),
        lambda m, k: tirx.if_then_else(tirx.all(m < spec.rows, k < spec.depth), read(m, k), tirx.const(0.0, "float32")),
        name="pad",
    )
    return lambda m, k: padded[m, k]


def _row(index: Sequence[Any], spec: WeightOnlySpec) -> Any:
    flat: Any = 0
    for axis, size in zip(index, spec.leading, strict=True):
        flat = flat * size + axis
    return flat


# --- schedules ---


TEMPLATES = ("gemv_w8", "gemv_w4", "dense_w8", "dense_w4")


def is_weight_only(anchor: Anchor) -> bool:
    return anchor.template in TEMPLATES


def loops(
    form: Format, rows: int, depth: int, outputs: int, lanes: int
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """The kernel of a linear layer of these sizes, and the extents of its loops."""
    bits, group = int(form.bits), group_of(form.name, depth)
    spec, padded = WeightOnlySpec((rows,), depth, outputs, bits, group, lanes), round_up(outputs, lanes)
    if spec.is_gemv:
        within = (group,) if bits == 8 else (group // FIELDS, FIELDS)
        return spec.template, (spec.rows, spec.groups, padded), within
    return spec.template, (padded_rows(spec.rows), padded), (spec.groups, group)


def traffic(template: str, spatial: Sequence[int], reduction: Sequence[int]) -> float:
    """Bytes of a kernel's float inputs and outputs, its weights and a float scale for each group of them, each moved once."""
    size, depth = weight_bytes_of(template), math.prod(reduction)
    *rows, channels = spatial
    if template.startswith("gemv"):
        m, groups = rows
        return 4 * m * groups * depth + channels * groups * (depth * size + 4) + 4 * m * channels
    outputs = 4 * math.prod(spatial)
    return 4 * math.prod(rows) * depth + channels * (depth * size + 4 * reduction[0]) + outputs


def tiles(anchor: Anchor, profile: Profile) -> list[Tile]:
    """The tiles of a kernel, best guess first. ``channels_outer``: weights are dequantised once for all rows, into a panel."""
    vectors = anchor.spatial[-1] // profile.lanes
    if anchor.template.startswith("gemv"):
        found = list(_gemv_tiles(anchor, vectors, profile))
        return sorted(found, key=lambda tile: (abs(tile.rows * tile.vectors - _GEMV_SUMS), tile.unroll))
    return sorted(_dense_tiles(anchor, vectors, profile), key=lambda tile: _cost(tile, anchor.spatial[0]))


def _gemv_tiles(anchor: Anchor, vectors: int, profile: Profile) -> Iterator[Tile]:
    rows = anchor.spatial[0]
    for count in _divisors(vectors, 8):
        if 2 * rows * count + count + 1 > profile.vector_registers and count > 1:
            continue
        for unroll in (1, 2, 4) if anchor.template == "gemv_w8" else (1,):  # a word is eight steps already
            yield Tile(rows, count, unroll)


def _dense_tiles(anchor: Anchor, vectors: int, profile: Profile) -> Iterator[Tile]:
    for rows in _divisors(anchor.spatial[0], 28):
        for count in _divisors(vectors, 4):
            if rows * count + count + 1 > profile.vector_registers:
                continue
            for panel in (True, False) if rows < anchor.spatial[0] else (False,):
                unroll = FIELDS if anchor.template == "dense_w4" and not panel else 4
                yield Tile(rows, count, unroll, channels_outer=panel)


def _cost(tile: Tile, rows: int) -> float:
    """Relative cycles a product; see ``templates``. Dequantising takes about five operations of four a cycle."""
    block = tile.rows * tile.vectors
    cycles = max(block / 2, (tile.rows + tile.vectors) / 2, 4.5)
    weights = 1.25 * tile.vectors * (tile.rows / rows if tile.channels_outer else 1.0)
    return (cycles + weights) / block


def tile_weight_only(schedule: Any, tile: Tile, anchor: Anchor, profile: Profile) -> None:
    """Schedule a fused function, in place, with one tile."""
    block = schedule.get_sblock("anchor")
    gemv = anchor.template.startswith("gemv")
    product = schedule.get_sblock("scaled") if gemv else block
    last = inline_epilogue(schedule, product, profile)
    flatten_rows(schedule, last)
    schedule.set_scope(product, 0, "local")
    if gemv:
        _tile_gemv(schedule, block, product, last, tile, profile)
    else:
        _tile_dense(schedule, block, last, tile, profile)
    for other in blocks_of(schedule):
        if schedule.get(other).name_hint in ("pad", "prepare"):
            vectorise_last(schedule, other, profile)


def _tile_gemv(schedule: Any, block: Any, product: Any, last: Any, tile: Tile, profile: Profile) -> None:
    row, column, group = schedule.get_loops(product)
    outer_row, inner_row = schedule.split(row, [None, tile.rows])
    outer, vector, lane = schedule.split(column, [None, tile.vectors, profile.lanes])
    schedule.reorder(outer, outer_row, group, inner_row, vector, lane)
    schedule.reverse_compute_at(last, outer_row, preserve_unit_loops=True)
    write_back(schedule, last, 2, profile.lanes)
    schedule.compute_at(block, group, preserve_unit_loops=True)
    schedule.set_scope(block, 0, "local")
    sum_row, _, sum_column, *depth = schedule.get_loops(block)[3:]
    sum_vector, sum_lane = schedule.split(sum_column, [None, profile.lanes])
    step, unrolled = schedule.split(depth[0], [None, tile.unroll])
    schedule.reorder(step, unrolled, *depth[1:], sum_row, sum_vector, sum_lane)
    if profile.cores > 1:
        schedule.parallel(outer)
    for loop in (inner_row, vector, unrolled, *depth[1:], sum_row, sum_vector):
        schedule.unroll(loop)
    for loop in (lane, sum_lane):
        schedule.vectorize(loop)
    _vectorised_start(schedule, schedule.decompose_reduction(block, step), 3)
    _vectorised_start(schedule, schedule.decompose_reduction(product, group), 2)


def _tile_dense(schedule: Any, block: Any, last: Any, tile: Tile, profile: Profile) -> None:
    weights = schedule.get_sblock("dequantised_weight")
    row, column, group, depth = schedule.get_loops(block)
    outer_row, inner_row = schedule.split(row, [None, tile.rows])
    outer, vector, lane = schedule.split(column, [None, tile.vectors, profile.lanes])
    step, unrolled = schedule.split(depth, [None, tile.unroll])
    schedule.reorder(outer, outer_row, group, step, unrolled, inner_row, vector, lane)
    schedule.reverse_compute_at(last, outer_row, preserve_unit_loops=True)
    write_back(schedule, last, 2, profile.lanes)
    if tile.channels_outer:
        schedule.compute_at(weights, outer, preserve_unit_loops=True)
    else:
        schedule.compute_at(weights, step, preserve_unit_loops=True)
        schedule.set_scope(weights, 0, "local")
    *_, which, _, word, field, weight_lane = schedule.get_loops(weights)
    schedule.vectorize(weight_lane)
    schedule.unroll(field)
    if not tile.channels_outer:
        schedule.unroll(which)
        schedule.unroll(word)
    if profile.cores > 1:
        schedule.parallel(outer)
    for loop in (unrolled, inner_row, vector):
        schedule.unroll(loop)
    schedule.vectorize(lane)
    _vectorised_start(schedule, schedule.decompose_reduction(block, group), 2)


def _vectorised_start(schedule: Any, start: Any, depth: int) -> None:
    """Vectorise the block that clears a register tile; ``depth`` loops stand around it."""
    *unrolled, lane = schedule.get_loops(start)[depth:]
    schedule.vectorize(lane)
    for loop in unrolled:
        schedule.unroll(loop)


def _divisors(value: int, limit: int) -> list[int]:
    return [divisor for divisor in range(1, min(value, limit) + 1) if value % divisor == 0]
