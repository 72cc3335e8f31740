"""Fold BatchNorm into the layer before it, exactly: what is compiled and exported has no BatchNorm left."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from autocomp.compress.codebook import CodebookConv2d, CodebookLinear
from autocomp.compress.half import HalfConv2d, HalfLinear
from autocomp.compress.quantize import QuantConv2d, QuantLinear
from autocomp.compress.weight_only import WeightOnlyConv2d, WeightOnlyLinear

Foldable = (
    nn.Conv1d, nn.Conv2d, nn.Linear, QuantConv2d, QuantLinear, HalfConv2d, HalfLinear,
    WeightOnlyConv2d, WeightOnlyLinear, CodebookConv2d, CodebookLinear,
)  # fmt: skip
Norms = (nn.BatchNorm1d, nn.BatchNorm2d)


class _Tracer(fx.Tracer):
    """Keeps the integer modules whole; everything of torch.nn but containers already is."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Foldable + Norms) or super().is_leaf_module(m, module_qualified_name)


def find_norms(model: nn.Module) -> dict[str, str]:
    """Map the name of a foldable layer to the BatchNorm that alone reads its output; layers called twice are left out.

    Empty when the model cannot be traced symbolically: then nothing is folded, and nothing is wrong either.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a user's forward does with a proxy; the unfolded model stays correct
        return {}
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times: dict[int, int] = {}
    for node in calls:
        times[id(modules[node.target])] = times.get(id(modules[node.target]), 0) + 1
    pairs: dict[str, str] = {}
    for node in calls:
        layer = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if layer is None or layer.op != "call_module" or not isinstance(modules[node.target], Norms):
            continue
        before = modules[layer.target]
        alone = len(layer.users) == 1 and times[id(before)] == 1 and times[id(modules[node.target])] == 1
        # A Linear over [N, L, C] feeds a BatchNorm1d that normalises L, not the features.
        wide = (
            getattr(before, "weight", None) is not None and before.weight.shape[0] == modules[node.target].num_features
        )
        if isinstance(before, Foldable) and alone and wide:
            pairs[str(layer.target)] = str(node.target)
    return pairs


def fold_batchnorm(model: nn.Module, norms: Mapping[str, str] | None = None) -> nn.Module:
    """Return an evaluation-mode copy with every BatchNorm folded into the layer before it, whatever its precision.

    ``norms`` maps layer to BatchNorm names (found by symbolic tracing when None). 8-bit layers take the affine map into
    ``scale`` and ``bias``: their integers stay as they are but for the sign of rows whose factor is negative, so that
    every scale is positive. Weights in 4 or 8 bits and codebooks take it into their scales; 16-bit ones are rounded once more. A BatchNorm
    without running statistics is left alone.
    """
    folded = copy.deepcopy(model).eval()
    for layer, norm in (find_norms(folded) if norms is None else norms).items():
        before, after = folded.get_submodule(layer), folded.get_submodule(norm)
        if isinstance(before, nn.Sequential) and len(before):  # a factorised layer: the last factor makes the output
            before = before[-1]
        if isinstance(before, Foldable) and isinstance(after, Norms) and after.running_mean is not None:
            _fold(before, after)
            folded.set_submodule(norm, nn.Identity())
    return folded


def _fold(layer: nn.Module, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    factor, shift = affine(norm)
    assert isinstance(layer, Foldable)
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach().double()
    new_bias = bias * factor + shift
    if isinstance(layer, (QuantConv2d, QuantLinear)):
        sign = torch.where(factor < 0, -1, 1).to(torch.int8)
        layer.weight.mul_(sign.view(-1, *([1] * (layer.weight.dim() - 1))))
        layer.scale.copy_(layer.scale.double() * factor.abs())
        layer.bias.copy_(new_bias)
        return
    if isinstance(layer, WeightOnlyConv2d | WeightOnlyLinear):  # a row whose factor is negative gets negative scales
        layer.scales.copy_(layer.scales.double() * factor[:, None])
        layer.bias.copy_(new_bias)
        return
    if isinstance(layer, CodebookConv2d | CodebookLinear):
        layer.scale.copy_(layer.scale.double() * factor)
        layer.bias.copy_(new_bias)
        return
    if isinstance(layer, HalfConv2d | HalfLinear):
        layer.weight.copy_(layer.weight.double() * factor.view(-1, *([1] * (layer.weight.dim() - 1))))
        layer.bias.copy_(new_bias)
        return
    weight = layer.weight.detach().double()
    weight = weight * factor.view(-1, *([1] * (weight.dim() - 1)))
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    layer.bias = nn.Parameter(new_bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)


def affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the float64 (factor, shift) per channel that an evaluation-mode BatchNorm applies."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return factor, shift
