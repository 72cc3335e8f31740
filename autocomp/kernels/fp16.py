"""Contractions in 16-bit floats: twice the lanes of float32, summed in runs short enough to stay accurate.

A sum kept in fp16 loses about ``2^-12 sqrt(K)`` of its size over K products: 1.2e-3 (root mean square, relative) at K = 64, 1.7e-3 at
128, 2.3e-3 at 256, 9.8e-3 at 4608, measured on normal inputs, of which rounding the inputs alone is 3e-4. So fp16 holds the sums
of at most 256 products (``split_depth``), and float32 adds these up: the error stays at 2.3e-3 or less whatever K is, and the additions
cost 4 instructions of the vector pipes for 128 to 256 multiply-adds. Which products share a run depends on shapes only, never on the tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from autocomp.hardware.profile import Profile
from autocomp.kernels import compute, packing
from autocomp.kernels.compute import FLOPS, RUNS, TEMPLATE, round_up
from autocomp.kernels.schedules import blocks_of, flatten_rows, keep_in_registers, vectorise_last, write_back
from autocomp.kernels.specs import ConvSpec, DenseSpec, padded_rows
from autocomp.kernels.tile import Anchor, Tile, lanes_of

_RUN = 192  # products summed in fp16, about
_SHORTEST, _LONGEST = 96, 256


def has_kernels(profile: Profile) -> bool:
    """Whether the target multiplies vectors of 16-bit floats: a profile that says so is held to it when it is loaded."""
    return "fp16" in profile.precisions


def split_depth(depth: int) -> tuple[int, int]:
    """(runs, products in each) of a sum over ``depth`` products; together they may exceed it, by zeros."""
    if depth <= _LONGEST:
        return 1, depth
    divisors = [run for run in range(_SHORTEST, _LONGEST + 1) if depth % run == 0]
    if divisors:
        best = min(divisors, key=lambda run: (run % 8 != 0, run % 4 != 0, abs(run - _RUN), -run))
        return depth // best, best
    runs = -(-depth // _RUN)
    return runs, round_up(-(-depth // runs), 8)


def split_kernel(spec: ConvSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(extents numbering the runs, extents summed in one) of a convolution: taps and input channels, in memory's order."""
    (kh, kw), channels = spec.kernel, spec.in_channels // spec.groups
    if kh * kw * channels <= _LONGEST:
        return (), (kh, kw, channels)
    if kw * channels <= _LONGEST:
        return (kh,), (kw, channels)
    runs, run = split_depth(channels)
    return ((kh, kw), (run,)) if runs == 1 else ((kh, kw, runs), (run,))


def pack_conv_weight(weight: np.ndarray, spec: ConvSpec) -> np.ndarray:
    """OIHW float16 weight → packed (see ``kernels.packing``), input channels padded to whole runs."""
    if spec.depthwise:
        return packing.pack_conv_weight(weight, spec, None)
    if spec.is_dense:
        return pack_dense_weight(weight[:, :, 0, 0], spec.lanes)
    outer, inner = split_kernel(spec)
    depth = outer[2] * inner[0] if len(outer) == 3 else weight.shape[1]
    wider = np.zeros((len(weight), depth, *weight.shape[2:]), weight.dtype)
    wider[:, : weight.shape[1]] = weight
    return packing.pack_conv_weight(wider, spec, None)


def pack_dense_weight(weight: np.ndarray, lanes: int) -> np.ndarray:
    """``[N, K]`` float16 weight → packed, K padded to whole runs."""
    wider = np.zeros((len(weight), math.prod(split_depth(weight.shape[1]))), weight.dtype)
    wider[:, : weight.shape[1]] = weight
    return packing.pack_dense_weight(wider, lanes, None)


def conv2d(data: Any, weight: Any, spec: ConvSpec) -> Any:
    """Convolution of NHWC float16 ``data`` with a packed float16 weight → float32."""
    from tvm import tirx

    if spec.is_dense:
        leading = (spec.batch, *spec.out_size)
        return _product(data, weight, leading, spec.in_channels, spec.out_channels, spec.lanes)
    (sh, sw), (dh, dw), (oh, ow), lanes = spec.stride, spec.dilation, spec.out_size, spec.lanes
    group_out, group_in = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    ow_padded = padded_rows(ow)
    zero = tirx.const(0, "float16")
    if spec.depthwise:
        padded = compute._pad(data, spec, ow_padded, spec.in_channels, zero)
        shape: tuple[int, ...] = (spec.batch, oh, ow_padded, spec.out_channels)

        def tap(at: Sequence[Any], outer: Sequence[Any], inner: Sequence[Any]) -> Any:
            (n, h, w, c), (ry, rx) = at, (*outer, *inner)
            return padded[n, h * sh + ry * dh, w * sw + rx * dw, c] * weight[ry, rx, c]

        sums = _in_runs(shape, (), spec.kernel, tap, "depthwise_fp16", spec.flops)
        return compute._crop(sums, (spec.batch, oh, ow, spec.out_channels))
    outer_extents, inner_extents = split_kernel(spec)
    depth = outer_extents[2] * inner_extents[0] if len(outer_extents) == 3 else group_in
    padded = compute._pad(data, spec, ow_padded, (spec.groups - 1) * group_in + depth, zero)
    shape = (spec.batch, oh, ow_padded, round_up(spec.out_channels, lanes))

    def product(at: Sequence[Any], outer: Sequence[Any], inner: Sequence[Any]) -> Any:
        (n, h, w, o), (ry, rx, *rest) = at, (*outer, *inner)
        channel = rest[0] if len(rest) == 1 else rest[0] * inner_extents[0] + rest[1]
        source = channel if spec.groups == 1 else (o // group_out) * group_in + channel
        pixel = padded[n, h * sh + ry * dh, w * sw + rx * dw, source]
        return pixel * weight[o // lanes, ry, rx, channel, o % lanes]

    sums = _in_runs(shape, outer_extents, inner_extents, product, "conv2d_fp16", spec.flops)
    return compute._crop(sums, (spec.batch, oh, ow, spec.out_channels))


def dense(data: Any, weight: Any, spec: DenseSpec) -> Any:
    """Rows ``[..., K]`` of float16 times a packed float16 weight → ``[..., N]`` float32."""
    return _product(data, weight, spec.leading, spec.depth, spec.out_features, spec.lanes)


def product(profile: Profile) -> Any:
    """`compute.PRODUCT`, by which the peak is measured."""
    from tvm import te

    (rows, depth, outputs), lanes = compute.PRODUCT, 2 * profile.lanes
    packed = pack_dense_weight(np.zeros((outputs, depth), "float16"), lanes)
    data = te.placeholder((rows, depth), "float16", name="data")
    weight = te.placeholder(packed.shape, "float16", name="weight")
    return te.create_prim_func([data, weight, dense(data, weight, DenseSpec.of((rows, depth), outputs, lanes))])


def _product(data: Any, weight: Any, leading: tuple[int, ...], depth: int, out: int, lanes: int) -> Any:
    from tvm import te

    rows = math.prod(leading)
    rows_padded, (runs, run) = padded_rows(rows), split_depth(depth)
    source = compute.flat_rows(data, leading, depth, (rows_padded, runs * run))

    def product(at: Sequence[Any], outer: Sequence[Any], inner: Sequence[Any]) -> Any:
        (m, o), k = at, inner[0]
        if runs > 1:
            k = outer[0] * run + k
        return source(m, k) * weight[o // lanes, k, o % lanes]

    shape = (rows_padded, round_up(out, lanes))
    sums = _in_runs(shape, (runs,) if runs > 1 else (), (run,), product, "dense_fp16", 2 * rows * depth * out)
    return te.compute((*leading, out), lambda *i: sums[compute.ravel(i[:-1], leading), i[-1]], name="crop")


def _in_runs(
    shape: tuple[int, ...],
    outer: tuple[int, ...],
    inner: tuple[int, ...],
    product: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Any],
    template: str,
    flops: int,
) -> Any:
    """Sum ``product(output, run, position in the run)`` over ``inner`` in float16, and over ``outer`` in float32."""
    from tvm import te

    inside = [te.reduce_axis((0, extent), f"r{number}") for number, extent in enumerate(inner)]
    number = len(outer)
    anchor = te.compute(
        (*outer, *shape),
        lambda *i: te.sum(product(i[number:], i[:number], inside), inside),
        name="anchor",
        attrs={TEMPLATE: template, FLOPS: flops, RUNS: number},
    )
    if not outer:
        return te.compute(shape, lambda *i: anchor[i].astype("float32"), name="widened")
    runs = [te.reduce_axis((0, extent), f"b{number}") for number, extent in enumerate(outer)]
    return te.compute(shape, lambda *i: te.sum(anchor[(*runs, *i)].astype("float32"), runs), name="total")


def tile_runs(schedule: Any, tile: Tile, anchor: Anchor, profile: Profile) -> None:
    """Schedule, in place, a contraction whose runs float32 adds up: one tile of fp16 sums in registers, the totals beside it."""
    block, total = schedule.get_sblock("anchor"), schedule.get_sblock("total")
    lanes = lanes_of(anchor, profile)
    last = keep_in_registers(schedule, total, profile)
    if len(anchor.spatial) == 2:
        flatten_rows(schedule, last)
    rank = len(anchor.spatial)
    loops = schedule.get_loops(total)
    *outer, across, channel = loops[:rank]
    runs = loops[rank:]
    rows_up = []
    if tile.rows_up > 1:
        up, up_inner = schedule.split(outer.pop(), [None, tile.rows_up])
        outer.append(up)
        rows_up = [up_inner]
    across_outer, across_inner = schedule.split(across, [None, tile.rows])
    channel_outer, vector, lane = schedule.split(channel, [None, tile.vectors, lanes])
    outer.append(across_outer)
    outer.insert(0 if tile.channels_outer else len(outer), channel_outer)
    rows = [*rows_up, across_inner]
    schedule.reorder(*outer, *runs, *rows, vector, lane)
    schedule.reverse_compute_at(last, outer[-1], preserve_unit_loops=True)
    if profile.cores > 1:
        outer = [schedule.fuse(*outer)]
        schedule.parallel(outer[0])
    write_back(schedule, last, len(outer), lanes)
    schedule.compute_at(block, runs[-1], preserve_unit_loops=True)
    schedule.set_scope(block, 0, "local")
    inside = schedule.get_loops(block)[len(outer) + len(runs) :]
    *still, columns = inside[: len(runs) + rank]
    reduction = list(inside[len(runs) + rank :])
    sum_vector, sum_lane = schedule.split(columns, [None, lanes])
    if tile.unroll > 1:
        step, unrolled = schedule.split(reduction.pop(), [None, tile.unroll])
        reduction += [step, unrolled]
        schedule.unroll(unrolled)
    schedule.reorder(*reduction, *still, sum_vector, sum_lane)
    for loop in (*still, sum_vector, *rows, vector):
        schedule.unroll(loop)
    for loop in (sum_lane, lane):
        schedule.vectorize(loop)
    _start(schedule, schedule.decompose_reduction(block, reduction[0]), len(outer) + len(runs))
    _start(schedule, schedule.decompose_reduction(total, runs[0]), len(outer))
    for pad in blocks_of(schedule):
        if schedule.get(pad).name_hint == "pad":
            vectorise_last(schedule, pad, profile)


def _start(schedule: Any, start: Any, depth: int) -> None:
    """Vectorise the block that clears a register tile; ``depth`` loops stand around it."""
    *unrolled, lane = schedule.get_loops(start)[depth:]
    schedule.vectorize(lane)
    for loop in unrolled:
        schedule.unroll(loop)
