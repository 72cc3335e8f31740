"""8-bit layers in training: weights and activations rounded to their integers on the way forward, both scales learned.

In training mode the numbers are those of the integer op up to the rounding of float32 sums; in evaluation mode it is the op. The zero point
stays what it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autocomp.compress.scales import activation_parameters, observe, quantise_weight
from autocomp.layers.part import Part, Stored, along_rows
from autocomp.layers.w8a8 import QuantConv2d, QuantLinear, layer_of
from autocomp.recovery.forms.form import EDGE, Training, divisor, levels

HIGHEST = 127


class _Centred(torch.autograd.Function):
    """``quantise_centred`` with the gradients of LSQ, in few passes over what may be a large map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inv_xs: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, inv_xs)
        ctx.limits = (low - EDGE, high + EDGE)
        return x.mul(inv_xs).round_().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, inv_xs = ctx.saved_tensors
        low, high = ctx.limits
        scaled = x.mul(inv_xs)
        kept = gradient.mul((scaled > low).logical_and_(scaled < high))
        return kept.mul(inv_xs), (kept * x).sum(), None, None


class TrainingIntegers(Training):
    """The form of `QuantLinear` and `QuantConv2d`: ``latent`` weights in float32, scales of outputs [O] and of the input.

    ``outputs`` [O] and ``inputs`` [] are the logarithms of what the scales grew by.
    """

    scale: Tensor
    inv_xs: Tensor
    zero: Tensor

    def __init__(self, layer: QuantLinear | QuantConv2d) -> None:
        super().__init__(layer)
        self.register_buffer("zero", torch.tensor(layer.zp))
        self.register_buffer("scale", layer.scale.detach().clone())
        self.register_buffer("inv_xs", torch.tensor(layer.inv_xs, dtype=torch.float32))
        self.outputs = nn.Parameter(torch.zeros_like(layer.scale))
        self.inputs = nn.Parameter(torch.zeros(()))
        own = along_rows(self.scale * self.inv_xs, layer.weight)
        self.latent = nn.Parameter(layer.weight.detach().float() * own)

    @property
    def zp(self) -> int:
        return int(self.zero)

    def computed(self, x: Tensor) -> Tensor:
        if not self.rounding:
            return self.product(x, self.latent, self.bias)
        q = _Centred.apply(x, self.inv_xs * torch.exp(-self.inputs), -self.zp, 255 - self.zp)
        scale = self.scale * torch.exp(self.outputs) * torch.exp(self.inputs)
        # the scale in the weights, a fraction of the work of scaling the sums: the same numbers, but for the rounding of float32
        return self.product(q, self._integers() * along_rows(scale, self.latent), self.bias)

    def weight(self) -> Tensor:
        if not self.rounding:
            return self.latent
        return self._integers() * along_rows(self.scale * self.inv_xs * torch.exp(self.outputs), self.latent)

    def stored(self) -> Stored:
        with torch.no_grad():
            weight = self._integers().to(torch.int8)
            scale = self.scale * torch.exp(self.outputs) * torch.exp(self.inputs)
            inv_xs = float(self.inv_xs * torch.exp(-self.inputs))
        part = Part(weight, self.bias.detach().clone(), scale=scale, inv_xs=inv_xs, zp=self.zp)
        return layer_of(part, self.place).eval()

    def refit(self) -> None:
        values = torch.cat(self.seen) if self.seen else torch.zeros(0)
        with torch.no_grad():
            if len(values):
                low, high = observe(values, float(values.min()), float(values.max()))
                inv_xs, zp = activation_parameters(low, high)
                self.inv_xs.fill_(inv_xs)
                self.zero.fill_(zp)
            else:
                self.inv_xs.mul_(torch.exp(-self.inputs))
            own = quantise_weight(self.latent)[1]
            self.scale.copy_((own.double() / self.inv_xs.double()).float())
            self.outputs.zero_()
            self.inputs.zero_()

    def _integers(self) -> Tensor:
        """The weight in levels of its scale, whole numbers in float32."""
        own = self.scale * self.inv_xs * torch.exp(self.outputs)
        return levels(self.latent / along_rows(divisor(own), self.latent), -HIGHEST, HIGHEST)
