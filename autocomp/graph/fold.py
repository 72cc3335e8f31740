"""Fold BatchNorm into the layer before it, exactly: what is compiled and exported has no BatchNorm left."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autocomp.graph.program import CanonicalModel
from autocomp.layers.convolution import Layers, Transposed
from autocomp.layers.narrow import Norms
from autocomp.layers.part import Stored

Foldable = (*Layers, Stored)


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


def folded_bytes(model: nn.Module) -> int:
    """Bytes of a canonical model's tensors as they are stored: every BatchNorm that folds is folded, a tensor in several places counts once."""
    assert isinstance(model, CanonicalModel)
    folded: set[int] = set()
    biases = 0
    for layer, norm in model.code.norms.items():
        before, after = model.get_submodule(layer), model.get_submodule(norm)
        if isinstance(before, nn.Sequential) and len(before):
            before = before[-1]
        if isinstance(before, Foldable) and isinstance(after, Norms) and after.running_mean is not None:
            folded |= {tensor.data_ptr() for tensor in (*after.parameters(), *after.buffers())}
            if not isinstance(before, Stored) and before.bias is None:
                biases += after.running_mean.nbytes
    whole: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        whole[tensor.data_ptr()] = max(tensor.nbytes, whole.get(tensor.data_ptr(), 0))
    return biases + sum(size for place, size in whole.items() if place not in folded)


def dense_bytes(model: nn.Module) -> int:
    """Bytes of the uncompressed model: `folded_bytes`, or what its author's form of it holds, where that is less, since weights are made of
    others there (tied by a transposition, stored in 8 bits, repeated). A layer that is compressed has weights of its own."""
    assert isinstance(model, CanonicalModel)
    held, stored = model.code.held, folded_bytes(model)
    return stored if held is None else min(stored, held.bytes)


def dense_parameters(model: nn.Module) -> int:
    """Numbers in the parameters of the uncompressed model, counted as `dense_bytes`."""
    assert isinstance(model, CanonicalModel)
    held, own = model.code.held, sum(parameter.numel() for parameter in model.parameters())
    return own if held is None else min(own, held.parameters)


def _fold(layer: nn.Module, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> None:
    factor, shift = affine(norm)
    if isinstance(layer, Stored):
        layer.fold(factor, shift)
        return
    assert isinstance(layer, Layers)
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach().double()
    new_bias = bias * factor + shift
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
