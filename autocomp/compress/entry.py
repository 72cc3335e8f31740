"""One layer compressed in one way: computed from calibration statistics, turned into modules when it is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autocomp.compress.lowrank import Factors, svd, tucker2
from autocomp.compress.prune import AnyLayer, Layers, least_squares, output_error, spread, with_weights
from autocomp.compress.quantize import (
    Observer,
    QuantConv1d,
    QuantConv2d,
    QuantLinear,
    activation_parameters,
    observe,
    quantise_centred,
    quantise_weight,
)
from autocomp.records import Method
from autocomp.space import factor_shapes, resized

if TYPE_CHECKING:
    from autocomp.accuracy.calibrate import LayerStatistics
    from autocomp.graph import Layer

OBSERVED = 1 << 15  # values a range is chosen from: enough for a percentile of 0.05 % at each side


@dataclass(frozen=True)
class Part:
    """Weights of one module: float32 (``scale`` None) or int8 with what `QuantConv2d` takes."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    inv_xs: float = 1.0
    zp: int = 0


@dataclass(frozen=True)
class Entry:
    """A layer at one input width by one method, with all its output rows: slicing rows commutes with compressing.

    ``parts`` are one module, or the factors in order. ``error`` [O] is Fisher times dW_o H dW_o^T for each output
    (nats a sample; of a quantised layer the noise of its activations is in it). A grouped convolution's entry, depthwise
    or not, has the rows of the kept groups only.
    """

    layer: str
    in_width: int
    method: Method
    parts: tuple[Part, ...]
    error: Tensor

    def module(self, layer: Layer, original: nn.Module, rows: Tensor | None = None) -> nn.Module:
        """Return the module that computes the layer, with the output channels ``rows`` (None: all)."""
        if len(self.parts) == 1 and self.parts[0].scale is None:
            part = self.parts[0]
            sliced = None if layer.conv_groups > 1 else rows
            weight = part.weight if sliced is None else part.weight[sliced]
            bias = part.bias if sliced is None or part.bias is None else part.bias[sliced]
            assert isinstance(original, Layers)
            return with_weights(original, weight.clone(), None if bias is None else bias.clone())
        shapes = factor_shapes(layer, self.method.ranks) if self.method.ranks else [layer]
        modules = []
        for shape, part in zip(shapes, self.parts, strict=True):
            modules.append(_module(shape, part, rows if shape is shapes[-1] else None))
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _module(shape: Layer, part: Part, rows: Tensor | None) -> nn.Module:
    weight, bias, scale = part.weight, part.bias, part.scale
    if rows is not None and shape.conv_groups == 1:
        weight = weight[rows]
        bias = None if bias is None else bias[rows]
        scale = None if scale is None else scale[rows]
    weight = weight.clone()
    groups = len(weight) * shape.conv_groups // shape.out_channels if shape.conv_groups > 1 else 1
    geometry = (shape.stride, shape.padding, shape.dilation, groups)
    if scale is not None:
        assert bias is not None
        if shape.kind == "linear":
            return QuantLinear(weight, scale.clone(), bias.clone(), part.inv_xs, part.zp)
        quantised = QuantConv1d if shape.one_d else QuantConv2d
        return quantised(weight, scale.clone(), bias.clone(), part.inv_xs, part.zp, *geometry)
    module: nn.Conv1d | nn.Conv2d | nn.Linear
    if shape.kind == "linear":
        module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    elif shape.one_d:
        inputs, weight = weight.shape[1] * groups, weight.squeeze(2)
        flat = (shape.kernel[1], shape.stride[1], shape.padding[1], shape.dilation[1], groups)
        module = nn.Conv1d(inputs, len(weight), *flat, bias is not None, device="meta")
    else:
        inputs = weight.shape[1] * groups
        module = nn.Conv2d(inputs, len(weight), shape.kernel, *geometry, bias is not None, device="meta")
    module.weight = nn.Parameter(weight)
    module.bias = None if bias is None else nn.Parameter(bias.clone())
    return module


def stored_bytes(layer: Layer, inputs: int, outputs: int, method: Method, changed: bool) -> int:
    """Return the bytes of a layer's weights as stored, BatchNorm folded: int8 ones with float32 scale and bias.

    ``inputs`` counts columns. A ``changed`` layer without BatchNorm has a bias even if the dense one has none.
    """
    shape = resized(layer, inputs, outputs)
    shapes = factor_shapes(shape, method.ranks) if method.ranks else [shape]
    total = 0
    for part in shapes:
        if method.precision == "w8a8":
            total += part.weights + 8 * part.out_channels
        else:
            has_bias = part is shapes[-1] and (layer.bias or layer.norm is not None or changed)
            total += 4 * part.weights + 4 * part.out_channels * has_bias
    return total


def compress_layer(
    module: nn.Module,
    layer: Layer,
    seen: LayerStatistics,
    columns: Tensor | None,
    in_width: int,
    methods: Sequence[Method],
    observer: Observer = "mse",
    rows: Tensor | None = None,
) -> dict[Method, Entry]:
    """Compress one layer at one input width by several methods.

    ``columns`` are the input columns (channels of a convolution) that are kept, None for all; of a grouped convolution,
    which loses whole groups, ``rows`` are the output channels that stay with them.
    """
    assert isinstance(module, Layers)
    task = _Compression(module, layer, seen, columns, rows, in_width, observer)
    return {method: task.entry(method) for method in methods}


class _Compression:
    """What the methods of one layer at one width share."""

    def __init__(
        self,
        module: AnyLayer,
        layer: Layer,
        seen: LayerStatistics,
        columns: Tensor | None,
        rows: Tensor | None,
        in_width: int,
        observer: Observer,
    ) -> None:
        self.layer, self.seen, self.in_width, self.observer = layer, seen, in_width, observer
        self.taps = layer.kernel[0] * layer.kernel[1]
        self.module = module
        self.pruned = columns is not None
        self.channels = torch.arange(layer.in_channels) if columns is None else columns
        self.columns = spread(self.channels, self.taps)
        self.weight = module.weight.detach().double().flatten(1)
        self.kept = torch.arange(layer.out_channels) if rows is None else rows  # of a grouped convolution
        if layer.conv_groups > 1:
            self.small = self.weight[self.kept] if self.pruned else self.weight
        elif self.pruned:
            self.small = least_squares(self.weight, seen.covariance, self.columns)
        else:
            self.small = self.weight

    def entry(self, method: Method) -> Entry:
        if method.ranks:
            return self._factorised(method)
        small = self.small.float()
        shape = (len(small), -1, *self.layer.kernel) if self.layer.kind != "linear" else small.shape
        if method.precision == "fp32":
            part = Part(small.reshape(shape), self._bias(self.small, None))
            return Entry(self.layer.name, self.in_width, method, (part,), self._error(self.small))
        integers, weight_scale = quantise_weight(small)
        effective = integers.double() * weight_scale.double()[:, None]
        sample = self.seen.sample[:, self.columns]
        low, high = float(self.seen.low[self.channels].min()), float(self.seen.high[self.channels].max())
        inv_xs, zp = self._range(sample, low, high)
        shift, noise = _noise(sample, inv_xs, zp)
        bias = self._bias(effective, shift)
        bias = torch.zeros(len(small)) if bias is None else bias
        part = Part(integers.reshape(shape), bias, (weight_scale.double() / inv_xs).float(), inv_xs, zp)
        error = self._error(effective) + self._fisher() * self._through(effective.square(), noise)
        return Entry(self.layer.name, self.in_width, method, (part,), error)

    def _factorised(self, method: Method) -> Entry:
        covariance = self.seen.covariance[self.columns][:, self.columns]
        fisher = self.seen.fisher
        if len(method.ranks) == 1:
            factors = svd(self.small, covariance, fisher, method.ranks[0])
        else:
            factors = tucker2(self.small, covariance, fisher, self.taps, (method.ranks[0], method.ranks[1]))
        error = torch.zeros(len(self.small), dtype=torch.float64)
        parts = [Part(factor.float()) for factor in factors.parts]
        if method.precision == "w8a8":
            parts, factors, error = self._quantised_factors(factors)
        product = factors.product
        bias = self._bias(product, None)
        if bias is not None:
            parts[-1] = replace(parts[-1], bias=bias)
        shaped = tuple(replace(part, weight=self._kernel(part.weight)) for part in parts)
        return Entry(self.layer.name, self.in_width, method, shaped, error + self._error(product))

    def _quantised_factors(self, factors: Factors) -> tuple[list[Part], Factors, Tensor]:
        """Return int8 parts, the factors they amount to, and the error that rounding the activations between causes."""
        features = self.seen.sample[:, self.columns]
        low, high = float(self.seen.low[self.channels].min()), float(self.seen.high[self.channels].max())
        parts, effective, noises = [], [], []
        for index, factor in enumerate(factors.parts):
            inv_xs, zp = self._range(features, low, high)
            noises.append(_noise(features, inv_xs, zp)[1])
            integers, weight_scale = quantise_weight(factor.float())
            parts.append(
                Part(integers, torch.zeros(len(integers)), (weight_scale.double() / inv_xs).float(), inv_xs, zp)
            )
            effective.append(integers.double() * weight_scale.double().view(-1, *([1] * (factor.dim() - 1))))
            features = self._apply(features, effective[-1].float(), index, len(factors.parts))
            low, high = float(features.min()), float(features.max())
        applied = Factors(tuple(effective))
        error = sum(applied.after(stage).square() @ noise for stage, noise in enumerate(noises))
        return parts, applied, self._fisher() * error

    def _kernel(self, weight: Tensor) -> Tensor:
        """Give a factor the shape its module takes."""
        if self.layer.kind == "linear":
            return weight
        if weight.dim() == 3:
            return weight.reshape(*weight.shape[:2], *self.layer.kernel)
        return weight[:, :, None, None]

    def _apply(self, features: Tensor, factor: Tensor, index: int, count: int) -> Tensor:
        """Apply a factor to rows of features; the first of three works on each tap for itself."""
        if count == 3 and index == 0:
            return torch.einsum("rct,bc->rbt", features.view(len(features), -1, self.taps), factor).flatten(1)
        return features @ factor.flatten(1).T

    def _range(self, sample: Tensor, low: float, high: float) -> tuple[float, int]:
        values = sample.flatten()
        return activation_parameters(*observe(values[:: max(1, len(values) // OBSERVED)], low, high, self.observer))

    def _fisher(self) -> Tensor:
        return self.seen.fisher[self.kept] if self.layer.conv_groups > 1 else self.seen.fisher

    def _error(self, effective: Tensor) -> Tensor:
        """Return the weighted output error of the matrix that is really applied."""
        if self.layer.kind == "depthwise":
            difference = self.weight[self.kept] - effective
            error = torch.einsum("ci,cij,cj->c", difference, self.seen.covariance[self.kept], difference)
            return self._fisher() * error.clamp_min(0.0)
        if self.layer.conv_groups > 1:
            difference = self._ungrouped(self.weight[self.kept] - effective)
            covariance = self.seen.covariance[self.columns][:, self.columns]
            return self._fisher() * output_error(difference, covariance)
        difference = self.weight.clone()
        if self.pruned:
            difference[:, self.columns] -= effective
        else:
            difference -= effective
        return self._fisher() * output_error(difference, self.seen.covariance)

    def _ungrouped(self, matrix: Tensor) -> Tensor:
        """Write the rows of a grouped convolution out over all input channels."""
        groups = self.layer.conv_groups
        if groups == 1:
            return matrix
        return torch.block_diag(*matrix.split(self.layer.out_channels // groups))

    def _through(self, squares: Tensor, noise: Tensor) -> Tensor:
        """Return the output variance that independent noise [K] of the inputs causes."""
        if self.layer.kind == "depthwise":
            return (squares * noise.view(len(squares), -1)).sum(1)
        return self._ungrouped(squares) @ noise

    def _bias(self, effective: Tensor, shift: Tensor | None) -> Tensor | None:
        """Return the bias with the mean output restored; a BatchNorm that is re-estimated does that by itself."""
        bias = self.module.bias
        if bias is not None and self.layer.conv_groups > 1:
            bias = bias[self.kept]
        if self.layer.norm is not None or (not self.pruned and effective is self.weight):
            return None if bias is None else bias.detach().clone()
        mean = self.seen.mean
        if self.layer.kind == "depthwise":
            by_channel = mean.view(-1, self.taps)[self.kept]
            lost = ((self.weight[self.kept] - effective) * by_channel).sum(1)
            if shift is not None:
                lost = lost - (effective * shift.view_as(by_channel)).sum(1)
        else:
            if self.layer.conv_groups > 1:
                lost = self._ungrouped(self.weight[self.kept] - effective) @ mean[self.columns]
            else:
                lost = self.weight @ mean - effective @ mean[self.columns]
            if shift is not None:
                lost = lost - self._ungrouped(effective) @ shift
        return (lost if bias is None else lost + bias.detach().double()).float()


def _noise(sample: Tensor, inv_xs: float, zp: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance [K] of what quantisation adds to each column of the sample, float64."""
    added = (quantise_centred(sample, inv_xs, zp) / inv_xs - sample).double()
    return added.mean(0), added.var(0, correction=0)


def pack(entries: Mapping[Method, Entry]) -> dict[str, object]:
    """Return entries of one layer and width as plain tensors and numbers, for a file."""
    return {
        str(method): {
            "error": entry.error,
            "parts": [
                {"weight": p.weight, "bias": p.bias, "scale": p.scale, "inv_xs": p.inv_xs, "zp": p.zp}
                for p in entry.parts
            ],
        }
        for method, entry in entries.items()
    }


def unpack(layer: str, in_width: int, data: Mapping[str, dict]) -> dict[Method, Entry]:
    """Read what `pack` wrote; KeyError, TypeError or ValueError if it is anything else."""
    entries = {}
    for text, fields in data.items():
        parts = tuple(Part(**part) for part in fields["parts"])
        entries[Method.parse(text)] = Entry(layer, in_width, Method.parse(text), parts, fields["error"])
    return entries
