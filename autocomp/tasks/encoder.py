"""A small Transformer encoder that classifies every token of a sequence: the model of the built-in task ``tokens``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

INITIAL = (
    0.3  # scale of untrained embeddings: with torch's 1 they drown what the blocks add, and training starts slowly
)


class Attention(nn.Module):
    """Self-attention of ``[N, L, width]`` (Vaswani et al. 2017, arXiv:1706.03762) with a linear layer per projection.

    The number of heads is read off the projections, so that heads can be removed.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            layer(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return result


class EncoderBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``: the pre-norm form (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.ffn(self.norm2(x))
        return result


class Encoder(nn.Module):
    """Embeddings of tokens and positions, blocks, norm, classifier.

    Takes token numbers ``[N, length]`` int64, returns logits ``[N, length, classes]``. Positions start as sines: the
    neighbour of a position is then a rotation of it, which attention learns to find in a few hundred steps.
    """

    def __init__(
        self, vocabulary: int, length: int, width: int, heads: int, hidden: int, depth: int, classes: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        angles = torch.arange(length)[:, None] / 100 ** (torch.arange(0, width, 2) / width)
        self.position = nn.Parameter(INITIAL * torch.stack((angles.sin(), angles.cos()), 2).flatten(1))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)
        with torch.no_grad():
            self.embedding.weight.mul_(INITIAL)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.embedding(tokens) + self.position)
        result: Tensor = self.classifier(self.norm(x))
        return result
