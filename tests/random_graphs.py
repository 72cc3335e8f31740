"""Small graphs at random: products, elementwise steps, reductions and movements around each other, in every order."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn


class RandomMaps(nn.Module):
    """Steps on feature maps [N, C, H, W]; any earlier value of the same shape may be read again."""

    def __init__(self, seed: int, channels: int, steps: int = 8) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, int, int, int]] = []
        kinds = [
            "conv",
            "depthwise",
            "pointwise",
            "affine",
            "add",
            "multiply",
            "activation",
            "gate",
            "norm",
            "pool",
            "split",
            "scale",
        ]
        for _ in range(steps):
            kind = draw.choice(kinds)
            layer = -1
            if kind in ("conv", "depthwise", "pointwise", "gate", "norm"):
                layer = len(self.layers)
                made: nn.Module = {
                    "conv": lambda: nn.Conv2d(channels, channels, 3, padding=1),
                    "depthwise": lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
                    "pointwise": lambda: nn.Conv2d(channels, channels, 1, bias=draw.random() < 0.5),
                    "gate": lambda: nn.Conv2d(channels, channels, 1),
                    "norm": lambda: nn.GroupNorm(1, channels),
                }[kind]()
                self.layers.append(made)
            self.steps.append((kind, layer, draw.randrange(1 << 16), draw.randrange(1 << 16)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for kind, layer, one, two in self.steps:
            # the last value is the likeliest, so that chains grow that can be fused
            a = values[-1] if one % 3 else values[one % len(values)]
            b = values[two % len(values)]
            values.append(self._step(kind, layer, a, b, one))
        return values[-1], values[len(values) // 2]

    def _step(self, kind: str, layer: int, a: Tensor, b: Tensor, number: int) -> Tensor:
        if kind in ("conv", "depthwise", "pointwise", "norm"):
            return self.layers[layer](a)
        if kind == "gate":
            return b * torch.sigmoid(self.layers[layer](a.mean((2, 3), keepdim=True)))
        if kind == "affine":
            return a * 2 + 1
        if kind == "add":
            return a + b
        if kind == "multiply":
            return torch.tanh(a) * torch.tanh(b)
        if kind == "activation":
            return _ACTIVATIONS[number % len(_ACTIVATIONS)](a)
        if kind == "pool":
            return nn.functional.avg_pool2d(a, 3, 1, 1) - a
        if kind == "split":
            left, right = a.chunk(2, 1)
            return torch.cat([right, torch.relu(left)], 1)
        return a / (1 + b.square().mean(1, keepdim=True))


class RandomTokens(nn.Module):
    """The same on sequences [N, L, D]."""

    def __init__(self, seed: int, width: int, steps: int = 8) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, int, int, int]] = []
        kinds = [
            "linear",
            "norm",
            "affine",
            "add",
            "multiply",
            "activation",
            "softmax",
            "mix",
            "scale",
            "shift",
            "heads",
        ]
        for _ in range(steps):
            kind = draw.choice(kinds)
            layer = -1
            if kind in ("linear", "norm"):
                layer = len(self.layers)
                self.layers.append(
                    nn.Linear(width, width, bias=draw.random() < 0.5) if kind == "linear" else nn.LayerNorm(width)
                )
            self.steps.append((kind, layer, draw.randrange(1 << 16), draw.randrange(1 << 16)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for kind, layer, one, two in self.steps:
            a = values[-1] if one % 3 else values[one % len(values)]
            values.append(self._step(kind, layer, a, values[two % len(values)], one))
        return values[-1], values[len(values) // 2]

    def _step(self, kind: str, layer: int, a: Tensor, b: Tensor, number: int) -> Tensor:
        if kind in ("linear", "norm"):
            return self.layers[layer](a)
        if kind == "affine":
            return a * 2 + 1
        if kind == "add":
            return a + b
        if kind == "multiply":
            return torch.tanh(a) * torch.tanh(b)
        if kind == "activation":
            return _ACTIVATIONS[number % len(_ACTIVATIONS)](a)
        if kind == "softmax":
            return a.softmax(-1 if number % 2 else 1)
        if kind == "mix":
            return (a @ b.transpose(1, 2) / a.shape[-1]).tanh() @ b
        if kind == "scale":
            return a / (1 + b.square().mean(-1, keepdim=True))
        if kind == "shift":
            return torch.cat([a[:, 1:], b[:, :1]], 1)
        n, length, width = a.shape
        return a.reshape(n, length, 2, width // 2).transpose(1, 2).transpose(1, 2).flip(2).reshape(n, length, width)


_ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    torch.relu, torch.sigmoid, nn.functional.gelu, nn.functional.silu, nn.functional.hardswish, lambda x: x.clamp(0, 6),
]  # fmt: skip


class Together(nn.Module):
    """Several graphs that are compiled as one, each with an input of its own."""

    def __init__(self, graphs: list[nn.Module]) -> None:
        super().__init__()
        self.graphs = nn.ModuleList(graphs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for graph, x in zip(self.graphs, inputs, strict=True) for value in graph(x))
