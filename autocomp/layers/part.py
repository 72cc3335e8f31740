"""One weight as a precision stores it, and what a module on it must know of its layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from autocomp.layers.convolution import Geometry, convolution_of, linear_of
from autocomp.records.precisions import FP32, Family, Precision


@dataclass(frozen=True)
class Part:
    """Weights of one module in a precision; the first axis of ``weight``, ``bias`` and ``scale`` is that of the outputs.

    fp32 and fp16: a float ``weight``. w8a8: int8, ``scale`` [O] and (``inv_xs``, ``zp``) as `QuantConv2d` takes them. w8, w4: levels
    (two to a byte in 4 bits) and ``scale`` [O, G]. vq: indices [O, S, V], ``codebook`` and ``scale`` [O]. Only fp32 does without a bias.
    ``columns`` are the weights of one output.
    """

    weight: Tensor
    bias: Tensor | None = None
    precision: Precision = FP32
    scale: Tensor | None = None
    codebook: Tensor | None = None
    inv_xs: float = 1.0
    zp: int = 0
    columns: int = 0

    def rows(self, rows: Tensor | None) -> Part:
        """The part with these outputs alone (None: all), in tensors of its own."""

        def some(value: Tensor) -> Tensor:
            return value.clone() if rows is None else value[rows]

        bias, scale, book = self.bias, self.scale, self.codebook
        return replace(
            self,
            weight=some(self.weight),
            bias=None if bias is None else some(bias),
            scale=None if scale is None else some(scale),
            codebook=None if book is None else book.clone(),
        )

    @property
    def nbytes(self) -> int:
        tensors = (self.weight, self.bias, self.scale, self.codebook)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Place(NamedTuple):
    """Where a part stands: in a linear layer, or a convolution (``one_d``: of [N, C, L]) of ``kernel`` (inputs of a group, height, width)."""

    linear: bool
    one_d: bool
    kernel: tuple[int, ...]
    geometry: Geometry


class Stored(nn.Module):
    """A layer in a precision other than fp32: buffers ``weight`` and ``bias`` with the outputs first, and what its family adds."""

    family: ClassVar[Family]
    weight: Tensor
    bias: Tensor

    def float_weight(self) -> Tensor:
        """The weight in float32, its outputs first."""
        raise NotImplementedError

    def scale_rows(self, factor: Tensor) -> None:
        """Multiply, in place, each output's weights by its float64 ``factor`` [O]."""
        raise NotImplementedError

    def fold(self, factor: Tensor, shift: Tensor) -> None:
        """Take an affine map [O] of the outputs, in float64, into the weights and the bias."""
        bias = self.bias.detach().double()
        self.scale_rows(factor)
        self.bias.copy_(bias * factor + shift)


def along_rows(factor: Tensor, weight: Tensor) -> Tensor:
    """A factor [O] in the shape that multiplies the rows of a weight."""
    return factor.view(-1, *([1] * (weight.dim() - 1)))


def float_layer(part: Part, place: Place) -> nn.Module:
    """The layer of torch.nn on a part's weight."""
    if place.linear:
        return linear_of(part.weight, part.bias)
    return convolution_of(place.one_d, part.weight, part.bias, place.geometry)
