"""Layers stored in few bits → float layers that compute the same."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from autocomp.layers.codebook import CodebookConv2d, CodebookLinear
from autocomp.layers.convolution import Convolution, Geometry, OneRow, float_convolution
from autocomp.layers.fp16 import HalfConv2d, HalfLinear
from autocomp.layers.weight_only import WeightOnlyConv2d, WeightOnlyLinear
from autocomp.records.candidate import Precision

Stored = (HalfConv2d, HalfLinear, WeightOnlyConv2d, WeightOnlyLinear, CodebookConv2d, CodebookLinear)


def decoded(model: nn.Module, precisions: Collection[Precision]) -> nn.Module:
    """Return ``model`` with every stored weight that no kernel reads decoded to float32, once, as when a file is loaded.

    ``precisions`` are those with kernels: only fp16 is asked for. w8 and w4 linear layers have kernels everywhere, convolutions,
    codebooks and the weights of loops over time nowhere. The model is returned as it is if there is nothing to do, else a copy.
    """
    import copy

    from autocomp.layers.recurrent import Recurrence

    in_loops = {id(module.hidden) for module in model.modules() if isinstance(module, Recurrence)}
    memo: dict[int, object] = {}
    for module in model.modules():
        half = isinstance(module, HalfLinear) or (isinstance(module, HalfConv2d) and module.geometry.is_plain)
        has_kernel = id(module) not in in_loops and (
            isinstance(module, WeightOnlyLinear) or (half and "fp16" in precisions)
        )
        if isinstance(module, Stored) and not has_kernel:
            memo[id(module)] = float_module(module)
    if not memo:
        return model
    whole = memo.get(id(model))
    if whole is not None:
        assert isinstance(whole, nn.Module)
        return whole
    result: nn.Module = copy.deepcopy(model, memo)
    return result


def float_module(module: nn.Module) -> nn.Module:
    """Return the float32 layer on the weights that a stored one holds. TypeError for any other module."""
    if not isinstance(module, Stored):
        raise TypeError(f"a {type(module).__name__} stores no weights to decode")
    weight, bias = module.float_weight(), module.bias.clone()
    if isinstance(module, Convolution):
        return convolution_of(isinstance(module, OneRow), weight, bias, module.geometry).eval()
    return linear_of(weight, bias).eval()


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


def convolution_of(one_d: bool, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> nn.Module:
    if one_d:
        return float_convolution(weight.squeeze(2), bias, geometry.one_row())
    return float_convolution(weight, bias, geometry)
