"""Convolutions of stride 1 by fewer products: tiles of the picture and the kernel are transformed, multiplied point by point, and back.

``m`` outputs of ``k`` taps along an axis need ``m + k - 1`` products in place of ``m * k`` (Winograd 1980; Lavin and Gray 2015,
arXiv 1509.09308): a 3x3 kernel takes 36 products for 4x4 outputs, a quarter of 144. The products of all tiles at one point are a product of
matrices over channels, for the same register tiles as every contraction. The transforms are additions and multiplications by the small
constants that the points of a Toom-Cook scheme give. They lose precision as tiles grow: 3x3 kernels of 64 to 512 channels were seen 2e-7 to
5e-7 of the largest output off float64 in tiles of 2, and 5e-6 to 1.1e-5 in tiles of 4; the bounds are in ``tests/kernels/test_winograd.py``.

Which form a layer takes, and how a kernel is cut, are in `winograd_tiles` and ``tuning.forms``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from autocomp.kernels.compute import FLOPS, TEMPLATE, round_up
from autocomp.kernels.specs import ConvSpec, padded_rows

NAME = "winograd"
# Outputs of a tile along an axis, the best guess first. 4 was the fastest of nine kinds of layers in ten (AVX-512); 2 is where weights of 36
# points no longer lie near; 6 needs more registers than there are, and was never ahead of 4 by more than the noise.
SIZES = (4, 2)
OUTPUTS = "autocomp.outputs"  # block annotation: of a tile, across
BLOCKS_AXIS = 2  # of a transformed weight: which block of output channels
_POINTS = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))
_MOST = len(_POINTS) + 1  # points along an axis, infinity among them


@dataclass(frozen=True)
class Axis:
    """One axis of a kernel: ``taps`` of it, ``outputs`` of a tile. With one tap nothing is transformed."""

    taps: int
    outputs: int

    @property
    def points(self) -> int:
        return self.taps + self.outputs - 1

    @property
    def matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(back [outputs, points], of the kernel [points, taps], of the data [points, points]), in float64."""
        return _matrices(self.outputs, self.taps)


@cache
def _matrices(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = outputs + taps - 1
    points = [Fraction(point) for point in _POINTS[: count - 1]]
    back = np.zeros((outputs, count))
    kernel = np.zeros((count, taps))
    data = np.zeros((count, count))
    for j, point in enumerate(points):
        others = [other for other in points if other != point]
        scale = math.prod((point - other for other in others), start=Fraction(1))
        back[:, j] = [float(point**i) for i in range(outputs)]
        kernel[j] = [float(point**i / scale) for i in range(taps)]
        data[j, : count - 1] = _polynomial(others)
    back[-1, -1] = kernel[-1, -1] = 1  # the point at infinity
    data[-1] = _polynomial(points)
    return back, kernel, data


def _polynomial(roots: Sequence[Fraction]) -> list[float]:
    """Coefficients of the monic polynomial with these roots, lowest power first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return [float(value) for value in coefficients]


def axes(spec: ConvSpec, outputs: int) -> tuple[Axis, Axis]:
    """The axes of a convolution in tiles of ``outputs`` where there is something to save."""
    y, x = (Axis(taps, outputs if taps > 1 else 1) for taps in spec.kernel)
    return y, x


def fits(spec: ConvSpec, outputs: int) -> bool:
    """Whether a convolution may be computed in tiles of ``outputs``, with fewer products than directly, and fills vectors."""
    plain = spec.stride == spec.dilation == (1, 1) and spec.groups == 1 and max(spec.kernel) > 1
    if not plain or min(spec.out_size) < 1 or 2 * min(spec.in_channels, spec.out_channels) < spec.lanes:
        return False
    return max(axis.points for axis in axes(spec, outputs)) <= _MOST and 2 * products(spec, outputs) < spec.flops


def tile_counts(spec: ConvSpec, outputs: int) -> tuple[int, int]:
    """Tiles (down, across) that cover the output; rows of many are padded to whole register tiles."""
    down, across = (-(-size // axis.outputs) for size, axis in zip(spec.out_size, axes(spec, outputs), strict=True))
    return down, padded_rows(across)


def extents(spec: ConvSpec, outputs: int) -> tuple[int, ...]:
    """Loops of the products in the middle: points down and across, batch, tiles down and across, output channels in whole vectors."""
    points = (axis.points for axis in axes(spec, outputs))
    return (*points, spec.batch, *tile_counts(spec, outputs), round_up(spec.out_channels, spec.lanes))


def products(spec: ConvSpec, outputs: int) -> int:
    """Multiply-adds in the middle."""
    return math.prod(extents(spec, outputs)) * spec.in_channels


def weight_shape(spec: ConvSpec, outputs: int) -> tuple[int, ...]:
    """The shape of `transformed_weight`."""
    *points, _, _, _, channels = extents(spec, outputs)
    return (*points, channels // spec.lanes, spec.in_channels, spec.lanes)


def transformed_weight(weight: np.ndarray, spec: ConvSpec, outputs: int) -> np.ndarray:
    """OIHW weight → ``[points down][points across][O/L][I][L]``, float32; transformed in float64."""
    y, x = (axis.matrices[1] for axis in axes(spec, outputs))
    down, across, blocks, depth, lanes = weight_shape(spec, outputs)
    points = np.zeros((down, across, blocks * lanes, depth), np.float32)
    points[:, :, : spec.out_channels] = np.einsum("ah,bw,oihw->aboi", y, x, weight.astype(np.float64), optimize=True)
    return np.ascontiguousarray(points.reshape(down, across, blocks, lanes, depth).transpose(0, 1, 2, 4, 3))


def conv2d(data: Any, weight: Any, spec: ConvSpec, outputs: int) -> Any:
    """Convolution of NHWC ``data`` with a transformed weight."""
    from tvm import te

    y, x = axes(spec, outputs)
    back_y, back_x, data_y, data_x = y.matrices[0], x.matrices[0], y.matrices[2], x.matrices[2]
    loops = extents(spec, outputs)
    *_, down, across, channels = loops
    lanes, depth = spec.lanes, round_up(spec.in_channels, spec.lanes)  # data are transformed by whole vectors
    padded = _pad(data, spec, (down * y.outputs + y.taps - 1, across * x.outputs + x.taps - 1, depth))

    def pixel(n: Any, h: Any, w: Any, c: Any, i: Any, j: Any) -> Any:
        return padded[n, h * y.outputs + i, w * x.outputs + j, c]

    rows = te.compute(
        (spec.batch, down, across, y.points, x.points, depth),
        lambda n, h, w, i, j, c: _row(data_y, i, lambda s: pixel(n, h, w, c, s, j)),
        name="rows",
    )
    points = te.compute(
        (y.points, x.points, spec.batch, down, across, depth),
        lambda i, j, n, h, w, c: _row(data_x, j, lambda s: rows[n, h, w, i, s, c]),
        name="points",
    )
    rc = te.reduce_axis((0, spec.in_channels), "rc")
    anchor = te.compute(
        loops,
        lambda i, j, n, h, w, o: te.sum(points[i, j, n, h, w, rc] * weight[i, j, o // lanes, rc, o % lanes], [rc]),
        name="anchor",
        attrs={TEMPLATE: NAME, FLOPS: 2 * products(spec, outputs)},
    )
    columns = te.compute(
        (spec.batch, down, across, y.outputs, x.points, channels),
        lambda n, h, w, p, j, o: _row(back_y, p, lambda s: anchor[s, j, n, h, w, o]),
        name="columns",
        attrs={OUTPUTS: x.outputs},
    )
    return te.compute(
        (spec.batch, *spec.out_size, spec.out_channels),
        lambda n, h, w, o: _row(
            back_x, w % x.outputs, lambda s: columns[n, h // y.outputs, w // x.outputs, h % y.outputs, s, o]
        ),
        name="back",
    )


def _row(matrix: np.ndarray, index: Any, value: Any) -> Any:
    """Row ``index``, known once loops are unrolled, of a matrix of constants times the vector whose element ``s`` is ``value(s)``."""
    from tvm import tirx

    def scaled(position: int, factor: float) -> Any:
        return value(position) if factor == 1 else value(position) * tirx.const(factor, "float32")

    def dot(row: np.ndarray) -> Any:
        first, *others = (int(position) for position in np.flatnonzero(row))
        total = scaled(first, float(row[first]))
        for position in others:
            factor = float(row[position])
            total = total + scaled(position, factor) if factor > 0 else total - scaled(position, -factor)
        return total

    result = dot(matrix[-1])
    for position in reversed(range(len(matrix) - 1)):
        result = tirx.Select(index == position, dot(matrix[position]), result)
    return result


def _pad(data: Any, spec: ConvSpec, size: tuple[int, int, int]) -> Any:
    """``data`` with its border, up to the last tile's and vector's end; ``data`` itself where that is inside."""
    from tvm import te, tirx

    (h, w), (top, left, *_), depth = spec.in_size, spec.padding, spec.in_channels
    if not top and not left and size[0] <= h and size[1] <= w and size[2] == depth:
        return data

    def pixel(n: Any, y: Any, x: Any, c: Any) -> Any:
        inside = [y >= top, y < h + top, x >= left, x < w + left]
        if size[2] != depth:
            inside.append(c < depth)
        return tirx.if_then_else(tirx.all(*inside), data[n, y - top, x - left, c], tirx.const(0, data.dtype))

    return te.compute((spec.batch, *size), pixel, name="pad")
