"""16-bit floats, IEEE's: a magnitude of 65520 or more becomes infinite. See `half` for what layers compute."""

from __future__ import annotations

import torch
from torch import nn

from autocomp.layers import half
from autocomp.layers.convolution import OneRow
from autocomp.layers.form import Form
from autocomp.layers.part import Part, Place, Stored
from autocomp.records.precisions import HALF

conv2d_fp16, linear_fp16 = half.operations("fp16", torch.float16)


class HalfLinear(half.SixteenLinear):
    """A linear layer in fp16: weight [N, K], float32 bias [N]."""

    family, name, dtype, linear = HALF, "fp16", torch.float16, linear_fp16


class HalfConv2d(half.SixteenConv2d):
    """A convolution in fp16: weight OIHW, float32 bias [O]."""

    family, name, dtype, conv2d = HALF, "fp16", torch.float16, conv2d_fp16


class HalfConv1d(OneRow, HalfConv2d):
    """A convolution of ``[N, C, L]`` in fp16 (weight ``[O, I, 1, K]``)."""


KINDS = (HalfLinear, HalfConv2d, HalfConv1d)
FORMS = (
    Form(HalfLinear, (), ("weight", "bias")),
    *(Form(kind, ("geometry",), ("weight", "bias")) for kind in (HalfConv1d, HalfConv2d)),
)


def layer_of(part: Part, place: Place) -> Stored:
    """The module on a stored weight."""
    return half.layer_of(part, place, *KINDS)


def halved(layer: nn.Conv1d | nn.Conv2d | nn.Linear) -> Stored:
    """The module of a float layer, as `half.converted` says."""
    return half.converted(layer, *KINDS)
