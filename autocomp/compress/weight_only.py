"""Layers with 8- or 4-bit weights and float activations: the custom op, the modules, and how weights are rounded.

The CPU implementation of ``autocomp::linear_weight_only`` IS the specification; the compiler's lowering is held to it.

    weight[n, k] = float32(level[n, k]) * scales[n, k // group]             levels in [-127, 127], or [-8, 7]
    y            = x @ weight.T + bias                                       in float32, in any order of summation

Levels are stored as int8 ``[N, K]`` or, two to a byte with the even k in the low half (two's complement), as uint8 ``[N, K/2]``. K is
padded with zero levels to whole groups. A convolution has no kernel for these: it stores [O, K] levels without padding, K being inputs
times taps, and decodes them to a float weight when it is run or compiled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.compress.convolution import Convolution, Geometry, OneRow, convolved
from autocomp.precisions import GROUPS

BITS = (4, 8)
LOWEST = {8: -127, 4: -8}
HIGHEST = {8: 127, 4: 7}
# Of the largest weight of a group, as a fraction: with 16 levels it often pays to clip the extremes, and 7/8 lets the lowest
# level reach it.
_SHRINKS = {8: (1.0,), 4: tuple(1.0 - 0.025 * step for step in range(15))}


@torch.library.custom_op(
    "autocomp::linear_weight_only",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor w, Tensor scales, Tensor bias, int bits, int group) -> Tensor",
)
def linear_weight_only(x: Tensor, w: Tensor, scales: Tensor, bias: Tensor, bits: int, group: int) -> Tensor:
    """Multiply float32 ``x`` [..., K] by a stored weight (see the module); ``scales`` is float32 [N, G], ``bias`` float32 [N]."""
    return functional.linear(x, dequantise(w, scales, bits, group)[:, : x.shape[-1]], bias)


@linear_weight_only.register_fake
def _(x: Tensor, w: Tensor, scales: Tensor, bias: Tensor, bits: int, group: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def dequantise(w: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """The float32 weight [N, G * group] of stored levels."""
    levels = unpack_levels(w) if bits == 4 else w
    return (levels.float().unflatten(1, (-1, group)) * scales[:, :, None]).flatten(1)


def pack_levels(levels: Tensor) -> Tensor:
    """int8 levels [N, K] in [-8, 7], K even → uint8 [N, K/2]."""
    fields = levels.to(torch.int16) & 15
    return (fields[:, 0::2] | fields[:, 1::2] << 4).to(torch.uint8)


def unpack_levels(packed: Tensor) -> Tensor:
    """uint8 [N, K/2] → int8 levels [N, K]."""
    fields = torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8)
    return (fields ^ 8) - 8  # the sign of a four-bit two's complement


def quantise_groups(weight: Tensor, bits: int, group: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a float weight [N, K] to levels, one symmetric scale for each row and group of ``group`` columns.

    Returns (int8 levels [N, G * group], float32 scales [N, G]). With 8 bits the largest weight of a group is its highest level; with
    4 bits each group takes the one of 15 clipping ranges with the least squared error, each weight counting by ``importance`` [N, K].
    A group of zeros gets scale 1.
    """
    n, k = weight.shape
    padded = functional.pad(weight.detach().double(), (0, -k % group)).reshape(n, -1, group)
    peak = padded.abs().amax(2, keepdim=True)
    counts = torch.ones_like(padded)
    if importance is not None:
        counts = functional.pad(importance.double(), (0, -k % group)).reshape(n, -1, group)
    best = torch.full_like(peak, torch.inf)
    levels, scales = torch.zeros(padded.shape, dtype=torch.int8), torch.ones(peak.shape)
    for shrink in _SHRINKS[bits]:
        scale = (peak * (shrink / HIGHEST[bits])).float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        rounded = (padded / scale.double()).round().clamp(LOWEST[bits], HIGHEST[bits])
        error = ((rounded * scale.double() - padded).square() * counts).sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        levels = torch.where(better, rounded.to(torch.int8), levels)
        scales = torch.where(better, scale, scales)
    return levels.flatten(1), scales.squeeze(2)


class WeightOnlyLinear(nn.Module):
    """A linear layer with stored levels ``weight``, float32 ``scales`` [N, G] and ``bias`` [N]."""

    weight: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor, in_features: int, bits: int, group: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.in_features, self.out_features = in_features, weight.shape[0]
        self.bits, self.group = bits, group

    def forward(self, x: Tensor) -> Tensor:
        return linear_weight_only(x, self.weight, self.scales, self.bias, self.bits, self.group)

    def float_weight(self) -> Tensor:
        """The float32 weight [N, K] that is multiplied."""
        return dequantise(self.weight, self.scales, self.bits, self.group)[:, : self.in_features]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"


class WeightOnlyConv2d(Convolution):
    """A convolution with stored levels ``weight`` [O, K] (4 bits: uint8 [O, ceil(K/2)]), float32 ``scales`` [O, G] and ``bias`` [O].

    ``kernel`` is (inputs of a group, height, width), K their product.
    """

    scales: Tensor

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        bias: Tensor,
        kernel: tuple[int, ...],
        bits: int,
        group: int,
        geometry: Geometry,
    ) -> None:
        super().__init__({"weight": weight, "scales": scales, "bias": bias}, geometry)
        self.kernel, self.bits, self.group = kernel, bits, group

    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, self.float_weight(), self.bias, self.geometry)

    def float_weight(self) -> Tensor:
        """The float32 weight OIHW that is multiplied."""
        columns = math.prod(self.kernel)
        levels = self.weight.float()
        if self.bits == 4:  # in exact floats: the ONNX exporter types shifts of bytes wrongly
            high = (levels / 16).floor()
            fields = torch.stack([levels - 16 * high, high], -1).flatten(1)[:, :columns]
            levels = fields - 16 * (fields > 7)
        # Not by repeating the scales: an exporter would fold these into a constant as large as a float weight.
        whole = functional.pad(levels, (0, -columns % self.group)).unflatten(1, (-1, self.group))
        return (whole * self.scales[:, :, None]).flatten(1)[:, :columns].unflatten(1, self.kernel)

    def extra_repr(self) -> str:
        return f"{self.sizes(self.kernel)}, bits={self.bits}, group={self.group}"


class WeightOnlyConv1d(OneRow, WeightOnlyConv2d):
    """A convolution of ``[N, C, L]``."""


def weight_only(layer: nn.Linear, bits: int, group: int) -> WeightOnlyLinear:
    """Return the layer with its weights in ``bits`` bits, rounded to nearest. ValueError for bits or groups without kernels."""
    if bits not in BITS or group not in GROUPS:
        raise ValueError(f"bits must be one of {BITS} and group one of {GROUPS}; got {bits} and {group}")
    levels, scales = quantise_groups(layer.weight, bits, group)
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().clone()
    stored = pack_levels(levels) if bits == 4 else levels
    return WeightOnlyLinear(stored, scales, bias, layer.in_features, bits, group)
