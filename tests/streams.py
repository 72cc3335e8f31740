"""Residual streams behind norms of every kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autocomp.graph.analyse import analyse
from autocomp.graph.canonical import canonical
from autocomp.graph.graph import Graph
from autocomp.graph.program import CanonicalModel

WIDTH = 32


class Scaled(nn.Module):
    """What all channels together give scales each of them; ``weight`` and ``bias`` are theirs."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def root_mean_square(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def response(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Global response normalisation (Woo et al. 2023, arXiv:2301.00808) over [N, L, C]."""
    size = x.norm(p=2, dim=1, keepdim=True)
    return x + bias + weight * x * (size / (size.mean(-1, keepdim=True) + 1e-6))


def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * weight + bias


def gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    both = torch.stack([x.mean(-1), x.amax(-1)], -1)
    return x * both.sum(-1, keepdim=True).sigmoid()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "rms_norm": lambda: nn.RMSNorm(WIDTH),
    "by hand": lambda: Scaled(by_hand),
    "root mean square": lambda: Scaled(root_mean_square),
    "response": lambda: Scaled(response),
    "gate": lambda: Scaled(gate),
    "one group": lambda: Swapped(nn.GroupNorm(1, WIDTH)),
}


class Swapped(nn.Module):
    """A module that takes channels second, given them last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Stream(nn.Module):
    """A residual stream of two blocks, each behind its norm."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.position = nn.Parameter(torch.randn(4, WIDTH))
        self.norms = nn.ModuleList(norm() for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 64) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(64, WIDTH) for _ in range(2))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.position
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            x = x + down(up(norm(x)).relu())
        return self.last(self.norms[-1](x))


def analysed(model: nn.Module, *inputs: Tensor) -> tuple[CanonicalModel, Graph]:
    plain = canonical(model.eval(), inputs)
    return plain, analyse(plain, inputs)


class Other(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(5, WIDTH), nn.Linear(width, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))
