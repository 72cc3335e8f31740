"""8-bit weights and activations: the integer custom ops, their modules, and how ranges are chosen.

The CPU implementations of ``autocomp::conv2d_w8a8`` and ``autocomp::linear_w8a8`` ARE the specification of the integer
semantics; the compiler's lowering is held to them.

    q   = clamp(round_half_even(float32(x * inv_xs)) + zp, 0, 255)          as uint8
    acc = sum((q - zp) * w)                                                  as int32; padding contributes 0
    y   = float32(float64(float32(acc)) * scale[o] + bias[o])                rounded once from float64
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from autocomp.errors import UsageError
from autocomp.layers.convolution import Convolution, Geometry, OneRow, convolved, empty_result
from autocomp.layers.form import Form
from autocomp.layers.part import Part, Place, Stored, along_rows
from autocomp.records.precisions import INTEGER

FLOAT32_EXACT = 2**24  # integers up to here are exact in float32, in any order of summation
INT32_LIMIT = 2**31
EPILOGUE_BLOCK = 1 << 16  # elements worked on at once in float64: 512 kB stays in a second-level cache

Observer = Literal["minmax", "percentile", "mse"]


def quantise_centred(x: Tensor, inv_xs: float, zp: int) -> Tensor:
    """Return ``q - zp`` of the specification as a new float32 tensor of whole numbers in [-zp, 255 - zp]."""
    return x.mul(inv_xs).round_().clamp_(-zp, 255 - zp)


def largest_sum(weight: Tensor, zp: int) -> int:
    """Bound |acc| from the weights at hand: max over outputs of sum |w|, times the largest |q - zp|."""
    if weight.numel() == 0:
        return 0
    return int(weight.flatten(1).abs().sum(1, dtype=torch.int64).max()) * max(zp, 255 - zp)


def _chunks(channels: int, parts: int) -> Iterator[slice]:
    step = -(-channels // parts)
    for start in range(0, channels, step):
        yield slice(start, min(start + step, channels))


def _rescale(acc: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return float32(acc * scale + bias) with one rounding; ``acc`` is [rows, O, inner] and is overwritten if float32.

    The product of two float32 is exact in float64, so a fused and an unfused multiply-add agree there.
    """
    acc = acc.to(torch.float32)
    scale64, bias64 = scale.double()[:, None], bias.double()[:, None]
    rows = max(1, EPILOGUE_BLOCK // max(1, acc[0].numel())) if acc.shape[0] else 1
    for block in acc.split(rows):
        block.copy_(block.double().mul_(scale64).add_(bias64))
    return acc


_exact = True


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """Let integer layers add up in float32, which takes a fraction of the time where sums may pass 2^24: off by rounding, enough to score by."""
    global _exact
    _exact = False
    try:
        yield
    finally:
        _exact = True


@torch.library.custom_op(
    "autocomp::conv2d_w8a8",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor w, Tensor scale, Tensor bias, float inv_xs, int zp, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups) -> Tensor",
)
def conv2d_w8a8(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    inv_xs: float,
    zp: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolve float32 NCHW ``x`` with int8 OIHW ``w`` in integers; ``scale`` and ``bias`` are float32 [O]."""
    q = quantise_centred(x, inv_xs, zp)
    largest = largest_sum(w, zp)
    if largest < FLOAT32_EXACT or not _exact:
        acc = functional.conv2d(q, w.float(), None, stride, padding, dilation, groups)
    elif groups == 1 and w.shape[1] > 1:
        # Each part of the input channels is summed exactly in float32, the parts in float64.
        parts = min(w.shape[1], -(-largest // FLOAT32_EXACT) * 2)
        if any(largest_sum(w[:, part], zp) >= FLOAT32_EXACT for part in _chunks(w.shape[1], parts)):
            acc = functional.conv2d(q.double(), w.double(), None, stride, padding, dilation, groups)
        else:
            acc = torch.zeros((), dtype=torch.float64)
            for part in _chunks(w.shape[1], parts):
                acc = acc + functional.conv2d(q[:, part], w[:, part].float(), None, stride, padding, dilation).double()
    else:
        acc = functional.conv2d(q.double(), w.double(), None, stride, padding, dilation, groups)
    acc = acc.contiguous()
    return _rescale(acc.flatten(2), scale, bias).view(acc.shape)


@torch.library.custom_op(
    "autocomp::convolution_w8a8",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor w, Tensor scale, Tensor bias, float inv_xs, int zp, int[] stride, int[] padding, "
    "int[] dilation, int groups, int[]? output_padding) -> Tensor",
)
def convolution_w8a8(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    inv_xs: float,
    zp: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_padding: list[int] | None,
) -> Tensor:
    """Convolve in three dimensions, or transposed (``output_padding`` is given), as `conv2d_w8a8`; int8 ``w`` has the outputs first."""
    q = quantise_centred(x, inv_xs, zp)
    exact = torch.float32 if largest_sum(w, zp) < FLOAT32_EXACT or not _exact else torch.float64
    acc = convolved(q.to(exact), w.to(exact), None, _geometry(stride, padding, dilation, groups, output_padding))
    acc = acc.contiguous()
    return _rescale(acc.flatten(2), scale, bias).view(acc.shape)


def _result_of(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor, inv_xs: float, zp: int, *sizes: Any) -> Tensor:
    return empty_result(x, w, _geometry(*sizes))


conv2d_w8a8.register_fake(_result_of)
convolution_w8a8.register_fake(_result_of)


def _geometry(
    stride: list[int], padding: list[int], dilation: list[int], groups: int, output_padding: list[int] | None = None
) -> Geometry:
    more = None if output_padding is None else tuple(output_padding)
    return Geometry(tuple(stride), tuple(padding), tuple(dilation), groups, more)


@torch.library.custom_op(
    "autocomp::linear_w8a8",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor w, Tensor scale, Tensor bias, float inv_xs, int zp) -> Tensor",
)
def linear_w8a8(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor, inv_xs: float, zp: int) -> Tensor:
    """Multiply float32 ``x`` [..., K] by int8 ``w`` [N, K] in integers; ``scale`` and ``bias`` are float32 [N]."""
    q = quantise_centred(x, inv_xs, zp)
    exact = torch.float32 if largest_sum(w, zp) < FLOAT32_EXACT or not _exact else torch.float64
    acc = functional.linear(q.to(exact), w.to(exact))
    return _rescale(acc.reshape(-1, w.shape[0], 1), scale, bias).view(acc.shape)


@linear_w8a8.register_fake
def _(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor, inv_xs: float, zp: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _check_overflow(weight: Tensor, zp: int, name: str) -> None:
    largest = largest_sum(weight, zp)
    if largest >= INT32_LIMIT:
        raise UsageError(
            f"{name}: an int32 sum of {weight[0].numel()} products may reach {largest}, past {INT32_LIMIT - 1}; "
            "keep this layer at fp32 in the search-space file"
        )


class _Quant(Stored):
    """What 8-bit layers share: ``scale`` is weight scale times activation scale; (``inv_xs``, ``zp``) quantise the input."""

    family = INTEGER
    scale: Tensor
    inv_xs: float
    zp: int

    def float_weight(self) -> Tensor:
        return self.weight.float() * along_rows(self.scale * self.inv_xs, self.weight)

    def scale_rows(self, factor: Tensor) -> None:
        """Every scale stays positive: integers of rows whose factor is negative change their sign."""
        sign = torch.where(factor < 0, -1, 1).to(torch.int8)
        self.weight.mul_(along_rows(sign, self.weight))
        self.scale.copy_(self.scale.double() * factor.abs())


class QuantLinear(_Quant):
    """A linear layer in 8 bits: int8 weight [N, K], float32 scale [N] and bias [N]."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor, inv_xs: float, zp: int) -> None:
        super().__init__()
        _check_overflow(weight, zp, "QuantLinear")
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.inv_xs, self.zp = inv_xs, zp

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = linear_w8a8(x, self.weight, self.scale, self.bias, self.inv_xs, self.zp)
        return result

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, inv_xs={self.inv_xs:g}, zp={self.zp}"


class QuantConv2d(_Quant, Convolution):
    """A convolution in 8 bits: int8 weight [O, I / groups, ...], float32 scale [O] and bias [O]."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor, inv_xs: float, zp: int, geometry: Geometry) -> None:
        super().__init__({"weight": weight, "scale": scale, "bias": bias}, geometry)
        _check_overflow(weight, zp, "QuantConv2d")
        self.inv_xs, self.zp = inv_xs, zp

    def forward(self, x: Tensor) -> Tensor:
        tensors = (x, self.weight, self.scale, self.bias, self.inv_xs, self.zp)
        if not self.geometry.is_plain:
            result: Tensor = convolution_w8a8(*tensors, *self.geometry)
            return result
        result = conv2d_w8a8(*tensors, *self.geometry[:4])
        return result

    def extra_repr(self) -> str:
        return f"{self.sizes(self.weight.shape[1:])}, zp={self.zp}"


class QuantConv1d(OneRow, QuantConv2d):
    """A convolution of ``[N, C, L]`` in 8 bits (weight ``[O, I, 1, K]``)."""


_TENSORS = ("weight", "scale", "bias")
FORMS = (
    Form(QuantLinear, ("inv_xs", "zp"), _TENSORS),
    *(Form(kind, ("inv_xs", "zp", "geometry"), _TENSORS) for kind in (QuantConv1d, QuantConv2d)),
)


def layer_of(part: Part, place: Place) -> Stored:
    """The module on a stored weight."""
    assert part.bias is not None
    assert part.scale is not None
    if place.linear:
        return QuantLinear(part.weight, part.scale, part.bias, part.inv_xs, part.zp)
    kind = QuantConv1d if place.one_d else QuantConv2d
    return kind(part.weight, part.scale, part.bias, part.inv_xs, part.zp, place.geometry)
