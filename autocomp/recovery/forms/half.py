"""16-bit layers in training: float32 weights, rounded to the type on the way forward, as the inputs are."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from autocomp.layers import bf16, fp16
from autocomp.layers.half import SixteenLinear
from autocomp.layers.part import Part, Stored
from autocomp.records.precisions import load
from autocomp.recovery.forms.form import Training, in_sixteen


class _Training(Training):
    """The form of a layer in 16 bits; ``latent`` is the weight in float32."""

    dtype: ClassVar[torch.dtype]

    def __init__(self, layer: Stored) -> None:
        super().__init__(layer)
        self.family = layer.family
        self.latent = nn.Parameter(layer.weight.detach().float())
        self.rounds_inputs = isinstance(layer, SixteenLinear) or self.place.geometry.is_plain

    def computed(self, x: Tensor) -> Tensor:
        value = in_sixteen(x, self.dtype) if self.rounds_inputs and self.rounding else x
        return self.product(value, self.weight(), self.bias)

    def weight(self) -> Tensor:
        return in_sixteen(self._bounded(self.latent), self.dtype) if self.rounding else self.latent

    def stored(self) -> Stored:
        weight = self._bounded(self.latent.detach()).to(self.dtype)
        made: Stored = load(self.family.layer)(Part(weight, self.bias.detach().clone()), self.place)
        return made.eval()

    def _bounded(self, weight: Tensor) -> Tensor:
        largest = float(torch.finfo(self.dtype).max)
        return weight.clamp(-largest, largest)


class TrainingHalf(_Training):
    """The form of `HalfLinear` and `HalfConv2d`."""

    dtype = fp16.HalfLinear.dtype


class TrainingBrain(_Training):
    """The form of `BrainLinear` and `BrainConv2d`."""

    dtype = bf16.BrainLinear.dtype
