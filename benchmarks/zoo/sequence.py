"""Text and speech models: BERT layers, Whisper's encoder, Conformer-CTC, LSTM and GRU. As ``vision``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.attention import Attention, PreNormBlock
from zoo.inputs import settle, smooth_noise

Built = tuple[nn.Module, tuple[Tensor, ...]]


class _BertLayer(nn.Module):
    """Post-norm encoder layer: the norm follows each residual addition."""

    def __init__(self, dim: int, heads: int, plain: bool) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, plain=plain)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


def bert_x4(*, small: bool = False, batch: int = 1, plain: bool = True) -> Built:
    """Four layers of BERT-base, 28.35 M parameters, on embedded tokens (Devlin et al. 2019, arXiv:1810.04805, section 3)."""
    torch.manual_seed(0)
    dim, heads, depth, tokens = (48, 4, 2, 13) if small else (768, 12, 4, 128)
    model = nn.Sequential(*(_BertLayer(dim, heads, plain) for _ in range(depth)))
    return settle(model), (smooth_noise(batch, tokens, dim),)


def _sinusoids(length: int, dim: int) -> Tensor:
    """Sines then cosines of geometrically spaced wavelengths, ``[length, dim]``."""
    rates = torch.exp(-math.log(10_000) / (dim // 2 - 1) * torch.arange(dim // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class _WhisperEncoder(nn.Module):
    def __init__(self, mels: int, frames: int, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(mels, dim, 3, padding=1), nn.Conv1d(dim, dim, 3, 2, 1)
        self.register_buffer("positions", _sinusoids(frames, dim))
        self.blocks = nn.Sequential(*(PreNormBlock(dim, heads, 4 * dim, key_bias=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.conv2(functional.gelu(self.conv1(x))))
        return self.norm(self.blocks(x.transpose(1, 2) + self.positions))


def whisper_tiny(*, small: bool = False, batch: int = 1) -> Built:
    """Encoder of Whisper-tiny on 30 s of log-mel frames, 7.63 M parameters (Radford et al. 2023, arXiv:2212.04356, table 1)."""
    torch.manual_seed(0)
    mels, frames, dim, heads, depth = (20, 25, 48, 3, 1) if small else (80, 1500, 384, 6, 4)
    model = _WhisperEncoder(mels, frames, dim, heads, depth)
    return settle(model), (smooth_noise(batch, mels, 2 * frames),)


class _RelativeAttention(Attention):
    """Self-attention with relative positions (Dai et al. 2019, arXiv:1901.02860, section 3.3)."""

    def __init__(self, dim: int, heads: int, frames: int) -> None:
        super().__init__(dim, heads)
        self.position = nn.Linear(dim, dim, bias=False)
        self.content_bias = nn.Parameter(0.1 * torch.randn(heads, 1, dim // heads))
        self.position_bias = nn.Parameter(0.1 * torch.randn(heads, 1, dim // heads))
        distance = torch.arange(frames - 1, -frames, -1)
        rates = torch.exp(-math.log(10_000) / dim * torch.arange(0, dim, 2))
        angles = distance[:, None] * rates
        self.register_buffer("distances", torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[None])

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        position = self.split(self.position(self.distances))
        content = (query + self.content_bias) @ key.transpose(2, 3)
        by_distance = (query + self.position_bias) @ position.transpose(2, 3)
        scores = (content + _shift(by_distance)) * query.shape[3] ** -0.5
        return self.out((torch.softmax(scores, -1) @ value).transpose(1, 2).flatten(2))


def _shift(scores: Tensor) -> Tensor:
    """``[N, H, L, 2L-1]`` by distance to ``[N, H, L, L]`` by key: row i starts at L-1-i (ibid., appendix B)."""
    n, heads, length, width = scores.shape
    padded = functional.pad(scores, (1, 0)).reshape(n, heads, width + 1, length)
    return padded[:, :, 1:].reshape(n, heads, length, width)[:, :, :, :length]


class _Convolution(nn.Module):
    """Pointwise with GLU, depthwise, BatchNorm, SiLU, pointwise, over ``[N, L, dim]``."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gated = nn.Conv1d(dim, 2 * dim, 1)
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.batch_norm, self.out = nn.BatchNorm1d(dim), nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.glu(self.gated(self.norm(x).transpose(1, 2)), 1)
        return self.out(functional.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)


class _ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm (Gulati et al. 2020, figure 1)."""

    def __init__(self, dim: int, heads: int, frames: int, kernel: int) -> None:
        super().__init__()
        self.before, self.after = (
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
            for _ in range(2)
        )
        self.norm1, self.attention = nn.LayerNorm(dim), _RelativeAttention(dim, heads, frames)
        self.convolution, self.norm2 = _Convolution(dim, kernel), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.convolution(x)
        return self.norm2(x + 0.5 * self.after(x))


class _Conformer(nn.Module):
    def __init__(self, mels: int, frames: int, dim: int, heads: int, depth: int, kernel: int, tokens: int) -> None:
        super().__init__()
        self.subsample = nn.Sequential(nn.Conv2d(1, dim, 3, 2), nn.ReLU(), nn.Conv2d(dim, dim, 3, 2), nn.ReLU())

        def shrunk(size: int) -> int:  # by two convolutions of 3 and stride 2
            return ((size - 1) // 2 - 1) // 2

        self.project = nn.Linear(dim * shrunk(mels), dim)
        self.blocks = nn.Sequential(*(_ConformerBlock(dim, heads, shrunk(frames), kernel) for _ in range(depth)))
        self.head = nn.Linear(dim, tokens)

    def forward(self, x: Tensor) -> Tensor:
        y = self.subsample(x.unsqueeze(1)).transpose(1, 2).flatten(2)
        return functional.log_softmax(self.head(self.blocks(self.project(y))), -1)


def conformer_s(*, small: bool = False, batch: int = 1) -> Built:
    """Conformer-S encoder (16 blocks, d 144, 4 heads) with a CTC head of 128 tokens, on 4 s of log-mel frames; 8.7 M parameters.

    Gulati et al. 2020, arXiv:2005.08100, table 1: 10.3 M with the transducer's decoder, which CTC has not. The depthwise kernel is
    31, an odd size as published implementations have it, where the paper says 32.
    """
    torch.manual_seed(0)
    mels, frames, dim, heads, depth, tokens = (20, 60, 48, 4, 1, 20) if small else (80, 400, 144, 4, 16, 128)
    model = _Conformer(mels, frames, dim, heads, depth, 15 if small else 31, tokens)
    return settle(model, smooth_noise(2, frames, mels, seed=1)), (smooth_noise(batch, frames, mels),)


class _Recurrent(nn.Module):
    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.rnn = cell(inputs, hidden, layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def lstm(*, small: bool = False, batch: int = 1) -> Built:
    """Two bidirectional LSTM layers (Hochreiter & Schmidhuber 1997) over frames."""
    torch.manual_seed(0)
    steps, inputs, hidden = (4, 12, 16) if small else (100, 80, 256)
    return settle(_Recurrent(nn.LSTM, inputs, hidden, 2)), (smooth_noise(batch, steps, inputs),)


def gru(*, small: bool = False, batch: int = 1) -> Built:
    """Two bidirectional GRU layers (Cho et al. 2014, arXiv:1406.1078) over frames."""
    torch.manual_seed(0)
    steps, inputs, hidden = (4, 12, 16) if small else (100, 80, 256)
    return settle(_Recurrent(nn.GRU, inputs, hidden, 2)), (smooth_noise(batch, steps, inputs),)
