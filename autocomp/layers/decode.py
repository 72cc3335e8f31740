"""Layers stored in few bits → float layers that compute the same."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from autocomp.layers.convolution import Convolution, OneRow, convolution_of, linear_of
from autocomp.layers.exchange import exchanged
from autocomp.layers.part import Stored
from autocomp.records.precisions import FORMATS, Precision


def decoded(model: nn.Module, precisions: Collection[Precision]) -> nn.Module:
    """Return ``model`` with every stored weight that no kernel reads decoded to float32, once, as when a file is loaded.

    ``precisions`` are those with kernels on the target. The weights of loops over time have none. The model is returned as it is if there
    is nothing to do, else a copy.
    """
    from autocomp.layers.recurrent import Recurrence

    in_loops = {id(module.hidden) for module in model.modules() if isinstance(module, Recurrence)}
    with_kernels = {FORMATS[precision].family for precision in precisions}
    memo: dict[int, object] = {}
    for module in model.modules():
        if not isinstance(module, Stored) or not module.family.decodes:
            continue
        there = module.family.everywhere or module.family in with_kernels
        if id(module) in in_loops or not there or not _covered(module):
            memo[id(module)] = float_module(module)
    return exchanged(model, memo) if memo else model


def _covered(module: Stored) -> bool:
    """Whether there are kernels for a layer like this in its precision."""
    if not isinstance(module, Convolution):
        return "linear" in module.family.covers
    return ("plain" if module.geometry.is_plain else "other") in module.family.covers


def float_module(module: nn.Module) -> nn.Module:
    """Return the float32 layer on the weights that a stored one holds. TypeError for any other module."""
    if not isinstance(module, Stored):
        raise TypeError(f"a {type(module).__name__} stores no weights to decode")
    weight, bias = module.float_weight(), module.bias.clone()
    if isinstance(module, Convolution):
        return convolution_of(isinstance(module, OneRow), weight, bias, module.geometry).eval()
    return linear_of(weight, bias).eval()
