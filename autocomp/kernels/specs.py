"""What a convolution or a product of matrices is, by its sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autocomp.kernels.intrinsics import DotProduct

_MATRIX_RUN = 64  # bytes of a row of a matrix register
_ROW_TILES = range(6, 15)  # rows of a register tile that reach the peak on 16 to 32 vector registers


def padded_rows(rows: int) -> int:
    """The smallest extent, at least ``rows``, that a tile of 6 to 14 rows divides (``rows`` itself up to 14)."""
    if rows <= _ROW_TILES[-1]:
        return rows
    extent = rows
    while not any(extent % tile == 0 for tile in _ROW_TILES):
        extent += 1
    return extent


def live_taps(kernel: int, size: int, stride: int, padding: tuple[int, int], dilation: int) -> list[int]:
    """The taps of one axis that ever read data, and those between; the others read padding alone, wide dilations over small pictures say.

    All of them where none reads data.
    """
    low, high = padding
    last = (size + low + high - dilation * (kernel - 1) - 1) // stride * stride  # where the last output begins
    begin, end = max(0, (low - last + dilation - 1) // dilation), min(kernel, (size - 1 + low) // dilation + 1)
    return list(range(begin, end) if begin < end else range(kernel))


def padding_left(kernel: int, taps: Sequence[int], padding: tuple[int, int], dilation: int) -> tuple[int, int]:
    """The padding of one axis for these of its taps alone; below 0 where data are cut off."""
    return padding[0] - taps[0] * dilation, padding[1] - (kernel - 1 - taps[-1]) * dilation


@dataclass(frozen=True)
class ConvSpec:
    """Shapes of one 2-D convolution: NHWC data, OIHW weight; ``padding`` is (top, left, bottom, right)."""

    batch: int
    in_size: tuple[int, int]
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    lanes: int

    @classmethod
    def of(
        cls,
        data: Sequence[int],
        weight: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        lanes: int,
    ) -> ConvSpec:
        n, h, w, c = (int(size) for size in data)
        top, left, bottom, right = (int(size) for size in padding)
        return cls(
            n, (h, w), c, int(weight[0]), (int(weight[2]), int(weight[3])), (int(stride[0]), int(stride[1])),
            (top, left, bottom, right), (int(dilation[0]), int(dilation[1])), groups, lanes,
        )  # fmt: skip

    @property
    def out_size(self) -> tuple[int, int]:
        top, left, bottom, right = self.padding
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        h = (self.in_size[0] + top + bottom - spans[0]) // self.stride[0] + 1
        w = (self.in_size[1] + left + right - spans[1]) // self.stride[1] + 1
        return h, w

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels

    @property
    def tileable(self) -> bool:
        """Whether a vector of output channels always reads one group's inputs."""
        return self.groups == 1 or self.depthwise or (self.out_channels // self.groups) % self.lanes == 0

    def folds(self, dot: DotProduct | None) -> bool:
        """Whether the taps of one row are summed as one run of values: few channels would leave most of an intrinsic empty."""
        runs = self.groups == self.dilation[1] == 1 < self.kernel[1] and not self.is_dense
        if dot is None or not runs:
            return False
        if dot.matrix:
            return self.in_channels * dot.element_bytes < _MATRIX_RUN
        return dot.steps > 1 and self.in_channels % (dot.width // 2) != 0

    @property
    def is_dense(self) -> bool:
        """A 1x1 convolution that is a matrix product over all pixels."""
        return self.kernel == self.stride == (1, 1) and not any(self.padding) and self.groups == 1

    @property
    def flops(self) -> int:
        h, w = self.out_size
        return 2 * self.batch * h * w * self.out_channels * (self.in_channels // self.groups) * math.prod(self.kernel)


@dataclass(frozen=True)
class DenseSpec:
    """Shapes of one product of rows ``[..., K]`` with a constant weight ``[N, K]``."""

    leading: tuple[int, ...]
    depth: int
    out_features: int
    lanes: int

    @classmethod
    def of(cls, data: Sequence[int], out_features: int, lanes: int) -> DenseSpec:
        *leading, depth = (int(size) for size in data)
        return cls(tuple(leading), depth, out_features, lanes)

    @property
    def rows(self) -> int:
        return math.prod(self.leading)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.depth * self.out_features


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
