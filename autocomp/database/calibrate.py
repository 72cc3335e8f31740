"""One pass over the calibration data: what every layer sees, how much its outputs matter, what the model answers."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.compress.hessian import WIDE
from autocomp.errors import UsageError, last_line
from autocomp.graph.batches import Axes, Batch, count, first, part, shape_of, split
from autocomp.layers.hooks import hooked
from autocomp.tasks.divergence import Comparison, compare
from autocomp.tasks.guess import describe
from autocomp.tasks.outputs import Output, Stated

if TYPE_CHECKING:
    from autocomp.graph.graph import Graph, Layer
    from autocomp.tasks.task import Task

# Chosen by hand, not measured. What they leave of memory, `benchmarks/memory.py` holds against a limit.
ROWS = 8192  # positions a layer at most whose inputs enter H
SAMPLE = 512  # of them kept as they are, for the ranges of activations
DRAWS = 4  # answers drawn for each sample's Fisher gradients
BATCH = 64  # samples a pass with gradients at most
ACTIVATIONS = 2**29  # bytes that a pass keeps at most, gradients included: larger models take fewer samples at once


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer sees. A row is all inputs of one output position: K = input columns x taps of the kernel.

    ``mean`` [K] and ``covariance`` of rows, [K, K], in blocks or a diagonal as `compress.hessian` has them, float64: the
    Hessian of the squared output error once the bias has been corrected for the mean. ``fisher`` [O] float64 is half
    the Fisher information of an output channel, summed over positions: ``sum_o fisher[o] * dW_o covariance dW_o^T``
    estimates the divergence that a change dW of the weights causes: low by a factor where errors at
    many positions push the same way, but it ranks well. ``sample`` [S, K] float32 are some rows; ``low`` and ``high``
    [columns] the extremes of each input column.
    """

    mean: Tensor
    covariance: Tensor
    fisher: Tensor
    sample: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Statistics:
    """Calibration of a model: per-layer statistics, the batches they come from, and the model's answers to these.

    ``batches`` are input tuples whose samples lie along ``axes``; ``answers`` are, for each of them, the rows of each output that
    ``comparison`` compares. ``fingerprint`` names model, data, outputs and seed by content.
    """

    layers: Mapping[str, LayerStatistics]
    batches: tuple[Batch, ...]
    axes: Axes | None
    comparison: Comparison
    answers: tuple[tuple[Tensor, ...], ...]
    fingerprint: str

    @property
    def samples(self) -> int:
        return sum(count(batch, self.axes) for batch in self.batches)


def collect(task: Task, graph: Graph, samples: int = 256, seed: int = 0) -> Statistics:
    """Run the task's model over ``samples`` calibration samples and return its statistics.

    UsageError names the layer where a value that is not finite first appears, or says that there are no samples.
    """
    return collect_from(task.model, task.calibration, graph, samples, seed, task.batch_axes, task.outputs)


def collect_from(
    model: nn.Module,
    calibration: Sequence[Batch],
    graph: Graph,
    samples: int = 256,
    seed: int = 0,
    axes: Axes | None = None,
    stated: Stated | None = None,
) -> Statistics:
    """Do as `collect` does, for a bare model and its calibration batches; ``axes`` and ``stated`` as ``Task.batch_axes`` and ``.outputs``."""
    batches = first(calibration, samples, axes)
    total = sum(count(batch, axes) for batch in batches)
    if total == 0:
        raise UsageError("calibration needs at least one sample; the task gave none")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    size = _pass_size(model, batches, graph, axes)
    outputs = describe(model, batches, axes, stated)
    with torch.no_grad():
        pieces = (piece for batch in batches for piece in split(batch, size, axes))
        comparison, kept = compare(outputs, ((model(*piece), count(piece, axes)) for piece in pieces), total)
    collectors = {name: _Collector(layer, generator) for name, layer in graph.layers.items()}
    handles = []
    for name, collector in collectors.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(collector.see_input))
        handles.append(module.register_forward_hook(collector.see_output))
    with hooked(handles):
        for batch in batches:
            for piece in split(batch, size, axes):
                here = count(piece, axes)
                for collector in collectors.values():
                    collector.share = here / total
                with torch.enable_grad():
                    rows = comparison.rows(model(*piece), here)
                    for output, values in zip(comparison.counted, rows, strict=True):
                        _refuse_non_finite(values, f"the model's output {output.name!r}")
                    _add_fisher(comparison, rows, [c for c in collectors.values() if c.output is not None], generator)
    layers = {name: collectors.pop(name).finish(total) for name in graph.layers}
    _weigh_unread(layers)
    fingerprint = _fingerprint(model, batches, samples, seed, outputs)
    return Statistics(layers, batches, axes, comparison, _joined(batches, kept, size, axes), fingerprint)


def _joined(
    batches: Sequence[Batch], kept: list[list[Tensor]], size: int, axes: Axes | None
) -> tuple[tuple[Tensor, ...], ...]:
    """The rows of each batch, from those of its parts."""
    joined = []
    for batch in batches:
        parts = [kept.pop(0) for _ in split(batch, size, axes)]
        joined.append(tuple(torch.cat(rows) for rows in zip(*parts, strict=True)))
    return tuple(joined)


def _pass_size(model: nn.Module, batches: Sequence[tuple[Tensor, ...]], graph: Graph, axes: Axes | None = None) -> int:
    """How many samples go through at once so that what is kept of them stays within `ACTIVATIONS`.

    Kept are what autograd saves, every layer's output, and the gradients of all these outputs.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def track(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs.append(output.nbytes)
        return (output if output.requires_grad else output.requires_grad_()).clone()

    outputs: list[int] = []
    with hooked(model.get_submodule(name).register_forward_hook(track) for name in graph.layers):
        most = 0
        for batch in {shape_of(batch, axes): batch for batch in batches}.values():
            kept.clear()
            outputs.clear()
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                try:
                    _output = model(*part(batch, 0, 1, axes))  # alive until what it keeps is counted
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    shapes = " and ".join(str(list(tensor.shape)) for tensor in batch)
                    raise UsageError(
                        f"Task.calibration: the model cannot be called with a batch of shape {shapes}: {last_line(error)}"
                    ) from error
            most = max(most, sum(kept.values()) + 2 * sum(outputs))
            del _output
    return max(1, min(BATCH, ACTIVATIONS // max(1, most)))


def _add_fisher(
    comparison: Comparison, rows: Sequence[Tensor], collectors: Sequence[_Collector], generator: torch.Generator
) -> None:
    """Add squared gradients behind random draws of the outputs' own divergence: samples do not mix in evaluation mode."""
    outputs = [collector.output for collector in collectors if collector.output is not None]
    live = [k for k, values in enumerate(rows) if values.requires_grad]
    for draw in range(DRAWS if live and outputs else 0):
        drawn = comparison.draws(rows, generator)
        gradients = torch.autograd.grad(
            [rows[k] for k in live], outputs, [drawn[k] for k in live], draw + 1 < DRAWS, allow_unused=True
        )
        for collector, gradient in zip(collectors, gradients, strict=True):
            if gradient is not None:
                collector.see_gradient(gradient)
    for collector in collectors:
        collector.output = None


def _weigh_unread(layers: dict[str, LayerStatistics]) -> None:
    """Give layers that no compared output depends on by a gradient the typical weight: they are not known to be free."""
    known = [float(seen.fisher.mean()) for seen in layers.values() if float(seen.fisher.sum()) > 0]
    typical = sorted(known)[len(known) // 2] if known else 1.0
    for name, seen in layers.items():
        if float(seen.fisher.sum()) == 0:
            layers[name] = replace(seen, fisher=torch.full_like(seen.fisher, typical))


class _Collector:
    """Hooks of one layer, and what they add up."""

    def __init__(self, layer: Layer, generator: torch.Generator) -> None:
        self.layer, self.generator = layer, generator
        self.share = 1.0  # of all samples, that the pass under way has
        groups, columns, full = layer.conv_groups, layer.columns, layer.in_channels * layer.taps
        alone, blocks = (full,), (groups, columns, columns) if groups > 1 else (full, full)
        shape = alone if groups == 1 and columns > WIDE else blocks
        self.rows = 0
        self.shift: Tensor | None = None
        self.sum = torch.zeros(full, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)
        self.fisher = torch.zeros(layer.out_channels, dtype=torch.float64)
        self.low = torch.full((layer.in_channels,), torch.inf)
        self.high = torch.full((layer.in_channels,), -torch.inf)
        self.sample: list[Tensor] = []
        self.output: Tensor | None = None

    def see_input(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach()
        _refuse_non_finite(x, f"the input of layer {self.layer.name}")
        axes = _positions(x, self.layer)
        self.low = torch.minimum(self.low, x.amin(axes))
        self.high = torch.maximum(self.high, x.amax(axes))
        rows = patches(x, self.layer, max(1, round(ROWS * self.share)), self.generator)
        self.sample.append(rows[: max(1, round(SAMPLE * self.share))].clone())  # a slice would keep all rows in memory
        if self.shift is None:
            # Sums of products about a point near the mean: about zero, what is left of an input that hardly varies is rounding.
            self.shift = rows.mean(0)
        self.rows += len(rows)
        rows = rows - self.shift
        self.sum += rows.sum(0, dtype=torch.float64)
        if self.squares.dim() == 1:
            self.squares += rows.square().sum(0, dtype=torch.float64)
        elif self.squares.dim() == 3:
            blocks = rows.view(len(rows), self.layer.conv_groups, -1)
            self.squares += torch.einsum("rci,rcj->cij", blocks, blocks)
        else:
            self.squares += rows.T @ rows

    def see_output(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        _refuse_non_finite(output, f"layer {self.layer.name}")
        self.output = output if output.requires_grad else output.requires_grad_()
        return output.clone()  # what follows may work in place

    def see_gradient(self, gradient: Tensor) -> None:
        axes = _positions(gradient, self.layer)
        self.fisher += gradient.square().sum(axes, dtype=torch.float64) / DRAWS

    def finish(self, samples: int) -> LayerStatistics:
        offset = self.sum / max(1, self.rows)
        mean = offset if self.shift is None else self.shift.double() + offset
        covariance = self.squares.div_(max(1, self.rows))  # in place: these are the largest tensors of all
        if covariance.dim() == 1:
            covariance.sub_(offset.square()).clamp_min_(0.0)
        elif covariance.dim() == 3:
            by_group = offset.view(self.layer.conv_groups, -1)
            covariance -= by_group[:, :, None] * by_group[:, None, :]
        else:
            covariance.addr_(offset, offset, alpha=-1)
        fisher = 0.5 * self.fisher / samples
        # A floor keeps channels whose gradients happened to vanish from counting as free.
        fisher = fisher.clamp_min(1e-3 * float(fisher.mean()))
        return LayerStatistics(mean, covariance, fisher, torch.cat(self.sample), self.low, self.high)


def _positions(x: Tensor, layer: Layer) -> tuple[int, ...]:
    """The axes of a layer's input or output that are not its channels."""
    channels = x.dim() - 1 if layer.kind == "linear" else 1
    return tuple(axis for axis in range(x.dim()) if axis != channels)


def patches(x: Tensor, layer: Layer, limit: int, generator: torch.Generator) -> Tensor:
    """Return the inputs of ``limit`` random output positions as rows [R, K], columns as in ``weight.flatten(1)``.

    All positions, in order, if there are no more; R of a layer never seen is 0.
    """
    if layer.kind == "linear":
        rows = x.reshape(-1, x.shape[-1])
        return rows if len(rows) <= limit else rows[torch.randperm(len(rows), generator=generator)[:limit]]
    x = x.unsqueeze(2) if layer.one_d else x
    stride, spread = layer.stride, _plain if layer.output_padding is None else _zeros_between
    padded = spread(x, layer)
    if layer.output_padding is not None:
        stride = (1,) * len(stride)
    axes = list(zip(padded.shape[2:], layer.kernel, stride, layer.dilation, strict=True))
    sizes = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in axes]
    count = len(x) * math.prod(sizes)
    chosen = torch.arange(count) if count <= limit else torch.randperm(count, generator=generator)[:limit]
    image, *starts = torch.unravel_index(chosen, (len(x), *sizes))
    by_place = padded.movedim(1, -1)
    taps = []
    for tap in itertools.product(*(range(k) for k in layer.kernel)):
        if layer.output_padding is not None:  # the last tap meets the first input
            tap = tuple(k - 1 - t for k, t in zip(layer.kernel, tap, strict=True))
        at = [first * s + t * d for first, t, (_, _, s, d) in zip(starts, tap, axes, strict=True)]
        taps.append(by_place[(image, *at)])
    return torch.stack(taps, dim=2).flatten(1)


def _plain(x: Tensor, layer: Layer) -> Tensor:
    return functional.pad(x, [side for p in reversed(layer.padding) for side in (p, p)])


def _zeros_between(x: Tensor, layer: Layer) -> Tensor:
    """The input that a transposed convolution convolves, with its kernel turned around, by steps of one."""
    assert layer.output_padding is not None
    sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in layer.stride))] = x
    axes = zip(layer.kernel, layer.padding, layer.dilation, layer.output_padding, strict=True)
    around = [(d * (k - 1) - p, d * (k - 1) - p + more) for k, p, d, more in axes]  # below zero: cut off
    return functional.pad(wide, [side for pair in reversed(around) for side in pair])


def _refuse_non_finite(tensor: Tensor, where: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise UsageError(
            f"{where} is not finite on the calibration data: check its weights and the range of the inputs"
        )


def _fingerprint(model: nn.Module, batches: Sequence[Batch], samples: int, seed: int, outputs: Sequence[Output]) -> str:
    compared = [(str(output), output.samples) for output in outputs]
    digest = hashlib.sha256(f"3 {samples} {seed} {ROWS} {SAMPLE} {DRAWS} {compared}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    for batch in batches:
        for tensor in batch:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
