"""Stored weights of a layer: the module that runs one, and how many bytes they take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from autocomp.graph.shapes import factor_shapes, resized
from autocomp.layers.convolution import Geometry
from autocomp.layers.part import Part, Place
from autocomp.records.candidate import Method
from autocomp.records.precisions import FORMATS, FP32, load

if TYPE_CHECKING:
    from autocomp.graph.graph import Layer


def part_module(shape: Layer, part: Part) -> nn.Module:
    """Return the module that computes a layer of this description with a part's weights."""
    grouped = shape.conv_groups > 1
    groups = len(part.weight) * shape.conv_groups // shape.out_channels if grouped else 1
    geometry = Geometry(shape.stride, shape.padding, shape.dilation, groups, shape.output_padding)
    kernel = (part.columns // shape.taps, *shape.kernel)
    place = Place(shape.kind == "linear", shape.one_d, kernel, geometry)
    module: nn.Module = load(FORMATS[part.precision].family.layer)(part, place)
    return module


def whole_part(weight: Tensor) -> Part:
    """A flat weight [O, K] as it is, in float32."""
    return Part(weight.float(), columns=weight.shape[1])


def stored_bytes(layer: Layer, inputs: int, outputs: int, method: Method, changed: bool) -> int:
    """Return the bytes of a layer's weights as stored, BatchNorm folded: exactly those of its module's tensors.

    ``inputs`` counts columns. A ``changed`` layer without BatchNorm has a bias even if the dense one has none.
    """
    shape = resized(layer, inputs, outputs)
    shapes = factor_shapes(shape, method.ranks) if method.ranks else [shape]
    total = 0
    for part in shapes:
        bias = part is shapes[-1] and (layer.bias or layer.norm is not None or changed)
        total += FORMATS[method.precision].weight_bytes(part.out_channels, part.columns, part.kind == "linear")
        total += 4 * part.out_channels * (bias or method.precision != FP32)
    return total
