"""bfloat16: the range of float32, eight bits of precision. See `half` for what layers compute."""

from __future__ import annotations

import torch
from torch import nn

from autocomp.layers import half
from autocomp.layers.convolution import OneRow
from autocomp.layers.form import Form
from autocomp.layers.part import Part, Place, Stored
from autocomp.records.precisions import BRAIN

conv2d_bf16, linear_bf16 = half.operations("bf16", torch.bfloat16)


class BrainLinear(half.SixteenLinear):
    """A linear layer in bf16: weight [N, K], float32 bias [N]."""

    family, name, dtype, linear = BRAIN, "bf16", torch.bfloat16, linear_bf16


class BrainConv2d(half.SixteenConv2d):
    """A convolution in bf16: weight OIHW, float32 bias [O]."""

    family, name, dtype, conv2d = BRAIN, "bf16", torch.bfloat16, conv2d_bf16


class BrainConv1d(OneRow, BrainConv2d):
    """A convolution of ``[N, C, L]`` in bf16 (weight ``[O, I, 1, K]``)."""


KINDS = (BrainLinear, BrainConv2d, BrainConv1d)
FORMS = (
    Form(BrainLinear, (), ("weight", "bias")),
    *(Form(kind, ("geometry",), ("weight", "bias")) for kind in (BrainConv1d, BrainConv2d)),
)


def layer_of(part: Part, place: Place) -> Stored:
    """The module on a stored weight."""
    return half.layer_of(part, place, *KINDS)


def in_brain(layer: nn.Conv1d | nn.Conv2d | nn.Linear) -> Stored:
    """The module of a float layer, as `half.converted` says."""
    return half.converted(layer, *KINDS)
