"""A small Conformer with a CTC head (Gulati et al. 2020, arXiv:2005.08100): the model of the built-in task ``speech``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

ROTARY_BASE = 1000.0  # wavelengths from 6 to some thousand steps; there are 50 in a window


class Subsampling(nn.Module):
    """Two convolutions of stride 2 over time and frequency: ``[N, T, bands]`` to ``[N, T/4, width]``."""

    def __init__(self, bands: int, channels: int, width: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, channels, 3, 2, 1), nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, 1), nn.ReLU()
        )
        self.project = nn.Linear(channels * bands // 4, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolutions(x.unsqueeze(1)).transpose(1, 2).flatten(2)
        result: Tensor = self.project(y)
        return result


class FeedForward(nn.Module):
    """A hidden layer behind a norm; a block has one before and one after, and adds half of each."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(functional.silu(self.into(self.norm(x))))
        return result


class RotaryAttention(nn.Module):
    """Self-attention of ``[N, L, width]`` whose queries and keys are turned by their position (Su et al. 2021, arXiv:2104.09864).

    The number of heads is read off the projections, so that heads can be removed.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        half = self.head_dim // 2
        angles = torch.arange(length)[:, None] * ROTARY_BASE ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        normed = self.norm(x)
        query, key, value = (
            layer(normed).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(self._turned(query), self._turned(key), value)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return result

    def _turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * self.cos - second * self.sin, first * self.sin + second * self.cos), -1)


class Convolution(nn.Module):
    """Pointwise with a gate (GLU), depthwise over time, BatchNorm, SiLU, pointwise, over ``[N, L, width]``."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gated = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.glu(self.gated(self.norm(x).transpose(1, 2)), 1)
        y = self.out(functional.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)
        result: Tensor = y
        return result


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm (ibid., figure 1)."""

    def __init__(self, width: int, heads: int, hidden: int, length: int, kernel: int) -> None:
        super().__init__()
        self.before = FeedForward(width, hidden)
        self.attention = RotaryAttention(width, heads, length)
        self.convolution = Convolution(width, kernel)
        self.after = FeedForward(width, hidden)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        x = x + self.attention(x)
        x = x + self.convolution(x)
        result: Tensor = self.norm(x + 0.5 * self.after(x))
        return result


class Conformer(nn.Module):
    """Log-mel frames ``[N, frames, bands]`` to logits of characters ``[N, frames/4, characters]``."""

    def __init__(
        self,
        *,
        bands: int,
        frames: int,
        characters: int,
        channels: int,
        width: int,
        heads: int,
        hidden: int,
        depth: int,
        kernel: int,
    ) -> None:
        super().__init__()
        self.subsampling = Subsampling(bands, channels, width)
        self.blocks = nn.Sequential(*(ConformerBlock(width, heads, hidden, frames // 4, kernel) for _ in range(depth)))
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(self.subsampling(x)))
        return result
