"""What layers in 16-bit floats share: weights and activations in one of torch's types, products summed in float32.

The CPU implementations of the custom ops ARE the specification; the compiler's lowering is held to them.

    x' = round(x), w' = round(w)      to the nearest of the type, ties to even
    y  = sum(x' * w') + bias          exact products, summed in float32 in any order; bias float32

A kernel may sum in the type itself: it is then held to its tolerance, not float32's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.layers.convolution import Convolution, Geometry, convolved, empty_result, plain_geometry
from autocomp.layers.part import Part, Place, Stored, along_rows

_CONV = "(Tensor x, Tensor w, Tensor bias, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor"
_LINEAR = "(Tensor x, Tensor w, Tensor bias) -> Tensor"


def operations(name: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The ops ``autocomp::conv2d_NAME`` and ``autocomp::linear_NAME``.

    They convolve float32 NCHW ``x`` with OIHW ``w`` of the type, or multiply float32 ``x`` [..., K] by ``w`` [N, K]; ``bias`` is float32
    [O], the result float32.
    """

    @torch.library.custom_op(f"autocomp::conv2d_{name}", mutates_args=(), device_types="cpu", schema=_CONV)
    def conv2d(
        x: Tensor, w: Tensor, bias: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
    ) -> Tensor:
        rounded = x.to(dtype).float()
        return functional.conv2d(rounded, w.float(), bias, stride, padding, dilation, groups).contiguous()

    @conv2d.register_fake
    def _(
        x: Tensor, w: Tensor, bias: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
    ) -> Tensor:
        return empty_result(x, w, Geometry(tuple(stride), tuple(padding), tuple(dilation), groups))

    @torch.library.custom_op(f"autocomp::linear_{name}", mutates_args=(), device_types="cpu", schema=_LINEAR)
    def linear(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(x.to(dtype).float(), w.float(), bias)

    @linear.register_fake
    def _(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], w.shape[0]))

    return conv2d, linear


class Sixteen(Stored):
    """A layer in 16 bits: ``weight`` of the type, float32 ``bias`` [O]."""

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype]

    def float_weight(self) -> Tensor:
        return self.weight.float()

    def scale_rows(self, factor: Tensor) -> None:
        self.weight.copy_(self.weight.double() * along_rows(factor, self.weight))


class SixteenLinear(Sixteen):
    """A linear layer: weight [N, K]."""

    linear: ClassVar[Callable[..., Tensor]]

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return type(self).linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {self.name}"


class SixteenConv2d(Sixteen, Convolution):
    """A convolution: weight OIHW. One that is not plain has no kernel, and decodes its weight."""

    conv2d: ClassVar[Callable[..., Tensor]]

    def __init__(self, weight: Tensor, bias: Tensor, geometry: Geometry) -> None:
        super().__init__({"weight": weight, "bias": bias}, geometry)

    def forward(self, x: Tensor) -> Tensor:
        if not self.geometry.is_plain:
            return convolved(x, self.float_weight(), self.bias, self.geometry)
        return type(self).conv2d(x, self.weight, self.bias, *self.geometry[:4])

    def extra_repr(self) -> str:
        return f"{self.sizes(self.weight.shape[1:])}, {self.name}"


def layer_of(
    part: Part, place: Place, linear: type[SixteenLinear], conv2d: type[SixteenConv2d], conv1d: type[SixteenConv2d]
) -> Stored:
    """The module, of one of these classes, on a stored weight."""
    assert part.bias is not None
    if place.linear:
        return linear(part.weight, part.bias)
    return (conv1d if place.one_d else conv2d)(part.weight, part.bias, place.geometry)


def converted(
    layer: nn.Conv1d | nn.Conv2d | nn.Linear,
    linear: type[SixteenLinear],
    conv2d: type[SixteenConv2d],
    conv1d: type[SixteenConv2d],
) -> Stored:
    """The 16-bit module of a float layer. Zero-padded convolutions with symmetric integer padding only (ValueError otherwise)."""
    weight = layer.weight.detach().to(linear.dtype)
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().clone()
    one_d, geometry = isinstance(layer, nn.Conv1d), Geometry((), (), (), 1)
    if not isinstance(layer, nn.Linear):
        geometry = plain_geometry(layer)
    place = Place(isinstance(layer, nn.Linear), one_d, tuple(weight.shape[1:]), geometry)
    return layer_of(Part(weight.unsqueeze(2) if one_d else weight, bias), place, linear, conv2d, conv1d)
