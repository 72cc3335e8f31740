"""Self-attention and the pre-norm block that ViT and Whisper share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention of ``[N, L, dim]`` (Vaswani et al. 2017, arXiv:1706.03762), one linear layer for each projection.

    ``plain`` spells out products and softmax; otherwise torch's ``scaled_dot_product_attention`` is called.
    """

    def __init__(self, dim: int, heads: int, *, key_bias: bool = True, plain: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=key_bias), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.heads, self.plain = heads, plain

    def split(self, x: Tensor) -> Tensor:
        """``[N, L, dim]`` to ``[N, heads, L, dim / heads]``."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        if self.plain:
            scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
            mixed = torch.softmax(scores, -1) @ value
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class PreNormBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))`` with GELU."""

    def __init__(
        self, dim: int, heads: int, hidden: int, *, eps: float = 1e-5, key_bias: bool = True, plain: bool = False
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attention = Attention(dim, heads, key_bias=key_bias, plain=plain)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))
