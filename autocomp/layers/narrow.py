"""Smaller copies of layers and norms: the channels that are kept, in modules of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocomp.layers.convolution import AnyLayer, Geometry, Layers, Transposed, float_convolution, outputs_first

Norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def take(module: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Module:
    """Return a smaller copy that keeps the output channels ``rows`` and the input columns ``columns`` (None keeps all).

    Convolutions, transposed or not (``columns`` are input channels; a grouped one takes the ``rows`` of whole groups only), Linear and
    BatchNorm. The copy has its own weights. TypeError for any other module.
    """
    if isinstance(module, Norms):
        return _take_norm(module, rows)
    if not isinstance(module, Layers):
        raise TypeError(f"cannot take channels of a {type(module).__name__}")
    weight, bias = outputs_first(module).detach(), module.bias
    if rows is not None:
        weight = weight[rows]
        bias = None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    return with_weights(module, weight.clone(), None if bias is None else bias.detach().clone())


def with_weights(module: AnyLayer, weight: Tensor, bias: Tensor | None) -> AnyLayer:
    """Return a module like ``module`` but with these weights, outputs first, whose shape sets its channels.

    The weights of a convolution of one dimension may come with the height of 1 that its description has: [O, I, 1, K].
    """
    small: AnyLayer
    if isinstance(module, nn.Linear):
        small = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        small.weight = nn.Parameter(weight)
        if bias is not None:
            small.bias = nn.Parameter(bias)
        return small.train(module.training)
    groups = weight.shape[0] * module.groups // module.out_channels if module.groups > 1 else 1
    if len(module.kernel_size) == 1 and weight.dim() == 4:
        weight = weight.squeeze(2)
    assert not isinstance(module.padding, str)
    more = tuple(module.output_padding) if isinstance(module, Transposed) else None
    geometry = Geometry(tuple(module.stride), tuple(module.padding), tuple(module.dilation), groups, more)
    small = float_convolution(weight, bias, geometry)
    small.padding_mode = module.padding_mode
    return small.train(module.training)


def _take_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, rows: Tensor | None) -> nn.Module:
    keep = torch.arange(norm.num_features) if rows is None else rows
    small = type(norm)(len(keep), norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name in ("weight", "bias"):
        values = getattr(norm, name)
        if values is not None:
            setattr(small, name, nn.Parameter(values.detach()[keep].clone()))
    for name in ("running_mean", "running_var"):
        values = getattr(norm, name)
        if values is not None:
            setattr(small, name, values[keep].clone())
    return small.train(norm.training)
