"""Convolutions of all kinds under one description: two dimensions or three, plain or transposed, their outputs first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *Transposed)
Layers = (*Convolutions, nn.Linear)
AnyConvolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
AnyLayer = AnyConvolution | nn.Linear

FLOAT: Mapping[tuple[int, bool], type[AnyConvolution]] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


class Geometry(NamedTuple):
    """Sizes along the two or three axes of a convolution; ``output_padding`` is None unless it is transposed."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] | None = None

    @property
    def is_plain(self) -> bool:
        """Two-dimensional and not transposed: what has templates in every precision."""
        return len(self.stride) == 2 and self.output_padding is None

    def one_row(self) -> Geometry:
        """That of one dimension, without the row that it was described with."""
        last = None if self.output_padding is None else self.output_padding[1:]
        return Geometry(self.stride[1:], self.padding[1:], self.dilation[1:], self.groups, last)


class Convolution(nn.Module):
    """A convolution of ``tensors``, registered in this order; ``weight`` and ``bias`` have the outputs first, also where it is transposed."""

    weight: Tensor
    bias: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.geometry = Geometry(*geometry)

    @property
    def groups(self) -> int:
        return self.geometry.groups

    def sizes(self, kernel: Sequence[int]) -> str:
        """Sizes in words for ``extra_repr``; ``kernel`` is (inputs of a group, height, width), or with the time before these."""
        i, *taps = kernel
        kind = "" if self.geometry.output_padding is None else "transposed, "
        sizes = f"{i * self.groups}, {len(self.weight)}, kernel={tuple(taps)}, stride={self.geometry.stride}"
        return f"{kind}{sizes}, groups={self.groups}"


class OneRow(nn.Module):
    """Before a two-dimensional convolution among a class's bases: takes ``[N, C, L]``, as pictures one row high."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x.unsqueeze(2)).squeeze(2)
        return result


def outputs_first(layer: AnyLayer) -> Tensor:
    """The weight [O, I / groups, ...] of a layer; a transposed convolution's own is [I, O / groups, ...]."""
    return turned(layer.weight, layer.groups) if isinstance(layer, Transposed) else layer.weight


def turned(weight: Tensor, groups: int) -> Tensor:
    """Inputs and outputs of a weight exchanged within each group: [I, O / groups, ...] to [O, I / groups, ...], or back."""
    result: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return result


def float_convolution(weight: Tensor, bias: Tensor | None, geometry: Geometry) -> AnyConvolution:
    """The module of torch.nn on ``weight`` [O, I / groups, ...], which sets its channels."""
    stride, padding, dilation, groups, output_padding = geometry
    inputs, outputs, kernel = weight.shape[1] * groups, len(weight), tuple(weight.shape[2:])
    sizes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if output_padding is not None:
        sizes["output_padding"] = output_padding
    kind = FLOAT[len(kernel), output_padding is not None]
    made = kind(inputs, outputs, kernel, bias=bias is not None, device="meta", **sizes)  # type: ignore[arg-type]
    made.weight = nn.Parameter((weight if output_padding is None else turned(weight, groups)).contiguous())
    made.bias = None if bias is None else nn.Parameter(bias)
    return made


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


def convolution_of(one_d: bool, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> nn.Module:
    if one_d:
        return float_convolution(weight.squeeze(2), bias, geometry.one_row())
    return float_convolution(weight, bias, geometry)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``x`` [N, C, ...] convolved with ``weight`` [O, I / groups, ...]."""
    stride, padding, dilation, groups, output_padding = geometry
    if output_padding is None:
        plain = functional.conv2d if len(stride) == 2 else functional.conv3d
        return plain(x, weight, bias, stride, padding, dilation, groups)
    transposed = functional.conv_transpose2d if len(stride) == 2 else functional.conv_transpose3d
    return transposed(x, turned(weight, groups), bias, stride, padding, output_padding, groups, dilation)


def out_sizes(size: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> list[int]:
    """The sizes of a convolution's result along its axes."""
    axes = zip(size, kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    if geometry.output_padding is None:
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
    pairs = zip(axes, geometry.output_padding, strict=True)
    return [(n - 1) * s - 2 * p + d * (k - 1) + 1 + more for (n, k, s, p, d), more in pairs]


def empty_result(x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    """Return a tensor of the shape of ``x`` convolved with ``w`` [O, I / groups, ...], in the type of ``x``, its values unset."""
    return torch.empty(
        (x.shape[0], w.shape[0], *out_sizes(x.shape[2:], w.shape[2:], geometry)), dtype=x.dtype, device=x.device
    )


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
