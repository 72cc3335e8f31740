"""Three-dimensional convolutions, channels last, for the same template as two-dimensional ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autocomp.kernels.compute import FLOPS, TEMPLATE, round_up
from autocomp.kernels.specs import padded_rows


@dataclass(frozen=True)
class VolumeSpec:
    """Shapes of one 3-D convolution: NDHWC data, OIDHW weight; ``padding`` is all starts, then all ends."""

    batch: int
    in_size: tuple[int, int, int]
    in_channels: int
    out_channels: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int, int, int, int]
    dilation: tuple[int, int, int]
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
    ) -> VolumeSpec:
        n, d, h, w, c = (int(size) for size in data)
        outputs, _, *kernel = (int(size) for size in weight)
        (kd, kh, kw), (sd, sh, sw), (ed, eh, ew) = kernel, map(int, stride), map(int, dilation)
        front, top, left, back, bottom, right = map(int, padding)
        return cls(
            n, (d, h, w), c, outputs, (kd, kh, kw), (sd, sh, sw), (front, top, left, back, bottom, right), (ed, eh, ew), groups, lanes
        )  # fmt: skip

    @property
    def out_size(self) -> tuple[int, int, int]:
        sizes = [
            (size + low + high - (k - 1) * step - 1) // stride + 1
            for size, low, high, k, step, stride in zip(
                self.in_size, self.padding[:3], self.padding[3:], self.kernel, self.dilation, self.stride, strict=True
            )
        ]
        return sizes[0], sizes[1], sizes[2]

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels

    @property
    def flops(self) -> int:
        taps = math.prod(self.kernel) * (self.in_channels // self.groups)
        return 2 * self.batch * math.prod(self.out_size) * self.out_channels * taps


def conv3d(data: Any, weight: Any, spec: VolumeSpec) -> Any:
    """Convolution of NDHWC ``data`` with a weight ``[O/L][KD][KH][KW][I][L]``, or ``[KD][KH][KW][C]`` of a depthwise one."""
    from tvm import te

    (kd, kh, kw), (sd, sh, sw), (ed, eh, ew) = spec.kernel, spec.stride, spec.dilation
    od, oh, ow = spec.out_size
    columns = padded_rows(ow)
    padded = _pad(data, spec, columns)
    rd, ry, rx = te.reduce_axis((0, kd), "rd"), te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    group_out, group_in = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    rc = te.reduce_axis((0, group_in), "rc")

    def value(n: Any, d: Any, h: Any, w: Any, o: Any) -> Any:
        at = (n, d * sd + rd * ed, h * sh + ry * eh, w * sw + rx * ew)
        if spec.depthwise:
            return te.sum(padded[(*at, o)] * weight[rd, ry, rx, o], [rd, ry, rx])
        channel = rc if spec.groups == 1 else (o // group_out) * group_in + rc
        tap = weight[o // spec.lanes, rd, ry, rx, rc, o % spec.lanes]
        return te.sum(padded[(*at, channel)] * tap, [rd, ry, rx, rc])

    channels = spec.out_channels if spec.depthwise else round_up(spec.out_channels, spec.lanes)
    anchor = te.compute(
        (spec.batch, od, oh, columns, channels),
        value,
        name="anchor",
        attrs={TEMPLATE: "depthwise" if spec.depthwise else "conv3d", FLOPS: spec.flops},
    )
    if (columns, channels) == (ow, spec.out_channels):
        return anchor
    return te.compute((spec.batch, od, oh, ow, spec.out_channels), lambda *i: anchor[i], name="crop")


def _pad(data: Any, spec: VolumeSpec, columns: int) -> Any:
    """``data`` with its border, wide enough for the padded output columns; ``data`` itself where nothing is changed."""
    from tvm import te, tirx

    lows, highs = spec.padding[:3], spec.padding[3:]
    d, h, _ = (size + low + high for size, low, high in zip(spec.in_size, lows, highs, strict=True))
    width = (columns - 1) * spec.stride[2] + (spec.kernel[2] - 1) * spec.dilation[2] + 1
    if not any(lows) and (d, h) == spec.in_size[:2] and width <= spec.in_size[2]:
        return data

    def value(n: Any, *index: Any) -> Any:
        *place, c = index
        at = [position - low for position, low in zip(place, lows, strict=True)]
        inside = [
            condition for position, size in zip(at, spec.in_size, strict=True) for condition in (position >= 0, position < size)
        ]  # fmt: skip
        return tirx.if_then_else(tirx.all(*inside), data[(n, *at, c)], tirx.const(0, data.dtype))

    return te.compute((spec.batch, d, h, width, spec.in_channels), value, name="pad")


def unfolded(
    data: Any, zero_point: Any, taps: int, stride: int, border: tuple[int, int], dilation: int, groups: int
) -> Any:
    """``data [N, T, H, W, C]`` of integers → ``[N * T', H, W, taps * C]``: beside each frame those that a kernel along time reads with it.

    Channels are ordered by group, by tap and by channel; beyond the ends are frames of ``zero_point``.
    """
    from tvm import te, tirx

    n, frames, height, width, channels = (int(size) for size in data.shape)
    count = (frames + sum(border) - dilation * (taps - 1) - 1) // stride + 1
    each = channels // groups

    def value(i: Any, y: Any, x: Any, c: Any) -> Any:
        t = i % count * stride + c // each % taps * dilation - border[0]
        read = data[i // count, t, y, x, c // (each * taps) * each + c % each]
        if not any(border):
            return read
        return tirx.if_then_else(tirx.all(t >= 0, t < frames), read, zero_point[0].astype(data.dtype))

    return te.compute((n * count, height, width, taps * channels), value, name="unfold")
