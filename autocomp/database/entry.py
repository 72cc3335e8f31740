"""One layer compressed in one way: computed from calibration statistics, turned into modules when it is wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autocomp.compress.hessian import chosen, times
from autocomp.compress.lowrank import Factors, Whitened
from autocomp.compress.prune import least_squares, spread
from autocomp.compress.rounding import Metric
from autocomp.compress.scales import observe
from autocomp.database.parts import part_module, whole_part
from autocomp.database.store import Inputs, Stored, store
from autocomp.graph.shapes import factor_shapes
from autocomp.layers.convolution import AnyLayer, Layers, outputs_first
from autocomp.layers.narrow import with_weights
from autocomp.layers.part import Part
from autocomp.layers.w8a8 import Observer
from autocomp.records.candidate import Method
from autocomp.records.precisions import FORMATS, FP32, Precision

if TYPE_CHECKING:
    from autocomp.database.calibrate import LayerStatistics
    from autocomp.graph.graph import Layer

OBSERVED = 1 << 15  # values a range is chosen from: enough for a percentile of 0.05 % at each side


@dataclass(frozen=True)
class Entry:
    """A layer at one input width by one method, with all its output rows: slicing rows commutes with compressing.

    ``parts`` are one module, or the factors in order. ``error`` [O] is Fisher times dW_o H dW_o^T for each output
    (nats a sample; where activations are rounded too, their noise is in it). A grouped convolution's entry, depthwise
    or not, has the rows of the kept groups only. It is infinite where a precision does not hold the weights at all.
    """

    layer: str
    in_width: int
    method: Method
    parts: tuple[Part, ...]
    error: Tensor

    def __post_init__(self) -> None:
        if bool(self.error.isnan().any()):  # of infinite weights
            object.__setattr__(self, "error", self.error.masked_fill(self.error.isnan(), math.inf))

    def constant(self, rows: Tensor | None = None) -> Tensor:
        """What a layer gives, by output channel, that keeps no inputs."""
        bias = self.parts[0].bias
        assert bias is not None
        return bias if rows is None else bias[rows]

    def module(self, layer: Layer, original: nn.Module, rows: Tensor | None = None) -> nn.Module:
        """Return the module that computes the layer, with the output channels ``rows`` (None: all)."""
        if len(self.parts) == 1 and self.method.precision == FP32:
            part = self.parts[0].rows(None if layer.conv_groups > 1 else rows)
            assert isinstance(original, Layers)
            return with_weights(original, part.weight, part.bias)
        shapes = factor_shapes(layer, self.method.ranks) if self.method.ranks else [layer]
        modules = []
        for shape, part in zip(shapes, self.parts, strict=True):
            last = shape is shapes[-1] and layer.conv_groups == 1
            modules.append(part_module(shape, part.rows(rows if last else None)))
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def compress_layer(
    module: nn.Module,
    layer: Layer,
    seen: LayerStatistics,
    columns: Tensor | None,
    in_width: int,
    methods: Sequence[Method],
    observer: Observer = "mse",
    rows: Tensor | None = None,
    update: bool = True,
) -> dict[Method, Entry]:
    """Compress one layer at one input width by several methods; without ``update`` the weights that stay are left as they are.

    ``columns`` are the input columns (channels of a convolution) that are kept, None for all; of a grouped convolution,
    which loses whole groups, ``rows`` are the output channels that stay with them.
    """
    assert isinstance(module, Layers)
    if columns is not None and not len(columns):
        return {Method(): _constant(module, layer, seen, rows)}
    task = _Compression(module, layer, seen, columns, rows, in_width, observer, update)
    return {method: task.entry(method) for method in methods}


def _constant(module: AnyLayer, layer: Layer, seen: LayerStatistics, rows: Tensor | None) -> Entry:
    """A layer without inputs: its mean output, before any BatchNorm. The error is what its output varies by."""
    weight = outputs_first(module).detach().double().flatten(1)
    if layer.conv_groups > 1:  # goes with its channels, whole
        assert rows is not None
        part, error = replace(whole_part(weight[rows]), bias=weight.new_zeros(0).float()), seen.fisher[rows]
    else:
        mean = weight @ seen.mean
        mean = mean if module.bias is None else mean + module.bias.detach().double()
        part = replace(whole_part(weight[:, :0]), bias=mean.float())
        error = seen.fisher * (times(weight, seen.covariance) * weight).sum(1).clamp_min(0.0)
    return Entry(layer.name, 0, Method(), (part,), error)


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
        update: bool,
    ) -> None:
        self.layer, self.seen, self.in_width, self.observer = layer, seen, in_width, observer
        self.taps = layer.taps
        self.module = module
        self.pruned = columns is not None
        self.channels = torch.arange(layer.in_channels) if columns is None else columns
        self.columns = spread(self.channels, self.taps)
        self.weight = outputs_first(module).detach().double().flatten(1)
        self.kept = torch.arange(layer.out_channels) if rows is None else rows  # of a grouped convolution
        self.fisher = seen.fisher
        if layer.conv_groups > 1:
            self.small = self.weight[self.kept] if self.pruned else self.weight
            self.fisher = seen.fisher[self.kept]
        elif self.pruned:
            covariance = seen.covariance
            self.small = (
                least_squares(self.weight, covariance, self.columns) if update else self.weight[:, self.columns]
            )
        else:
            self.small = self.weight

    def entry(self, method: Method) -> Entry:
        if method.ranks:
            return self._factorised(method)
        linear = self.layer.kind == "linear"
        if method.precision == FP32:
            stored = Stored(whole_part(self.small), self.small)
        else:
            stored = store(self.small, method.precision, self.inputs, self.fisher, linear)
        part = replace(stored.part, weight=_kernel(stored.part, self.layer))
        bias = self._bias(stored.effective, stored.shift)
        if bias is None and method.precision != FP32:
            bias = torch.zeros(len(self.small))
        error = self._error(stored.effective)
        if stored.noise is not None:
            error = error + self.fisher * self._through(stored.effective.square(), stored.noise)
        return Entry(self.layer.name, self.in_width, method, (replace(part, bias=bias),), error)

    @cached_property
    def inputs(self) -> Inputs:
        """What the whole layer multiplies, of the channels that are kept."""
        sample = self.seen.sample[:, self.columns]
        low, high = float(self.seen.low[self.channels].min()), float(self.seen.high[self.channels].max())
        return Inputs(sample, *self._range(sample, low, high), Metric(self._blocks))

    @cached_property
    def _blocks(self) -> Tensor:
        """The covariance of the columns that are kept, as `Metric` takes it."""
        covariance = self.seen.covariance
        if not self.pruned:
            return covariance
        if self.layer.conv_groups == 1:
            return chosen(covariance, self.columns)
        # whole groups are kept
        return covariance[(self.channels // (self.layer.in_channels // self.layer.conv_groups)).unique()]

    def _factorised(self, method: Method) -> Entry:
        factors = self._whitened.factors(method.ranks)
        error = torch.zeros(len(self.small), dtype=torch.float64)
        parts = [whole_part(factor.flatten(1)) for factor in factors.parts]
        if method.precision != FP32:
            parts, factors, error = self._stored_factors(factors, method.precision)
        product = factors.product
        bias = self._bias(product, None)
        if bias is not None:
            parts[-1] = replace(parts[-1], bias=bias)
        shapes = factor_shapes(self.layer, method.ranks)
        shaped = tuple(replace(part, weight=_kernel(part, shape)) for part, shape in zip(parts, shapes, strict=True))
        return Entry(self.layer.name, self.in_width, method, shaped, error + self._error(product))

    @cached_property
    def _whitened(self) -> Whitened:
        return Whitened(self.small, self._blocks, self.fisher, self.layer.kernel)

    def _stored_factors(self, factors: Factors, precision: Precision) -> tuple[list[Part], Factors, Tensor]:
        """Return the parts, the factors they amount to, and the error that rounding the activations between causes.

        Each factor is rounded for the inputs that the rounded ones before it give.
        """
        features, covariance = self.inputs.sample, self._blocks
        low, high = self.inputs.low, self.inputs.high
        parts, effective, noises = [], [], []
        for index, factor in enumerate(factors.parts):
            if index:
                low, high = self._range(features, float(features.min()), float(features.max()))
            own = factors.metric(index, covariance)
            sample = factors.rows(index, features)
            inputs = Inputs(sample, low, high, Metric(own))
            flat = factor.flatten(1)
            stored = store(
                flat, precision, inputs, torch.ones(len(flat), dtype=torch.float64), self.layer.kind == "linear"
            )
            noises.append(stored.noise)
            parts.append(replace(stored.part, bias=torch.zeros(len(flat))))
            effective.append(stored.effective.view_as(factor))
            features = factors.apply(index, features, effective[-1])
            covariance = factors.carry(index, covariance, effective[-1])
        applied = Factors(tuple(effective), factors.taps)
        error = torch.zeros(len(self.small), dtype=torch.float64)
        for index, noise in enumerate(noises):
            if noise is not None:
                error = error + applied.after(index).square() @ factors.spread(index, noise)
        return parts, applied, self.fisher * error

    def _range(self, sample: Tensor, low: float, high: float) -> tuple[float, float]:
        if not (math.isfinite(low) and math.isfinite(high)):
            return 0.0, 0.0  # a precision does not hold the factor before, as the error says
        values = sample.flatten()
        return observe(values[:: max(1, len(values) // OBSERVED)], low, high, self.observer)

    def _error(self, effective: Tensor) -> Tensor:
        """Return the weighted output error of the matrix that is really applied."""
        if self.layer.conv_groups > 1:
            return self.fisher * Metric(self._blocks).error(self.weight[self.kept] - effective)
        changed = self.small - effective
        # In float32, which is twice as fast: what is lost to its rounding is nothing against the change itself.
        error = (times(changed.float(), self._blocks.float()).double() * changed).sum(1)
        if self.pruned:
            lost, residual = self._pruning_alone
            error = error + lost + 2 * (residual * changed).sum(1)
        return self.fisher * error.clamp_min(0.0)

    @cached_property
    def _pruning_alone(self) -> tuple[Tensor, Tensor]:
        """With D the change of W by pruning: D H D^T of each output, and D H in the columns that are kept."""
        difference = self.weight.clone()
        difference[:, self.columns] -= self.small
        through = times(difference, self.seen.covariance)
        return (through * difference).sum(1), through[:, self.columns]

    def _through(self, rows: Tensor, values: Tensor) -> Tensor:
        """Multiply rows by values [K] of all the inputs that are kept; each row of a grouped convolution by those of its group."""
        if self.layer.conv_groups == 1:
            return rows @ values
        by_group = values.view(-1, rows.shape[1])
        result: Tensor = (rows.unflatten(0, (len(by_group), -1)) @ by_group[:, :, None]).flatten()
        return result

    def _bias(self, effective: Tensor, shift: Tensor | None) -> Tensor | None:
        """Return the bias with the mean output restored; a BatchNorm that is re-estimated does that by itself."""
        bias = self.module.bias
        if bias is not None and self.layer.conv_groups > 1:
            bias = bias[self.kept]
        if self.layer.norm is not None or (not self.pruned and effective is self.weight):
            return None if bias is None else bias.detach().clone()
        mean = self.seen.mean[self.columns]
        if self.layer.conv_groups > 1:
            lost = self._through(self.weight[self.kept] - effective, mean)
        else:
            lost = self.weight @ self.seen.mean - effective @ mean
        if shift is not None:
            lost = lost - self._through(effective, shift)
        return (lost if bias is None else lost + bias.detach().double()).float()


def _kernel(part: Part, shape: Layer) -> Tensor:
    """Give a flat weight the shape its module takes: levels and indices stay as they are."""
    if shape.kind == "linear" or FORMATS[part.precision].family.flat:
        return part.weight
    return part.weight.reshape(len(part.weight), -1, *shape.kernel)


def pack(entries: Mapping[Method, Entry]) -> dict[str, object]:
    """Return entries of one layer and width as plain tensors and numbers, for a file."""
    return {
        str(method): {"error": entry.error, "parts": [dict(vars(part)) for part in entry.parts]}
        for method, entry in entries.items()
    }


def unpack(layer: str, in_width: int, data: Mapping[str, dict[str, Any]]) -> dict[Method, Entry]:
    """Read what `pack` wrote; KeyError, TypeError or ValueError if it is anything else."""
    entries = {}
    for text, fields in data.items():
        parts = tuple(Part(**part) for part in fields["parts"])
        entries[Method.parse(text)] = Entry(layer, in_width, Method.parse(text), parts, fields["error"])
    return entries
