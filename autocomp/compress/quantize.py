"""8-bit weights and activations: the integer custom ops, their modules, and how ranges are chosen.

The CPU implementations of ``autocomp::conv2d_w8a8`` and ``autocomp::linear_w8a8`` ARE the specification of the integer
semantics; the compiler's lowering is held to them.

    q   = clamp(round_half_even(float32(x * inv_xs)) + zp, 0, 255)          as uint8
    acc = sum((q - zp) * w)                                                  as int32; padding contributes 0
    y   = float32(float64(float32(acc)) * scale[o] + bias[o])                rounded once from float64
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.compress.convolution import Convolution, Geometry, OneRow, convolved, empty_result
from autocomp.errors import UsageError

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


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to int8 in [-127, 127], one symmetric scale for each output (first axis); a zero row gets scale 1.

    Returns (int8 of the same shape, float32 scale [O]); |weight - int8 * scale| is at most half a scale.
    """
    peak = weight.flatten(1).abs().amax(1).double()
    scale = torch.where(peak > 0, peak / 127.0, torch.ones_like(peak)).float()
    # A subnormal peak underflows to a zero scale: such a row is zero for every purpose.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    column = scale.double().view(-1, *([1] * (weight.dim() - 1)))
    return (weight.double() / column).round().clamp(-127, 127).to(torch.int8), scale


def activation_parameters(low: float, high: float) -> tuple[float, int]:
    """Return (inv_xs, zp) for values in [low, high], widened to hold 0: scale = (high - low) / 255.

    ``inv_xs`` is exactly a float32, and the activation scale is understood as its exact inverse.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    tiny = float(torch.finfo(torch.float32).tiny)
    scale = (high - low) / 255.0
    if not scale > 255 * tiny:  # nothing (or nothing float32 can hold the inverse of) was ever seen here
        return 1.0, 0
    inv_xs = float(torch.tensor(1.0 / scale, dtype=torch.float32))
    return inv_xs, max(0, min(255, round(-low * inv_xs)))


def observe(sample: Tensor, low: float, high: float, observer: Observer = "mse") -> tuple[float, float]:
    """Choose a clipping range inside [low, high], the extremes seen, from a sample of the values.

    ``minmax`` keeps the extremes; ``percentile`` drops 0.05 % at each side; ``mse`` takes the one of 20 shrunken ranges
    with the least squared error on the sample.
    """
    if observer == "minmax" or sample.numel() == 0:
        return low, high
    values = sample.flatten().float()
    if observer == "percentile":
        ordered = values.sort().values
        cut = int(ordered.numel() * 0.0005)
        return float(ordered[cut]), float(ordered[ordered.numel() - 1 - cut])
    best, chosen = float("inf"), (low, high)
    for step in range(20):
        shrink = 1.0 - 0.03 * step
        inv_xs, zp = activation_parameters(low * shrink, high * shrink)
        error = float((quantise_centred(values, inv_xs, zp).div_(inv_xs) - values).square_().mean())
        if error < best:
            best, chosen = error, (low * shrink, high * shrink)
    return chosen


def _check_overflow(weight: Tensor, zp: int, name: str) -> None:
    largest = largest_sum(weight, zp)
    if largest >= INT32_LIMIT:
        raise UsageError(
            f"{name}: an int32 sum of {weight[0].numel()} products may reach {largest}, past {INT32_LIMIT - 1}; "
            "keep this layer at fp32 in the search-space file"
        )


class QuantLinear(nn.Module):
    """A linear layer in 8 bits: int8 weight [N, K], float32 scale [N] and bias [N].

    ``scale`` is weight scale times activation scale; (``inv_xs``, ``zp``) quantise the input.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor, inv_xs: float, zp: int) -> None:
        super().__init__()
        _check_overflow(weight, zp, "QuantLinear")
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.inv_xs, self.zp = inv_xs, zp

    def forward(self, x: Tensor) -> Tensor:
        return linear_w8a8(x, self.weight, self.scale, self.bias, self.inv_xs, self.zp)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, inv_xs={self.inv_xs:g}, zp={self.zp}"


class QuantConv2d(Convolution):
    """A convolution in 8 bits: int8 weight [O, I / groups, ...], float32 scale [O] and bias [O].

    ``scale`` is weight scale times activation scale; (``inv_xs``, ``zp``) quantise the input.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor, inv_xs: float, zp: int, geometry: Geometry) -> None:
        super().__init__({"weight": weight, "scale": scale, "bias": bias}, geometry)
        _check_overflow(weight, zp, "QuantConv2d")
        self.inv_xs, self.zp = inv_xs, zp

    def forward(self, x: Tensor) -> Tensor:
        tensors = (x, self.weight, self.scale, self.bias, self.inv_xs, self.zp)
        if not self.geometry.is_plain:
            return convolution_w8a8(*tensors, *self.geometry)
        return conv2d_w8a8(*tensors, *self.geometry[:4])

    def extra_repr(self) -> str:
        return f"{self.sizes(self.weight.shape[1:])}, zp={self.zp}"


class QuantConv1d(OneRow, QuantConv2d):
    """A convolution of ``[N, C, L]`` in 8 bits (weight ``[O, I, 1, K]``)."""


def quantised(layer: nn.Conv1d | nn.Conv2d | nn.Linear, inv_xs: float, zp: int) -> QuantConv2d | QuantLinear:
    """Return the 8-bit module of a float layer: weights rounded to nearest, its input quantised with (inv_xs, zp).

    Zero-padded convolutions with symmetric integer padding only (ValueError otherwise).
    """
    weight, weight_scale = quantise_weight(layer.weight.detach())
    scale = (weight_scale.double() / inv_xs).float()
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().clone()
    if isinstance(layer, nn.Linear):
        return QuantLinear(weight, scale, bias, inv_xs, zp)
    geometry = plain_geometry(layer)
    if isinstance(layer, nn.Conv1d):
        return QuantConv1d(weight.unsqueeze(2), scale, bias, inv_xs, zp, geometry)
    return QuantConv2d(weight, scale, bias, inv_xs, zp, geometry)


def plain_geometry(layer: nn.Conv1d | nn.Conv2d) -> Geometry:
    """Return a convolution's geometry, one dimension as the width. ValueError unless padding is zeros, a number of them."""
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError("only zero padding by a number of pixels has a compressed form")
    if isinstance(layer, nn.Conv1d):
        return Geometry((1, layer.stride[0]), (0, int(layer.padding[0])), (1, layer.dilation[0]), layer.groups)
    return Geometry(pair(layer.stride), pair(layer.padding), pair(layer.dilation), layer.groups)


def pair(value: Iterable[int]) -> tuple[int, int]:
    """Return (height, width) as a plain tuple, whatever sequence torch held it in."""
    first, second = value
    return int(first), int(second)
