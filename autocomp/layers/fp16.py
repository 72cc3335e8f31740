"""16-bit floating-point weights and activations: the custom ops, their modules, and how a float layer becomes one.

The CPU implementations of ``autocomp::conv2d_fp16`` and ``autocomp::linear_fp16`` ARE the specification; the compiler's lowering is held
to them.

    x' = fp16(x), w' = fp16(w)        rounded to nearest even; a magnitude of 65520 or more becomes infinite
    y  = sum(x' * w') + bias          exact products, summed in float32 in any order; bias float32

A kernel may sum in fp16: it is then held to fp16's tolerance, not float32's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.layers.convolution import Convolution, Geometry, OneRow, convolved, empty_result, plain_geometry
from autocomp.layers.form import Form
from autocomp.layers.part import Part, Place, Stored, along_rows
from autocomp.records.precisions import HALF


@torch.library.custom_op(
    "autocomp::conv2d_fp16",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor w, Tensor bias, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
)
def conv2d_fp16(
    x: Tensor, w: Tensor, bias: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Convolve float32 NCHW ``x`` with float16 OIHW ``w``; ``bias`` is float32 [O], the result float32."""
    return functional.conv2d(x.half().float(), w.float(), bias, stride, padding, dilation, groups).contiguous()


@conv2d_fp16.register_fake
def _(
    x: Tensor, w: Tensor, bias: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    return empty_result(x, w, Geometry(tuple(stride), tuple(padding), tuple(dilation), groups))


@torch.library.custom_op(
    "autocomp::linear_fp16",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor w, Tensor bias) -> Tensor",
)
def linear_fp16(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """Multiply float32 ``x`` [..., K] by float16 ``w`` [N, K]; ``bias`` is float32 [N], the result float32."""
    return functional.linear(x.half().float(), w.float(), bias)


@linear_fp16.register_fake
def _(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


class _Half(Stored):
    """What 16-bit layers share."""

    family = HALF

    def float_weight(self) -> Tensor:
        return self.weight.float()

    def scale_rows(self, factor: Tensor) -> None:
        self.weight.copy_(self.weight.double() * along_rows(factor, self.weight))


class HalfLinear(_Half):
    """A linear layer in 16 bits: float16 weight [N, K], float32 bias [N]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = linear_fp16(x, self.weight, self.bias)
        return result

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, fp16"


class HalfConv2d(_Half, Convolution):
    """A convolution in 16 bits: float16 weight OIHW, float32 bias [O]. One that is not plain has no kernel, and decodes its weight."""

    def __init__(self, weight: Tensor, bias: Tensor, geometry: Geometry) -> None:
        super().__init__({"weight": weight, "bias": bias}, geometry)

    def forward(self, x: Tensor) -> Tensor:
        if not self.geometry.is_plain:
            return convolved(x, self.float_weight(), self.bias, self.geometry)
        result: Tensor = conv2d_fp16(x, self.weight, self.bias, *self.geometry[:4])
        return result

    def extra_repr(self) -> str:
        return f"{self.sizes(self.weight.shape[1:])}, fp16"


class HalfConv1d(OneRow, HalfConv2d):
    """A convolution of ``[N, C, L]`` in 16 bits (weight ``[O, I, 1, K]``)."""


FORMS = (
    Form(HalfLinear, (), ("weight", "bias")),
    *(Form(kind, ("geometry",), ("weight", "bias")) for kind in (HalfConv1d, HalfConv2d)),
)


def layer_of(part: Part, place: Place) -> Stored:
    """The module on a stored weight."""
    assert part.bias is not None
    if place.linear:
        return HalfLinear(part.weight, part.bias)
    return (HalfConv1d if place.one_d else HalfConv2d)(part.weight, part.bias, place.geometry)


def halved(layer: nn.Conv1d | nn.Conv2d | nn.Linear) -> HalfConv2d | HalfLinear:
    """Return the 16-bit module of a float layer. Zero-padded convolutions with symmetric integer padding only (ValueError otherwise)."""
    weight = layer.weight.detach().half()
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().clone()
    if isinstance(layer, nn.Linear):
        return HalfLinear(weight, bias)
    geometry = plain_geometry(layer)
    return HalfConv2d(weight, bias, geometry) if weight.dim() == 4 else HalfConv1d(weight.unsqueeze(2), bias, geometry)
