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
from torch import Tensor
from torch.nn import functional

from autocomp.layers.convolution import Convolution, Geometry, OneRow, convolved
from autocomp.layers.form import Form
from autocomp.layers.part import Part, Place, Stored
from autocomp.records.precisions import FORMATS, GROUPED, group_of

BITS = (4, 8)
LOWEST = {8: -127, 4: -8}
HIGHEST = {8: 127, 4: 7}


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
    result: Tensor = (levels.float().unflatten(1, (-1, group)) * scales[:, :, None]).flatten(1)
    return result


def pack_levels(levels: Tensor) -> Tensor:
    """int8 levels [N, K] in [-8, 7], K even → uint8 [N, K/2]."""
    fields = levels.to(torch.int16) & 15
    return (fields[:, 0::2] | fields[:, 1::2] << 4).to(torch.uint8)


def unpack_levels(packed: Tensor) -> Tensor:
    """uint8 [N, K/2] → int8 levels [N, K]."""
    fields = torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8)
    return (fields ^ 8) - 8  # the sign of a four-bit two's complement


class _WeightOnly(Stored):
    """What layers of stored levels share."""

    family = GROUPED
    scales: Tensor

    def scale_rows(self, factor: Tensor) -> None:
        self.scales.copy_(self.scales.double() * factor[:, None])  # a row whose factor is negative gets negative scales


class WeightOnlyLinear(_WeightOnly):
    """A linear layer with stored levels ``weight``, float32 ``scales`` [N, G] and ``bias`` [N]."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor, in_features: int, bits: int, group: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.in_features, self.out_features = in_features, weight.shape[0]
        self.bits, self.group = bits, group

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = linear_weight_only(x, self.weight, self.scales, self.bias, self.bits, self.group)
        return result

    def float_weight(self) -> Tensor:
        """The float32 weight [N, K] that is multiplied."""
        return dequantise(self.weight, self.scales, self.bits, self.group)[:, : self.in_features]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"


class WeightOnlyConv2d(_WeightOnly, Convolution):
    """A convolution with stored levels ``weight`` [O, K] (4 bits: uint8 [O, ceil(K/2)]), float32 ``scales`` [O, G] and ``bias`` [O].

    ``kernel`` is (inputs of a group, height, width), K their product.
    """

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
        result: Tensor = (whole * self.scales[:, :, None]).flatten(1)[:, :columns].unflatten(1, self.kernel)
        return result

    def extra_repr(self) -> str:
        return f"{self.sizes(self.kernel)}, bits={self.bits}, group={self.group}"


class WeightOnlyConv1d(OneRow, WeightOnlyConv2d):
    """A convolution of ``[N, C, L]``."""


_TENSORS = ("weight", "scales", "bias")
FORMS = (
    Form(WeightOnlyLinear, ("in_features", "bits", "group"), _TENSORS),
    *(Form(kind, ("kernel", "bits", "group", "geometry"), _TENSORS) for kind in (WeightOnlyConv1d, WeightOnlyConv2d)),
)


def layer_of(part: Part, place: Place) -> Stored:
    """The module on a stored weight."""
    assert part.bias is not None
    assert part.scale is not None
    bits, group = int(FORMATS[part.precision].bits), group_of(part.precision, part.columns)
    if place.linear:
        return WeightOnlyLinear(part.weight, part.scale, part.bias, part.columns, bits, group)
    kind = WeightOnlyConv1d if place.one_d else WeightOnlyConv2d
    return kind(part.weight, part.scale, part.bias, place.kernel, bits, group, place.geometry)
