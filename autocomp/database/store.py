"""A float weight → its stored form in a precision, and the float weight that this amounts to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autocomp.compress import kmeans
from autocomp.compress.rounding import Metric, round_levels
from autocomp.compress.scales import activation_parameters, quantise_groups, quantise_weight
from autocomp.layers import codebook
from autocomp.layers.part import Part
from autocomp.layers.w8a8 import quantise_centred
from autocomp.layers.weight_only import HIGHEST, LOWEST, pack_levels
from autocomp.records.precisions import FORMATS, Precision, group_of, load


@dataclass(frozen=True)
class Inputs:
    """What a weight multiplies: ``sample`` [S, K] of its input rows, the clipping range of their values, and their metric."""

    sample: Tensor
    low: float
    high: float
    metric: Metric


@dataclass(frozen=True)
class Stored:
    """``part`` holds a flat weight [O, K] without a bias; ``effective`` [O, K] float64 is what it multiplies by.

    ``shift`` and ``noise`` [K] are the mean and the variance of what rounding the inputs adds to them (None: they are not rounded).
    """

    part: Part
    effective: Tensor
    shift: Tensor | None = None
    noise: Tensor | None = None


def store(weight: Tensor, precision: Precision, inputs: Inputs, fisher: Tensor, linear: bool) -> Stored:
    """Store a float64 weight [O, K] so that its error on ``inputs`` is small; ``fisher`` [O] weighs the outputs.

    ``linear`` says that its kernel reads whole groups. Any precision but fp32, which needs no rounding.
    """
    stored: Stored = load(FORMATS[precision].family.store)(weight, precision, inputs, fisher, linear)
    return stored


def store_half(weight: Tensor, precision: Precision, inputs: Inputs, fisher: Tensor, linear: bool) -> Stored:
    return _sixteen(weight, precision, inputs, torch.float16)


def store_brain(weight: Tensor, precision: Precision, inputs: Inputs, fisher: Tensor, linear: bool) -> Stored:
    return _sixteen(weight, precision, inputs, torch.bfloat16)


def _sixteen(weight: Tensor, precision: Precision, inputs: Inputs, dtype: torch.dtype) -> Stored:
    short = weight.float().to(dtype)
    rounded = (inputs.sample.to(dtype).float() - inputs.sample).double()
    part = Part(short, precision=precision, columns=weight.shape[1])
    return Stored(part, short.double(), rounded.mean(0), rounded.var(0, correction=0))


def store_integers(weight: Tensor, precision: Precision, inputs: Inputs, fisher: Tensor, linear: bool) -> Stored:
    columns = weight.shape[1]
    inv_xs, zp = activation_parameters(inputs.low, inputs.high)
    shift, noise = _noise(inputs.sample, inv_xs, zp)
    _, scale = quantise_weight(weight.float())
    grid = scale.double()[:, None].expand(-1, columns)
    levels = round_levels(weight, grid, -127, 127, inputs.metric.noisy(noise))
    part = Part(levels, None, precision, (scale.double() / inv_xs).float(), None, inv_xs, zp, columns)
    return Stored(part, levels.double() * grid, shift, noise)


def store_groups(weight: Tensor, precision: Precision, inputs: Inputs, fisher: Tensor, linear: bool) -> Stored:
    columns = weight.shape[1]
    bits, group = int(FORMATS[precision].bits), group_of(precision, columns)
    counts = inputs.metric.diagonal().repeat_interleave(len(weight) // inputs.metric.count, 0)
    _, scales = quantise_groups(weight, bits, group, counts)
    grid = scales.double().repeat_interleave(group, 1)[:, :columns]
    levels = round_levels(weight, grid, LOWEST[bits], HIGHEST[bits], inputs.metric)
    stored = functional.pad(levels, (0, (-columns) % (group if linear else 2 if bits == 4 else 1)))
    part = Part(pack_levels(stored) if bits == 4 else stored, None, precision, scales, columns=columns)
    return Stored(part, levels.double() * grid)


def store_indices(weight: Tensor, precision: Precision, inputs: Inputs, fisher: Tensor, linear: bool) -> Stored:
    form, columns = FORMATS[precision], weight.shape[1]
    indices, books, row_scale = kmeans.fit(weight, inputs.metric, fisher, form.dim, form.stages)
    effective = codebook.decode(indices, books, row_scale, columns).double()
    return Stored(Part(indices, None, precision, row_scale, books, columns=columns), effective)


def _noise(sample: Tensor, inv_xs: float, zp: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance [K] of what quantisation adds to each column of the sample, float64."""
    added = (quantise_centred(sample, inv_xs, zp) / inv_xs - sample).double()
    return added.mean(0), added.var(0, correction=0)
