"""What the training forms share: latent floats that are rounded on the way forward, with gradients that go straight through.

A form begins where the stored layer is, to the last bit: scales are the stored ones times ``exp(d)``, and every ``d`` is 0 at first. So a
step of the optimizer changes a scale by a share of it, whatever its size (as thresholds in TQT, Jain et al. 2019, arXiv:1903.08066); the
gradients of scales are those of LSQ (Esser et al. 2019, arXiv:1902.08153).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.layers.convolution import Convolution, Geometry, OneRow, convolved
from autocomp.layers.part import Place, Stored

EDGE = 0.49  # of a level past the last one in which a weight still has a gradient, and is still rounded to that level


class Training(nn.Module):
    """A stored layer as it is trained. In evaluation mode it computes what `stored` does, to the last bit."""

    def __init__(self, layer: Stored) -> None:
        super().__init__()
        self.place = place_of(layer)
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.rounding = True  # False: in floats, in both modes
        self.seen: list[Tensor] = []  # samples of the input, where they are kept

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.rounding:
            with torch.no_grad():
                result: Tensor = self.stored()(x)
            return result
        if self.place.one_d:
            return self.computed(x.unsqueeze(2)).squeeze(2)
        return self.computed(x)

    def computed(self, x: Tensor) -> Tensor:
        """What the layer computes, with gradients; of a convolution of one dimension as pictures one row high."""
        return self.product(x, self.weight(), self.bias)

    def weight(self) -> Tensor:
        """The weight that is multiplied, outputs first, with gradients."""
        raise NotImplementedError

    def stored(self) -> Stored:
        """The layer that is delivered, on tensors of its own."""
        raise NotImplementedError

    def refit(self) -> None:
        """Find scales anew, after a training without rounding; nothing where there are none."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x`` multiplied by, or convolved with, a weight."""
        if self.place.linear:
            return functional.linear(x, weight, bias)
        return convolved(x, weight, bias, self.place.geometry)

    def extra_repr(self) -> str:
        return f"linear={self.place.linear}, kernel={self.place.kernel}"


def place_of(layer: Stored) -> Place:
    """Where a stored layer stands."""
    if not isinstance(layer, Convolution):
        return Place(True, False, (), Geometry((), (), (), 1))
    kernel = tuple(layer.float_weight().shape[1:])
    return Place(False, isinstance(layer, OneRow), kernel, layer.geometry)


class _Round(torch.autograd.Function):
    """Nearest whole number, halves to even; the gradient goes through as if there were no rounding (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Sixteen(torch.autograd.Function):
    """The nearest number of a 16-bit type, in float32; the gradient goes through in float32, where the type would lose small ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def rounded(x: Tensor) -> Tensor:
    """Whole numbers, gradients straight through."""
    return cast(Tensor, _Round.apply(x))


def in_half(x: Tensor) -> Tensor:
    """Values of float16 in float32, gradients straight through."""
    return in_sixteen(x, torch.float16)


def in_sixteen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of a 16-bit type in float32, gradients straight through."""
    return cast(Tensor, _Sixteen.apply(x, dtype))


def levels(x: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers from ``low`` to ``high``; a gradient for all that is not clipped."""
    return rounded(x.clamp(low - EDGE, high + EDGE))


def divisor(scale: Tensor) -> Tensor:
    """A scale to divide by: rows that are zero altogether may have a scale of 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
