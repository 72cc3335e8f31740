"""Scales: of weights per output channel or per group, of activations by what is seen of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.layers.convolution import plain_geometry
from autocomp.layers.w8a8 import Observer, QuantConv1d, QuantConv2d, QuantLinear, quantise_centred
from autocomp.layers.weight_only import BITS, HIGHEST, LOWEST, WeightOnlyLinear, pack_levels
from autocomp.records.precisions import GROUPS


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to int8 in [-127, 127], one symmetric scale for each output (first axis); a zero row gets scale 1.

    Returns (int8 of the same shape, float32 scale [O]); |weight - int8 * scale| is at most half a scale.
    """
    peak = weight.flatten(1).abs().amax(1).double()
    scale = torch.where(peak > 0, peak / 127.0, torch.ones_like(peak)).float()
    # A subnormal peak underflows to a zero scale: such a row is zero for every purpose.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    column = scale.double().view(-1, *([1] * (weight.dim() - 1)))
    return (weight.double() / column).round().clamp(-127, 127).to(torch.int8), scale


def activation_parameters(low: float, high: float) -> tuple[float, int]:
    """Return (inv_xs, zp) for values in [low, high], widened to hold 0: scale = (high - low) / 255.

    ``inv_xs`` is exactly a float32, and the activation scale is understood as its exact inverse.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    tiny = float(torch.finfo(torch.float32).tiny)
    scale = (high - low) / 255.0
    if not scale > 255 * tiny:  # nothing (or nothing float32 can hold the inverse of) was ever seen here
        return 1.0, 0
    inv_xs = float(torch.tensor(1.0 / scale, dtype=torch.float32))
    return inv_xs, max(0, min(255, round(-low * inv_xs)))


def observe(sample: Tensor, low: float, high: float, observer: Observer = "mse") -> tuple[float, float]:
    """Choose a clipping range inside [low, high], the extremes seen, from a sample of the values.

    ``minmax`` keeps the extremes; ``percentile`` drops 0.05 % at each side; ``mse`` takes the one of 20 shrunken ranges
    with the least squared error on the sample.
    """
    if observer == "minmax" or sample.numel() == 0:
        return low, high
    values = sample.flatten().float()
    if observer == "percentile":
        ordered = values.sort().values
        cut = int(ordered.numel() * 0.0005)
        return float(ordered[cut]), float(ordered[ordered.numel() - 1 - cut])
    best, chosen = float("inf"), (low, high)
    for step in range(20):
        shrink = 1.0 - 0.03 * step
        inv_xs, zp = activation_parameters(low * shrink, high * shrink)
        error = float((quantise_centred(values, inv_xs, zp).div_(inv_xs) - values).square_().mean())
        if error < best:
            best, chosen = error, (low * shrink, high * shrink)
    return chosen


def quantised(layer: nn.Conv1d | nn.Conv2d | nn.Linear, inv_xs: float, zp: int) -> QuantConv2d | QuantLinear:
    """Return the 8-bit module of a float layer: weights rounded to nearest, its input quantised with (inv_xs, zp).

    Zero-padded convolutions with symmetric integer padding only (ValueError otherwise).
    """
    weight, weight_scale = quantise_weight(layer.weight.detach())
    scale = (weight_scale.double() / inv_xs).float()
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().clone()
    if isinstance(layer, nn.Linear):
        return QuantLinear(weight, scale, bias, inv_xs, zp)
    geometry = plain_geometry(layer)
    if isinstance(layer, nn.Conv1d):
        return QuantConv1d(weight.unsqueeze(2), scale, bias, inv_xs, zp, geometry)
    return QuantConv2d(weight, scale, bias, inv_xs, zp, geometry)


# Of the largest weight of a group, as a fraction: with 16 levels it often pays to clip the extremes, and 7/8 lets the lowest
# level reach it.
_SHRINKS = {8: (1.0,), 4: tuple(1.0 - 0.025 * step for step in range(15))}


def quantise_groups(weight: Tensor, bits: int, group: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a float weight [N, K] to levels, one symmetric scale for each row and group of ``group`` columns.

    Returns (int8 levels [N, G * group], float32 scales [N, G]). With 8 bits the largest weight of a group is its highest level; with
    4 bits each group takes the one of 15 clipping ranges with the least squared error, each weight counting by ``importance`` [N, K].
    A group of zeros gets scale 1.
    """
    n, k = weight.shape
    padded = functional.pad(weight.detach().double(), (0, -k % group)).reshape(n, -1, group)
    peak = padded.abs().amax(2, keepdim=True)
    counts = torch.ones_like(padded)
    if importance is not None:
        counts = functional.pad(importance.double(), (0, -k % group)).reshape(n, -1, group)
    best = torch.full_like(peak, torch.inf)
    levels, scales = torch.zeros(padded.shape, dtype=torch.int8), torch.ones(peak.shape)
    for shrink in _SHRINKS[bits]:
        scale = (peak * (shrink / HIGHEST[bits])).float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        rounded = (padded / scale.double()).round().clamp(LOWEST[bits], HIGHEST[bits])
        error = ((rounded * scale.double() - padded).square() * counts).sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        levels = torch.where(better, rounded.to(torch.int8), levels)
        scales = torch.where(better, scale, scales)
    return levels.flatten(1), scales.squeeze(2)


def weight_only(layer: nn.Linear, bits: int, group: int) -> WeightOnlyLinear:
    """Return the layer with its weights in ``bits`` bits, rounded to nearest. ValueError for bits or groups without kernels."""
    if bits not in BITS or group not in GROUPS:
        raise ValueError(f"bits must be one of {BITS} and group one of {GROUPS}; got {bits} and {group}")
    levels, scales = quantise_groups(layer.weight, bits, group)
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().clone()
    stored = pack_levels(levels) if bits == 4 else levels
    return WeightOnlyLinear(stored, scales, bias, layer.in_features, bits, group)
