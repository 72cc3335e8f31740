"""What the anchor operators compute, in TE, laid out for the register-tiled templates.

Activations are channels-last, weights packed (``kernels.packing``). Output rows and channels that do not fill
whole tiles are computed on a padded domain and cropped in the write-back, so no tile is ever ragged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from autocomp.hardware.profile import Profile
from autocomp.kernels.intrinsics import DotProduct, dot_product
from autocomp.kernels.packing import pack_dense_weight, tap_of
from autocomp.kernels.specs import ConvSpec, DenseSpec, padded_rows
from autocomp.kernels.specs import round_up as round_up

TEMPLATE = "autocomp.template"  # block annotations by which the scheduler knows an anchor
FLOPS = "autocomp.flops"
RUNS = "autocomp.runs"  # how many leading axes of an anchor number partial sums that are added up behind it


def conv2d(data: Any, weight: Any, spec: ConvSpec, dot: DotProduct | None = None, zero_point: Any = None) -> Any:
    """Convolution of NHWC ``data`` with a packed weight.

    With ``dot``: activations as it stores them in, its sums out, padded with ``zero_point`` (None: 0).
    """
    from tvm import te, tirx

    if spec.is_dense:
        return _rows_times_packed(
            data, weight, (spec.batch, *spec.out_size), spec.in_channels, spec.out_channels, spec.lanes, dot
        )
    (kh, kw), (sh, sw), (dh, dw) = spec.kernel, spec.stride, spec.dilation
    oh, ow = spec.out_size
    ow_padded = padded_rows(ow)
    group_out, group_in = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    folded = spec.folds(dot)
    lanes, width = spec.lanes, 1
    if dot:
        dot = dot.fit(kw * group_in if folded else group_in)
        lanes, width = dot.lanes, dot.width
    fill = tirx.const(0, data.dtype) if zero_point is None else zero_point[0].astype(data.dtype)
    if folded:
        run = round_up(kw * group_in, width)
        padded, kw = _pad_runs(data, spec, ow_padded, run, fill), 1
    else:
        run = 1 if spec.depthwise else round_up(group_in, width)
        # bytes widened to floats: sums below 2^24 are exact, and on Arm float products run at four times the rate of int32 ones
        wide = "float32" if spec.depthwise and dot and dot.steps > 1 else None
        padded = _pad(data, spec, ow_padded, (spec.groups - 1) * group_in + run, fill, wide)
    if spec.depthwise:
        return _depthwise(padded, weight, spec, ow_padded, dot)
    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    reduction: list[Any]
    if dot:
        ro, ri = te.reduce_axis((0, run // width), "ro"), te.reduce_axis((0, width), "ri")
        reduction, channel = [ry, rx, ro, ri], ro * width + ri
    else:
        rc = te.reduce_axis((0, group_in), "rc")
        reduction, channel = [ry, rx, rc], rc

    def product(n: Any, h: Any, w: Any, o: Any) -> Any:
        source = channel if spec.groups == 1 else (o // group_out) * group_in + channel
        at = (w * (sw * group_in) + source,) if folded else (w * sw + rx * dw, source)
        pixel = padded[(n, h * sh + ry * dh, *at)]
        if dot:
            return te.sum(dot.widened(pixel) * dot.widened(tap_of(weight, o, (ry, rx, ro), ri, dot)), reduction)
        return te.sum(pixel.astype("float32") * weight[o // lanes, ry, rx, rc, o % lanes].astype("float32"), reduction)

    anchor = te.compute(
        (spec.batch, oh, ow_padded, round_up(spec.out_channels, lanes)),
        product,
        name="anchor",
        attrs={TEMPLATE: f"conv2d_{dot.arithmetic}" if dot else "conv2d", FLOPS: spec.flops},
    )
    return _crop(anchor, (spec.batch, oh, ow, spec.out_channels))


def _pad(data: Any, spec: ConvSpec, ow_padded: int, channels: int, fill: Any, dtype: str | None = None) -> Any:
    """``data`` with its border, wide enough for the padded output columns, and as ``dtype``; ``data`` itself where nothing is changed."""
    from tvm import te, tirx

    (h, w), (top, left, bottom, _) = spec.in_size, spec.padding
    height = h + top + bottom
    width = max((ow_padded - 1) * spec.stride[1] + (spec.kernel[1] - 1) * spec.dilation[1] + 1, 1)
    if (height, channels, top, left) == (h, spec.in_channels, 0, 0) and width <= w and dtype is None:
        return data

    def pixel(n: Any, y: Any, x: Any, c: Any) -> Any:
        inside = [y >= top, y < h + top, x >= left, x < w + left]
        if channels != spec.in_channels:
            inside.append(c < spec.in_channels)
        value = tirx.if_then_else(tirx.all(*inside), data[n, y - top, x - left, c], fill)
        return value if dtype is None else value.astype(dtype)

    return te.compute((spec.batch, height, width, channels), pixel, name="pad")


def _pad_runs(data: Any, spec: ConvSpec, ow_padded: int, run: int, fill: Any) -> Any:
    """``data`` with its border as rows of pixels times channels, ``run`` values long from where the last output begins."""
    from tvm import te, tirx

    (h, w), (top, left, bottom, _), c = spec.in_size, spec.padding, spec.in_channels

    def value(n: Any, y: Any, i: Any) -> Any:
        inside = tirx.all(y >= top, y < h + top, i >= left * c, i < (left + w) * c)
        at = i - left * c
        return tirx.if_then_else(inside, data[n, y - top, at // c, at % c], fill)

    length = (ow_padded - 1) * spec.stride[1] * c + run
    return te.compute((spec.batch, h + top + bottom, length), value, name="pad")


def _depthwise(padded: Any, weight: Any, spec: ConvSpec, ow_padded: int, dot: DotProduct | None) -> Any:
    from tvm import te

    floats = dot is None or dot.steps > 1
    accumulate = "float32" if floats else "int32"
    ry, rx = te.reduce_axis((0, spec.kernel[0]), "ry"), te.reduce_axis((0, spec.kernel[1]), "rx")
    (sh, sw), (dh, dw), (oh, ow) = spec.stride, spec.dilation, spec.out_size
    anchor = te.compute(
        (spec.batch, oh, ow_padded, spec.out_channels),
        lambda n, h, w, c: te.sum(
            padded[n, h * sh + ry * dh, w * sw + rx * dw, c].astype(accumulate) * weight[ry, rx, c], [ry, rx]
        ),
        name="anchor",
        attrs={TEMPLATE: "depthwise", FLOPS: spec.flops},
    )
    if dot and floats:
        shape = (spec.batch, oh, ow, spec.out_channels)
        return te.compute(shape, lambda *i: anchor[i].astype("int32"), name="crop")
    return _crop(anchor, (spec.batch, oh, ow, spec.out_channels))


def dense(data: Any, weight: Any, spec: DenseSpec, dot: DotProduct | None = None) -> Any:
    """Rows ``[..., K]`` times a packed constant weight → ``[..., N]`` (float32, or int32 sums)."""
    return _rows_times_packed(data, weight, spec.leading, spec.depth, spec.out_features, spec.lanes, dot)


def _rows_times_packed(
    data: Any, weight: Any, leading: tuple[int, ...], depth: int, out: int, lanes: int, dot: DotProduct | None
) -> Any:
    from tvm import te

    if dot:
        dot = dot.fit(depth)
    lanes, group = (dot.lanes, dot.width) if dot else (lanes, 1)
    rows, rows_padded, depth_padded = math.prod(leading), padded_rows(math.prod(leading)), round_up(depth, group)

    source = flat_rows(data, leading, depth, (rows_padded, depth_padded))
    if dot:
        ro, ri = te.reduce_axis((0, depth_padded // group), "ro"), te.reduce_axis((0, group), "ri")

        def product(m: Any, o: Any) -> Any:
            value = dot.widened(source(m, ro * group + ri))
            return te.sum(value * dot.widened(tap_of(weight, o, (ro,), ri, dot)), [ro, ri])

    else:
        rc = te.reduce_axis((0, depth), "rc")

        def product(m: Any, o: Any) -> Any:
            return te.sum(source(m, rc) * weight[o // lanes, rc, o % lanes], [rc])

    anchor = te.compute(
        (rows_padded, round_up(out, lanes)),
        product,
        name="anchor",
        attrs={TEMPLATE: f"dense_{dot.arithmetic}" if dot else "dense", FLOPS: 2 * rows * depth * out},
    )
    return te.compute((*leading, out), lambda *i: anchor[ravel(i[:-1], leading), i[-1]], name="crop")


def flat_rows(data: Any, leading: tuple[int, ...], depth: int, shape: tuple[int, int]) -> Callable[[Any, Any], Any]:
    """A function that reads (row, k) of ``data [*leading, depth]``; from there to ``shape``, whole tiles, are zeros."""
    from tvm import te, tirx

    rows = math.prod(leading)

    def read(m: Any, k: Any) -> Any:
        return data[(*unravel(m, leading), k)]

    if shape == (rows, depth):
        return read
    zero = tirx.const(0, data.dtype)
    padded = te.compute(
        shape, lambda m, k: tirx.if_then_else(tirx.all(m < rows, k < depth), read(m, k), zero), name="pad"
    )
    return lambda m, k: padded[m, k]


def batch_matmul(a: Any, b: Any, lanes: int, *, transposed: bool = False) -> Any:
    """``a [..., M, K]`` times ``b [..., K, N]``, both computed at run time; leading sizes equal, or 1 and broadcast.

    ``transposed``: b is ``[..., N, K]``. Where that is so, or N is no whole number of vectors, b is packed to blocks first; rows and
    columns are padded to whole tiles and cropped in the write-back.
    """
    from tvm import te, tirx

    rank = max(len(a.shape), len(b.shape)) - 2
    a_lead, b_lead = [[int(size) for size in t.shape[:-2]] for t in (a, b)]
    lead = [max(x, y) for x, y in zip(_extend(a_lead, rank), _extend(b_lead, rank), strict=True)]
    m, k = int(a.shape[-2]), int(a.shape[-1])
    n = int(b.shape[-2 if transposed else -1])
    rows, columns = padded_rows(m), round_up(n, lanes)
    rc = te.reduce_axis((0, k), "rc")

    def index(i: Sequence[Any], sizes: list[int]) -> list[Any]:
        return [axis if size != 1 else 0 for axis, size in zip(i[len(i) - len(sizes) :], sizes, strict=True)]

    def from_b(i: Sequence[Any], depth: Any, column: Any) -> Any:
        return b[(*i, column, depth)] if transposed else b[(*i, depth, column)]

    zero = tirx.const(0, "float32")
    packed = transposed or columns != n
    if packed:
        blocks = te.compute(
            (*b_lead, columns // lanes, k, lanes),
            lambda *i: tirx.if_then_else(i[-3] * lanes + i[-1] < n, from_b(i[:-3], i[-2], i[-3] * lanes + i[-1]), zero),
            name="pack",
        )
    padded = a
    if rows != m:
        padded = te.compute(
            (*a_lead, rows, k), lambda *i: tirx.if_then_else(i[-2] < m, a[(*i[:-2], i[-2], i[-1])], zero), name="pad"
        )

    def product(*i: Any) -> Any:
        left = padded[(*index(i[:-2], a_lead), i[-2], rc)]
        at = index(i[:-2], b_lead)
        return te.sum(
            left * (blocks[(*at, i[-1] // lanes, rc, i[-1] % lanes)] if packed else from_b(at, rc, i[-1])), [rc]
        )

    anchor = te.compute(
        (*lead, rows, columns),
        product,
        name="anchor",
        attrs={TEMPLATE: "batch_matmul", FLOPS: 2 * math.prod(lead) * m * n * k},
    )
    return _crop(anchor, (*lead, m, n))


def _crop(anchor: Any, shape: tuple[int, ...]) -> Any:
    from tvm import te

    if tuple(int(size) for size in anchor.shape) == shape:
        return anchor
    return te.compute(shape, lambda *i: anchor[i], name="crop")


def _extend(sizes: list[int], rank: int) -> list[int]:
    return [1] * (rank - len(sizes)) + sizes


def unravel(index: Any, sizes: tuple[int, ...]) -> list[Any]:
    """Split a flat row index into the leading axes it runs over."""
    if not sizes:
        return []
    parts: list[Any] = []
    for position, size in enumerate(sizes):
        stride = math.prod(sizes[position + 1 :])
        value = index // stride if stride > 1 else index
        parts.append(0 if size == 1 else value % size if position else value)
    return parts


def ravel(index: Sequence[Any], sizes: tuple[int, ...]) -> Any:
    """The flat index of leading axes."""
    flat: Any = 0
    for axis, size in zip(index, sizes, strict=True):
        flat = flat * size + axis
    return flat


# Rows, depth and outputs of a product small enough for the first-level cache, by which a peak is measured.
PRODUCT = (24, 256, 64)


def float32_product(profile: Profile) -> Any:
    """`PRODUCT` in float32."""
    return product_of("float32", profile.lanes, None)


def int8_product(profile: Profile) -> Any:
    """`PRODUCT` in 8-bit integers."""
    return product_of("int8", profile.lanes, dot_product(profile))


def product_of(dtype: str, lanes: int, dot: DotProduct | None) -> Any:
    from tvm import te

    rows, depth, outputs = PRODUCT
    packed = pack_dense_weight(np.zeros((outputs, depth), dtype), lanes, dot)
    data = te.placeholder((rows, depth), dot.activation if dot else dtype, name="data")
    weight = te.placeholder(packed.shape, str(packed.dtype), name="weight")
    product = dense(data, weight, DenseSpec.of((rows, depth), outputs, lanes), dot)
    return te.create_prim_func([data, weight, product])
