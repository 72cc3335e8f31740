"""What the description of a layer becomes at other widths, and in factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autocomp.graph.graph import Layer


def resized(layer: Layer, inputs: int, outputs: int) -> Layer:
    """Return the description of a layer at other widths; ``inputs`` counts columns."""
    grouped = layer.conv_groups > 1  # whole groups go: what an output reads stays as it is
    share = outputs / layer.out_channels * (1.0 if grouped else inputs / layer.in_channels)
    groups = layer.conv_groups * outputs // layer.out_channels if grouped else 1
    groups = max(1, groups)  # also where none are left, of a layer that goes whole
    macs = round(layer.macs * share)
    return replace(layer, in_channels=inputs, out_channels=outputs, conv_groups=groups, macs=macs)


def factor_shapes(layer: Layer, ranks: Sequence[int]) -> list[Layer]:
    """Describe the layers a factorised one becomes: two (one rank: SVD, of a larger kernel spatial) or three (Tucker-2)."""
    one, zero = (1, 1), (0, 0)
    if len(ranks) == 1 and layer.taps > 1:
        return _spatial_shapes(layer, ranks[0])
    if len(ranks) == 1:
        first = replace(resized(layer, layer.in_channels, ranks[0]), bias=False)
        pixel = replace(layer, in_size=layer.out_size, stride=one, padding=zero, dilation=one)
        return [first, resized(pixel, ranks[0], layer.out_channels)]
    core = resized(replace(layer, bias=False), ranks[0], ranks[1])
    batch = layer.macs // max(1, layer.weights * layer.out_size[0] * layer.out_size[1])
    before = replace(layer, kernel=one, stride=one, padding=zero, dilation=one, out_size=layer.in_size, bias=False)
    before = replace(before, out_channels=ranks[0], macs=batch * before.in_channels * ranks[0] * _area(layer.in_size))
    after = replace(layer, kernel=one, stride=one, padding=zero, dilation=one, in_size=layer.out_size)
    after = replace(after, in_channels=ranks[1], macs=batch * ranks[1] * layer.out_channels * _area(layer.out_size))
    return [before, core, after]


def _spatial_shapes(layer: Layer, rank: int) -> list[Layer]:
    """A column kernel that strides down, then a row kernel that strides across."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = layer.kernel, layer.stride, layer.padding, layer.dilation
    middle = (layer.out_size[0], layer.in_size[1])
    batch = layer.macs // max(1, layer.weights * _area(layer.out_size))
    down = replace(
        layer, kernel=(kh, 1), stride=(sh, 1), padding=(ph, 0), dilation=(dh, 1), out_size=middle, bias=False
    )
    down = replace(down, out_channels=rank, macs=batch * layer.in_channels * rank * kh * _area(middle))
    across = replace(layer, kernel=(1, kw), stride=(1, sw), padding=(0, pw), dilation=(1, dw), in_size=middle)
    across = replace(across, in_channels=rank, macs=batch * rank * layer.out_channels * kw * _area(layer.out_size))
    return [down, across]


def _area(size: Sequence[int]) -> int:
    return math.prod(size)
