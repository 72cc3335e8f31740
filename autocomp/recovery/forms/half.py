"""16-bit layers in training: float32 weights, rounded to float16 on the way forward, as the inputs are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocomp.layers.fp16 import HalfLinear, layer_of
from autocomp.layers.part import Part, Stored
from autocomp.recovery.forms.form import Training, in_half

LARGEST = float(torch.finfo(torch.float16).max)


class TrainingHalf(Training):
    """The form of `HalfLinear` and `HalfConv2d`; ``latent`` is the weight in float32."""

    def __init__(self, layer: Stored) -> None:
        super().__init__(layer)
        self.latent = nn.Parameter(layer.weight.detach().float())
        self.rounds_inputs = isinstance(layer, HalfLinear) or self.place.geometry.is_plain

    def computed(self, x: Tensor) -> Tensor:
        return self.product(in_half(x) if self.rounds_inputs and self.rounding else x, self.weight(), self.bias)

    def weight(self) -> Tensor:
        return in_half(self.latent.clamp(-LARGEST, LARGEST)) if self.rounding else self.latent

    def stored(self) -> Stored:
        weight = self.latent.detach().clamp(-LARGEST, LARGEST).half()
        return layer_of(Part(weight, self.bias.detach().clone()), self.place).eval()
