"""8-bit layers in training: weights and activations rounded to their integers on the way forward, both scales learned.

In training mode the sums are those of the integer op (whole numbers in float32, exact below 2^24), and the result differs from it by the last
bit, which float64 decides there; in evaluation mode it is the op. The zero point stays what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocomp.layers.part import Part, Stored, along_rows
from autocomp.layers.w8a8 import QuantConv2d, QuantLinear, layer_of
from autocomp.recovery.forms.form import Training, divisor, levels

HIGHEST = 127


class TrainingIntegers(Training):
    """The form of `QuantLinear` and `QuantConv2d`: ``latent`` weights in float32, scales of outputs [O] and of the input.

    ``outputs`` [O] and ``inputs`` [] are the logarithms of what the scales grew by.
    """

    scale: Tensor
    inv_xs: Tensor

    def __init__(self, layer: QuantLinear | QuantConv2d) -> None:
        super().__init__(layer)
        self.zp = layer.zp
        self.register_buffer("scale", layer.scale.detach().clone())
        self.register_buffer("inv_xs", torch.tensor(layer.inv_xs, dtype=torch.float32))
        self.outputs = nn.Parameter(torch.zeros_like(layer.scale))
        self.inputs = nn.Parameter(torch.zeros(()))
        own = along_rows(self.scale * self.inv_xs, layer.weight)
        self.latent = nn.Parameter(layer.weight.detach().float() * own)

    def computed(self, x: Tensor) -> Tensor:
        q = levels(x * (self.inv_xs * torch.exp(-self.inputs)), -self.zp, 255 - self.zp)
        acc = self.product(q, self._integers(), None)
        scale = self.scale * torch.exp(self.outputs) * torch.exp(self.inputs)
        if self.place.linear:
            return acc * scale + self.bias
        taps = acc.dim() - 2
        return acc * scale.view(-1, *[1] * taps) + self.bias.view(-1, *[1] * taps)

    def weight(self) -> Tensor:
        return self._integers() * along_rows(self.scale * self.inv_xs * torch.exp(self.outputs), self.latent)

    def stored(self) -> Stored:
        with torch.no_grad():
            weight = self._integers().to(torch.int8)
            scale = self.scale * torch.exp(self.outputs) * torch.exp(self.inputs)
            inv_xs = float(self.inv_xs * torch.exp(-self.inputs))
        part = Part(weight, self.bias.detach().clone(), scale=scale, inv_xs=inv_xs, zp=self.zp)
        return layer_of(part, self.place).eval()

    def _integers(self) -> Tensor:
        """The weight in levels of its scale, whole numbers in float32."""
        own = self.scale * self.inv_xs * torch.exp(self.outputs)
        return levels(self.latent / along_rows(divisor(own), self.latent), -HIGHEST, HIGHEST)
