"""One pass over the calibration data: what every layer sees, how much its outputs matter, what the model answers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.errors import UsageError

if TYPE_CHECKING:
    from autocomp.graph import Graph, Layer
    from autocomp.task import Task

ROWS = 8192  # positions a layer at most whose inputs enter H
SAMPLE = 512  # of them kept as they are, for the ranges of activations
DRAWS = 4  # answers drawn for each sample's Fisher gradients
BATCH = 64  # samples a pass with gradients at most
ACTIVATIONS = 2**29  # bytes that a pass keeps at most, gradients included: larger models take fewer samples at once


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer sees. A row is all inputs of one output position: K = input columns x kernel height x width.

    ``mean`` [K] and ``covariance`` [K, K] (depthwise: [C, k, k], a block for each channel) of rows, float64: the
    Hessian of the squared output error once the bias has been corrected for the mean. ``fisher`` [O] float64 is half
    the Fisher information of an output channel, summed over positions: ``sum_o fisher[o] * dW_o covariance dW_o^T``
    estimates the divergence that a change dW of the weights causes, in nats a sample: low by a factor where errors at
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
    """Calibration of a model: per-layer statistics, the batches they come from, and the model's logits on these.

    ``batches`` are input tuples, ``logits`` [N, classes] float32 in their order. ``fingerprint`` names model, data and
    seed by content.
    """

    layers: Mapping[str, LayerStatistics]
    batches: tuple[tuple[Tensor, ...], ...]
    logits: Tensor
    fingerprint: str


def collect(task: Task, graph: Graph, samples: int = 256, seed: int = 0) -> Statistics:
    """Run the task's model over ``samples`` calibration samples and return its statistics.

    UsageError names the layer where a value that is not finite first appears, or says that there are no samples.
    """
    return collect_from(task.model, task.calibration, graph, samples, seed)


def collect_from(
    model: nn.Module, calibration: Sequence[tuple[Tensor, ...]], graph: Graph, samples: int = 256, seed: int = 0
) -> Statistics:
    """Do as `collect` does, for a bare model and its calibration batches."""
    batches = _cut(calibration, samples)
    total = sum(len(batch[0]) for batch in batches)
    if total == 0:
        raise UsageError("calibration needs at least one sample; the task gave none")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    size = _pass_size(model, batches, graph)
    collectors = {name: _Collector(layer, total, generator) for name, layer in graph.layers.items()}
    handles = []
    for name, collector in collectors.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(collector.see_input))
        handles.append(module.register_forward_hook(collector.see_output))
    logits = []
    for batch in batches:
        for part in zip(*(tensor.split(size) for tensor in batch), strict=True):
            with torch.enable_grad():
                output = logits_of(model(*part))
                _refuse_non_finite(output, "the model's output")
                _add_fisher(output, [c for c in collectors.values() if c.output is not None], generator)
            logits.append(output.detach())
    for handle in handles:
        handle.remove()
    layers = {name: collectors.pop(name).finish(total) for name in graph.layers}
    return Statistics(layers, batches, torch.cat(logits).float(), _fingerprint(model, batches, samples, seed))


def logits_of(output: Any) -> Tensor:
    """Return the first tensor of a model's output as [rows, classes]: the last axis is taken for the classes."""
    from torch.utils import _pytree

    tensor = next(leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[:, None]


def _cut(calibration: Sequence[tuple[Tensor, ...]], samples: int) -> tuple[tuple[Tensor, ...], ...]:
    """Take the first samples; batches of one shape become one, which later passes are faster for."""
    taken: list[tuple[Tensor, ...]] = []
    left = samples
    for batch in calibration:
        if left <= 0:
            break
        part = tuple(tensor[:left].detach() for tensor in batch)
        left -= len(part[0])
        taken.append(part)
    if len({tuple(tensor.shape[1:] for tensor in batch) for batch in taken}) == 1:
        return (tuple(torch.cat(tensors) for tensors in zip(*taken, strict=True)),)
    return tuple(taken)


def _pass_size(model: nn.Module, batches: Sequence[tuple[Tensor, ...]], graph: Graph) -> int:
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
    handles = [model.get_submodule(name).register_forward_hook(track) for name in graph.layers]
    try:
        most = 0
        for batch in {tuple(tensor.shape[1:] for tensor in batch): batch for batch in batches}.values():
            kept.clear()
            outputs.clear()
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                _output = model(*(tensor[:1] for tensor in batch))  # alive until what it keeps is counted
            most = max(most, sum(kept.values()) + 2 * sum(outputs))
            del _output
    finally:
        for handle in handles:
            handle.remove()
    return max(1, min(BATCH, ACTIVATIONS // max(1, most)))


def _add_fisher(output: Tensor, collectors: Sequence[_Collector], generator: torch.Generator) -> None:
    """Add squared gradients of -log p(y|x), y drawn from the model's own p: samples do not mix in evaluation mode."""
    if not collectors:
        return
    log_p = functional.log_softmax(output.float(), dim=-1)
    outputs = [collector.output for collector in collectors if collector.output is not None]
    for draw in range(DRAWS):
        answers = torch.multinomial(log_p.detach().exp(), 1, generator=generator)[:, 0]
        loss = functional.nll_loss(log_p, answers, reduction="sum")
        gradients = torch.autograd.grad(loss, outputs, retain_graph=draw + 1 < DRAWS, allow_unused=True)
        for collector, gradient in zip(collectors, gradients, strict=True):
            if gradient is not None:
                collector.see_gradient(gradient)
    for collector in collectors:
        collector.output = None


class _Collector:
    """Hooks of one layer, and what they add up."""

    def __init__(self, layer: Layer, samples: int, generator: torch.Generator) -> None:
        self.layer, self.samples, self.generator = layer, samples, generator
        self.depthwise = layer.kind == "depthwise"
        taps = layer.kernel[0] * layer.kernel[1]
        self.full = layer.in_channels * taps
        blocks = (layer.in_channels, taps, taps) if self.depthwise else (self.full, self.full)
        self.rows = 0
        self.shift: Tensor | None = None
        self.sum = torch.zeros(self.full, dtype=torch.float64)
        self.squares = torch.zeros(blocks, dtype=torch.float64)
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
        share = len(x) / self.samples
        rows = patches(x, self.layer, max(1, round(ROWS * share)), self.generator)
        self.sample.append(rows[: max(1, round(SAMPLE * share))].clone())  # a slice would keep all rows in memory
        if self.shift is None:
            # Sums of products about a point near the mean: about zero, what is left of an input that hardly varies is rounding.
            self.shift = rows.mean(0)
        self.rows += len(rows)
        rows = rows - self.shift
        self.sum += rows.sum(0, dtype=torch.float64)
        if self.depthwise:
            blocks = rows.view(len(rows), self.layer.in_channels, -1)
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
        if self.depthwise:
            by_channel = offset.view(self.layer.in_channels, -1)
            covariance -= by_channel[:, :, None] * by_channel[:, None, :]
        else:
            covariance.addr_(offset, offset, alpha=-1)
        fisher = 0.5 * self.fisher / samples
        # A floor keeps channels whose gradients happened to vanish from counting as free.
        fisher = fisher.clamp_min(1e-3 * float(fisher.mean())) if float(fisher.sum()) > 0 else torch.ones_like(fisher)
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
    (ph, pw), (sh, sw), (dh, dw), (kh, kw) = layer.padding, layer.stride, layer.dilation, layer.kernel
    padded = functional.pad(x, (pw, pw, ph, ph))
    oh = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    ow = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    count = len(x) * oh * ow
    chosen = torch.arange(count) if count <= limit else torch.randperm(count, generator=generator)[:limit]
    image, place = chosen // (oh * ow), chosen % (oh * ow)
    top, left = place // ow * sh, place % ow * sw
    by_pixel = padded.permute(0, 2, 3, 1)
    taps = [by_pixel[image, top + i * dh, left + j * dw] for i in range(kh) for j in range(kw)]
    return torch.stack(taps, dim=2).flatten(1)


def _refuse_non_finite(tensor: Tensor, where: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise UsageError(
            f"{where} is not finite on the calibration data: check its weights and the range of the inputs"
        )


def _fingerprint(model: nn.Module, batches: Sequence[tuple[Tensor, ...]], samples: int, seed: int) -> str:
    digest = hashlib.sha256(f"2 {samples} {seed} {ROWS} {SAMPLE} {DRAWS}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    for batch in batches:
        for tensor in batch:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
