"""The stored form of one weight: what a database entry holds, how many bytes it takes, and the module that runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from autocomp.graph.shapes import factor_shapes, resized
from autocomp.layers.codebook import CodebookConv1d, CodebookConv2d, CodebookLinear
from autocomp.layers.convolution import Geometry
from autocomp.layers.decode import convolution_of, linear_of
from autocomp.layers.fp16 import HalfConv1d, HalfConv2d, HalfLinear
from autocomp.layers.w8a8 import QuantConv1d, QuantConv2d, QuantLinear
from autocomp.layers.weight_only import WeightOnlyConv1d, WeightOnlyConv2d, WeightOnlyLinear
from autocomp.records.candidate import Method, Precision
from autocomp.records.precisions import CENTROIDS, FORMATS, group_of

if TYPE_CHECKING:
    from autocomp.graph.graph import Layer


@dataclass(frozen=True)
class Part:
    """Weights of one module in a precision; the first axis of ``weight``, ``bias`` and ``scale`` is that of the outputs.

    fp32 and fp16: a float ``weight``. w8a8: int8, ``scale`` [O] and (``inv_xs``, ``zp``) as `QuantConv2d` takes them. w8, w4: levels
    (two to a byte in 4 bits) and ``scale`` [O, G]. vq: indices [O, S, V], ``codebook`` and ``scale`` [O]. Only fp32 does without a bias.
    ``columns`` are the weights of one output.
    """

    weight: Tensor
    bias: Tensor | None = None
    precision: Precision = "fp32"
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


def part_module(shape: Layer, part: Part) -> nn.Module:
    """Return the module that computes a layer of this description with a part's weights."""
    weight, bias, scale = part.weight, part.bias, part.scale
    kind, linear, one_d = FORMATS[part.precision], shape.kind == "linear", shape.one_d
    grouped = shape.conv_groups > 1
    groups = len(weight) * shape.conv_groups // shape.out_channels if grouped else 1
    geometry = Geometry(shape.stride, shape.padding, shape.dilation, groups, shape.output_padding)
    if part.precision == "fp32":
        return linear_of(weight, bias) if linear else convolution_of(one_d, weight, bias, geometry)
    assert bias is not None
    if part.precision == "fp16":
        return HalfLinear(weight, bias) if linear else (HalfConv1d if one_d else HalfConv2d)(weight, bias, geometry)
    assert scale is not None
    if kind.kind == "integer":
        if linear:
            return QuantLinear(weight, scale, bias, part.inv_xs, part.zp)
        return (QuantConv1d if one_d else QuantConv2d)(weight, scale, bias, part.inv_xs, part.zp, geometry)
    kernel = (part.columns // shape.taps, *shape.kernel)
    if kind.kind == "grouped":
        bits, group = int(kind.bits), group_of(part.precision, part.columns)
        if linear:
            return WeightOnlyLinear(weight, scale, bias, part.columns, bits, group)
        stored = WeightOnlyConv1d if one_d else WeightOnlyConv2d
        return stored(weight, scale, bias, kernel, bits, group, geometry)
    assert part.codebook is not None
    if linear:
        return CodebookLinear(weight, part.codebook, scale, bias, part.columns)
    return (CodebookConv1d if one_d else CodebookConv2d)(weight, part.codebook, scale, bias, kernel, geometry)


def whole_part(weight: Tensor) -> Part:
    """A flat weight [O, K] as it is, in float32."""
    return Part(weight.float(), columns=weight.shape[1])


def columns_of(shape: Layer) -> int:
    """The weights of one output: input columns times taps."""
    return shape.in_channels // shape.conv_groups * shape.taps


def stored_bytes(layer: Layer, inputs: int, outputs: int, method: Method, changed: bool) -> int:
    """Return the bytes of a layer's weights as stored, BatchNorm folded: exactly those of its module's tensors.

    ``inputs`` counts columns. A ``changed`` layer without BatchNorm has a bias even if the dense one has none.
    """
    shape = resized(layer, inputs, outputs)
    shapes = factor_shapes(shape, method.ranks) if method.ranks else [shape]
    total = 0
    for part in shapes:
        bias = part is shapes[-1] and (layer.bias or layer.norm is not None or changed)
        total += weight_bytes(part, method.precision) + 4 * part.out_channels * (bias or method.precision != "fp32")
    return total


def weight_bytes(shape: Layer, precision: Precision) -> int:
    """Return the bytes of one weight with its scales and codebooks, without the bias."""
    kind, outputs, columns = FORMATS[precision], shape.out_channels, columns_of(shape)
    if kind.kind == "float":
        return shape.weights * int(kind.bits) // 8
    if kind.kind == "integer":
        return shape.weights + 4 * outputs
    if kind.kind == "grouped":
        group = group_of(precision, columns)
        groups = -(-columns // group)
        stored = groups * group if shape.kind == "linear" else columns  # kernels read whole groups
        return outputs * ((stored if kind.bits == 8 else -(-stored // 2)) + 4 * groups)
    vectors = -(-columns // kind.dim)
    return outputs * (kind.stages * vectors + 4) + codebook_bytes(precision)


def codebook_bytes(precision: Precision) -> int:
    """Return the bytes of a layer's codebooks, whatever its size."""
    kind = FORMATS[precision]
    return kind.stages * CENTROIDS * kind.dim * 2
