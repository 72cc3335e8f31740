"""Random weights brought to where training leaves them: nothing dead, nothing overflowing, outputs that depend on the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from corpus.entry import Entry

_ROOM = (0.3, 3.0)  # standard deviations of a layer's outputs that are left as they are


@torch.no_grad()
def build(entry: Entry) -> nn.Module:
    """The model of an entry in evaluation mode, the same weights every time."""
    torch.manual_seed(0)
    model = entry.make().eval()
    _wake(model)
    size = max(tensor.numel() for tensor in entry.inputs(0))
    batch = entry.inputs(seed=1000, batch=max(8, min(48, 600_000 // size)))
    for _ in range(2):  # the second time with statistics that fit
        _scale(model, batch)
        _run_norms(model, batch)
    return model.eval()


def _wake(model: nn.Module) -> None:
    """Parameters that start at one value (layer scales of 1e-6, gains of zero, tables of zeros) get values that differ and matter.

    Training moves them; at their start whole branches are silent, and a compiler could leave them out unnoticed.
    """
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if (
            parameter.numel() < 2
            or not parameter.is_floating_point()
            or bool((parameter != parameter.view(-1)[0]).any())
        ):
            continue
        level = float(parameter.view(-1)[0])
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(
            level * (1 + 0.2 * noise) if abs(level) > 0.05 else 0.1 * noise if level == 0 else 0.5 + 0.2 * noise
        )


def _scale(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Scale the weight of each layer, in the order they run, so that its outputs spread by about 1."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
    done: set[int] = set()

    def hook(module: nn.Module, read: Any, output: Any) -> Any:
        weight = module._parameters.get("weight")
        if not isinstance(output, Tensor) or weight is None or id(weight) in done:
            return None
        if not read[0].any():  # as a flow that starts at nothing: only a later call shows what the weight does
            return None
        done.add(id(weight))
        # what the inputs move, not what biases do; all of it where the inputs move nothing, as in tables of positions
        spread = float((output - output.mean(0)).std()) or float(output.std())
        if spread == 0 or _ROOM[0] < spread < _ROOM[1]:
            return None
        weight.mul_(1 / spread)
        return output / spread

    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    ]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()


def _run_norms(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    """Set BatchNorm's statistics to those of one batch; only these modules train, so that nothing is dropped.

    One large batch, as what flows through the model then is what the statistics are of: a deep model amplifies any difference.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        model(*batch)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
        norm.eval()
        assert norm.running_var is not None
        norm.running_var.clamp_(min=1e-3)  # a channel that random data never moves would be blown up


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs, in order, whatever holds them."""
    from torch.utils import _pytree

    return [leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def spread_between(model: Callable[..., Any], entry: Entry) -> float:
    """How far the outputs for two inputs lie apart, over their range: the least over the outputs, so that none is constant."""
    with torch.no_grad():
        first, second = (tensors(model(*entry.inputs(seed, 1))) for seed in (1, 2))
    worst = float("inf")
    for a, b in zip(first, second, strict=True):
        if a.is_floating_point():
            worst = min(worst, float((a - b).abs().max()) / (float(a.abs().max()) or 1.0))
    return worst
