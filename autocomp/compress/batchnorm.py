"""BatchNorm statistics of a changed model, estimated anew: without them, what one reads of a pruned model says nothing."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.graph.batches import Axes, Batch, count, split
from autocomp.layers.hooks import hooked
from autocomp.layers.narrow import Norms

# Input elements of one pass at most that is made with all samples at once: 256 samples of 3 x 64 x 64.
ONE_PASS = 256 * 3 * 64 * 64
SAMPLES = 64  # of a pass at most, where all are more than that
MANY = 16  # samples a batch has at least that passes by itself, and values per channel that statistics are taken from


def reestimate_batchnorm(model: nn.Module, batches: Sequence[Batch], axes: Axes | None = None) -> list[Any] | None:
    """Replace the running statistics of every BatchNorm by those of ``batches``, in place; ``axes`` as ``Task.batch_axes``.

    Everything else stays in evaluation mode. Data small enough passes at once: each BatchNorm then sees what the
    re-estimated ones before it make, and the model's answer to each batch is returned: its own (but for N against N - 1
    in the variances). More is averaged over passes (None). Batches of few samples, which differ in their shapes, pass
    together: each waits at every BatchNorm for the others. A BatchNorm that finds fewer than `MANY` values per channel
    passes them with the statistics it has, and learns nothing from them.
    """
    norms = _tracking(model)
    if not norms:
        return None
    passes = _passes(batches, axes)
    momenta = [norm.momentum for norm in norms]
    averages = {norm: _Average() for norm in norms}
    answers: list[Any] = []
    try:
        for pieces in passes:
            answers = _alone(model, pieces[0], averages) if len(pieces) == 1 else _together(model, pieces, averages)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
    if len(passes) == 1:
        return answers
    for norm, average in averages.items():
        average.settle(norm)
    return None


def settled(model: nn.Module, batches: Sequence[Batch], axes: Axes | None = None) -> nn.Module:
    """A copy of ``model`` that computes the same, written with the statistics that each BatchNorm has of ``batches``; itself, if it has none.

    The statistics of training are of more data than calibration has. What weight and bias take over from them stays when
    `reestimate_batchnorm` replaces those of the calibration data: it then says what a change of the model moved, and nothing of how
    calibration and training data differ. Of a model that was not changed it changes nothing.
    """
    if not _tracking(model):
        return model
    model = copy.deepcopy(model).eval()
    averages = {norm: _Average() for norm in _tracking(model)}
    seen: dict[Any, list[_Moments]] = {norm: [] for norm in averages}
    handles = [norm.register_forward_pre_hook(lambda n, x: seen[n].append(_moments(x[0]))) for norm in averages]
    with hooked(handles), torch.no_grad():
        for pieces in _passes(batches, axes):
            for piece in pieces:
                model(*piece)
            for norm, found in seen.items():
                if (total := sum(values for values, _, _ in found)) >= MANY:
                    averages[norm].add(*_pooled(found), total)
                found.clear()
    for norm, average in averages.items():
        if average.values:
            _rewrite(norm, average)
    return model


def _tracking(model: nn.Module) -> list[Any]:
    """The BatchNorms that have statistics."""
    return [module for module in model.modules() if isinstance(module, Norms) and module.track_running_stats]


def _rewrite(norm: Any, average: _Average) -> None:
    """Take over other statistics; weight and bias follow, so that the function stays. If not finite they are left: calibrating says so."""
    found = torch.cat([torch.as_tensor(average.mean), torch.as_tensor(average.variance)])
    if not bool(torch.isfinite(found).all()):
        return
    weight = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight.detach()
    bias = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach()
    mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt() * weight.double()
    average.settle(norm)
    norm.weight = nn.Parameter((scale * (norm.running_var.double() + norm.eps).sqrt()).to(weight.dtype))
    norm.bias = nn.Parameter((bias.double() + scale * (norm.running_mean.double() - mean)).to(bias.dtype))
    norm.affine = True


def _passes(batches: Sequence[Batch], axes: Axes | None) -> list[list[Batch]]:
    """What goes through the model at once: one batch, or several of few samples."""
    if len(batches) == 1 and _size(batches[0]) <= ONE_PASS:
        return [list(batches)]
    pieces = [piece for batch in batches for piece in split(batch, SAMPLES, axes)]
    passes: list[list[Batch]] = []
    samples = size = 0
    for piece in pieces:
        if not passes or samples + count(piece, axes) > SAMPLES or size + _size(piece) > ONE_PASS:
            passes.append([])
            samples = size = 0
        passes[-1].append(piece)
        samples, size = samples + count(piece, axes), size + _size(piece)
    if len(passes) > 1 and samples < MANY:
        last = passes.pop()
        passes[-1] += last
    return passes


def _size(batch: Batch) -> int:
    return sum(tensor.numel() for tensor in batch)


class _Average:
    """The mean of a BatchNorm's statistics over passes, weighted by the values each saw."""

    def __init__(self) -> None:
        self.values = 0
        self.mean: Tensor | float = 0.0
        self.variance: Tensor | float = 0.0

    def add(self, mean: Tensor, variance: Tensor, values: int) -> None:
        self.values += values
        self.mean = self.mean + values * mean
        self.variance = self.variance + values * variance

    def settle(self, norm: Any) -> None:
        if self.values:
            norm.running_mean.copy_(self.mean / self.values)
            norm.running_var.copy_(self.variance / self.values)


def _values(x: Tensor) -> int:
    """How many values per channel a BatchNorm gets."""
    return x.numel() // x.shape[1]


_Moments = tuple[int, Tensor, Tensor]  # values per channel, their mean and their variance (of N, not N - 1)


def _moments(x: Tensor) -> _Moments:
    variance, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
    return _values(x), mean, variance


def _pooled(moments: Sequence[_Moments]) -> tuple[Tensor, Tensor]:
    """Mean and variance (of N - 1) of all values together."""
    total = sum(values for values, _, _ in moments)
    mean = sum((values * mean for values, mean, _ in moments), torch.zeros(())) / total
    squares = (values * (variance + (own - mean).square()) for values, own, variance in moments)
    return mean, sum(squares, torch.zeros(())) / (total - 1)


def _alone(model: nn.Module, batch: Batch, averages: dict[Any, _Average]) -> list[Any]:
    def before(norm: Any, arguments: tuple[Tensor, ...]) -> None:
        norm.train(_values(arguments[0]) >= MANY)
        norm.momentum = 1.0  # what it sees replaces what it had

    def after(norm: Any, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        if norm.training:
            averages[norm].add(norm.running_mean, norm.running_var, _values(arguments[0]))

    handles = [norm.register_forward_pre_hook(before) for norm in averages]
    handles += [norm.register_forward_hook(after) for norm in averages]
    with hooked(handles), torch.no_grad():
        return [model(*batch)]


def _together(model: nn.Module, batches: Sequence[Batch], averages: dict[Any, _Average]) -> list[Any]:
    """Run batches side by side, a thread each, that meet at every BatchNorm: there the statistics of all are taken."""
    place = threading.local()
    nothing: _Moments = (0, torch.zeros(()), torch.zeros(()))
    met: list[tuple[Any, _Moments]] = [(None, nothing)] * len(batches)
    answers: list[Any] = [None] * len(batches)
    errors: list[BaseException] = []
    threads_of_torch = torch.get_num_threads()

    def take() -> None:
        norm = met[0][0]
        if any(one[0] is not norm for one in met):
            raise RuntimeError("batches of different shapes do not go through the same layers of the model")
        if norm is None:
            return
        total = sum(values for _, (values, _, _) in met)
        if total >= MANY:
            mean, variance = _pooled([moments for _, moments in met])
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            averages[norm].add(mean, variance, total)

    meeting = threading.Barrier(len(batches), action=take)

    def before(norm: Any, arguments: tuple[Tensor, ...]) -> None:
        met[place.index] = (norm, _moments(arguments[0]))
        meeting.wait()

    def run(index: int) -> None:
        place.index = index
        torch.set_num_threads(threads_of_torch)  # torch counts them for each thread that calls it
        try:
            with torch.no_grad():
                answers[index] = model(*batches[index])
            met[index] = (None, nothing)
            meeting.wait()
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    with hooked(norm.register_forward_pre_hook(before) for norm in averages):
        try:
            threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(batches))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            meeting.abort()
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return answers
