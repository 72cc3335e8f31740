"""Fold BatchNorm into the layer before it, exactly: what is compiled and exported has no BatchNorm left."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autocomp.graph.program import CanonicalModel
from autocomp.layers.codebook import CodebookConv2d, CodebookLinear
from autocomp.layers.convolution import Layers, Transposed
from autocomp.layers.fp16 import HalfConv2d, HalfLinear
from autocomp.layers.narrow import Norms
from autocomp.layers.w8a8 import QuantConv2d, QuantLinear
from autocomp.layers.weight_only import WeightOnlyConv2d, WeightOnlyLinear

Foldable = (
    *Layers, QuantConv2d, QuantLinear, HalfConv2d, HalfLinear,
    WeightOnlyConv2d, WeightOnlyLinear, CodebookConv2d, CodebookLinear,
)  # fmt: skip


def fold_batchnorm(model: nn.Module, norms: Mapping[str, str] | None = None) -> nn.Module:
    """Return an evaluation-mode copy with every BatchNorm folded into the layer before it, whatever its precision.

    ``norms`` maps layer to BatchNorm names (those of a canonical model when None; of another, none are known). 8-bit
    layers take the affine map into
    ``scale`` and ``bias``: their integers stay as they are but for the sign of rows whose factor is negative, so that
    every scale is positive. Weights in 4 or 8 bits and codebooks take it into their scales; 16-bit ones are rounded once more. A BatchNorm
    without running statistics is left alone.
    """
    folded = copy.deepcopy(model).eval()
    if norms is None:
        norms = folded.code.norms if isinstance(folded, CanonicalModel) else {}
    for layer, norm in norms.items():
        before, after = folded.get_submodule(layer), folded.get_submodule(norm)
        if isinstance(before, nn.Sequential) and len(before):  # a factorised layer: the last factor makes the output
            before = before[-1]
        if isinstance(before, Foldable) and isinstance(after, Norms) and after.running_mean is not None:
            _fold(before, after)
            folded.set_submodule(norm, nn.Identity())
    return folded


def _fold(layer: nn.Module, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> None:
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
    along = (1, -1, *([1] * (weight.dim() - 2))) if isinstance(layer, Transposed) else (-1, *([1] * (weight.dim() - 1)))
    weight = weight * factor.view(along)  # a transposed convolution of several groups has no norm that folds
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    layer.bias = nn.Parameter(new_bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)


def affine(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
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
