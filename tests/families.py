"""Small nets of every structure that can be pruned: [N, ...] in, [N, 5] out; each is named after what it shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nets import images, randomise
from torch import Tensor, nn
from torch.nn import functional

from autocomp.graph.canonical import canonical
from autocomp.graph.program import CanonicalModel

HEADS, DIM, TOKENS = 4, 8, 6


class Attention(nn.Module):
    """Separate projections; ``groups`` heads of keys and values, each serving as many heads of queries."""

    def __init__(self, groups: int = HEADS, gqa: str = "") -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim, self.gqa = HEADS, groups, DIM, gqa
        self.all_heads, self.unrelated = HEADS * DIM, HEADS
        self.q, self.k, self.v = nn.Linear(24, HEADS * DIM), nn.Linear(24, groups * DIM), nn.Linear(24, groups * DIM)
        self.out = nn.Linear(HEADS * DIM, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (y.view(b, n, self.kv_heads, self.head_dim).transpose(1, 2) for y in (self.k(x), self.v(x)))
        if self.gqa == "repeat":
            k, v = (y.repeat_interleave(self.num_heads // self.kv_heads, 1) for y in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.gqa == "flag")
        return self.out(y.transpose(1, 2).reshape(b, n, self.all_heads))


class Fused(nn.Module):
    """One layer for queries, keys and values, split up in one of the usual ways; attention spelt out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.heads, self.how, self.scale = HEADS, how, DIM**-0.5
        self.qkv, self.proj = nn.Linear(24, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.how == "reshape":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (y.unflatten(-1, (-1, DIM)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Biased(nn.Module):
    """Bare parameters with a slice for each head, and products by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = HEADS
        self.q, self.k, self.v = (nn.Linear(24, HEADS * DIM) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(HEADS, 1, DIM))
        self.table = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))
        self.out = nn.Linear(HEADS * DIM, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (self.n_head, -1)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        scores = torch.einsum("bhid,bhjd->bhij", q + self.bias, k) * DIM**-0.5 + self.table
        return self.out(torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v).transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """torch's own attention, called as in a vision transformer or, with weights that nobody reads, as it is by default."""

    def __init__(self, need_weights: bool, batch_first: bool) -> None:
        super().__init__()
        self.need_weights, self.batch_first = need_weights, batch_first
        self.inner = nn.MultiheadAttention(24, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y, _ = self.inner(x, x, x, need_weights=self.need_weights)
        return y if self.batch_first else y.transpose(0, 1)


class Gated(nn.Module):
    """An FFN with a gate: halves of one layer (``glu``), or two layers (SwiGLU)."""

    def __init__(self, halves: bool) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(24, 64 if halves else 32), None if halves else nn.Linear(24, 32)
        self.down = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(functional.glu(y, -1) if self.gate is None else y * functional.silu(self.gate(x)))


class Summed(nn.Module):
    """Channels weighed by the mean of others, which stay, or go with the whole branch."""

    def __init__(self) -> None:
        super().__init__()
        self.summed, self.up, self.down = nn.Linear(24, 8), nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.summed(x).mean(2, keepdim=True)
        return self.down(functional.relu(self.up(x)) * torch.sigmoid(weight))


class Encoder(nn.Module):
    """A pre-norm block of attention and FFN over [N, TOKENS, 24], its mean classified."""

    def __init__(self, attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.ffn = nn.LayerNorm(24), attention, nn.LayerNorm(24), ffn
        self.positions, self.head = nn.Parameter(torch.randn(1, TOKENS, 24)), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        x = x + self.attention(self.norm1(x))
        x = x + self.ffn(self.norm2(x))
        return self.head(x.mean(1))


class Convolution(nn.Module):
    """A Conformer's convolution module: GLU over channels, depthwise, BatchNorm, over [N, TOKENS, 24]."""

    def __init__(self) -> None:
        super().__init__()
        self.gated, self.deep = nn.Conv1d(24, 64, 1), nn.Conv1d(32, 32, 3, padding=1, groups=32)
        self.norm, self.out = nn.BatchNorm1d(32), nn.Conv1d(32, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.glu(self.gated(x.transpose(1, 2)), 1)
        return self.out(functional.silu(self.norm(self.deep(y)))).transpose(1, 2)


class Dense(nn.Module):
    """DenseNet: every layer reads all before it, through a BatchNorm over the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * i) for i in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = torch.cat([x, layer(torch.relu(norm(x)))], 1)
        return self.head(torch.relu(self.norms[2](x)).mean((2, 3)))


class Inception(nn.Module):
    """Branches of several depths, concatenated; one half of what follows goes its own way; a learned slope."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 8, 1), nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.PReLU(16))
        self.pool, self.join = nn.AvgPool2d(3, 1, 1), nn.Conv2d(25, 32, 3, padding=1)
        self.up, self.down = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.join(torch.cat([self.left(x), self.right(x), self.pool(x)], 1)))
        first, second = y.chunk(2, 1)
        return self.head((torch.relu(self.up(first)) * torch.sigmoid(self.down(second))).mean((2, 3)))


class Grouped(nn.Module):
    """ResNeXt: a grouped convolution in the middle of a bottleneck; then channels shuffled between two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reduce = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 1, bias=False)
        self.norm, self.grouped = nn.BatchNorm2d(32), nn.Conv2d(32, 64, 3, padding=1, groups=8)
        self.expand, self.head = nn.Conv2d(64, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.grouped(torch.relu(self.norm(self.reduce(x)))))
        return self.head(torch.relu(x + self.expand(y)).mean((2, 3)))


class Inverted(nn.Module):
    """MobileNetV2: expansion, depthwise and projection, twice, with squeeze and excitation in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1)
        self.expand, self.deep, self.project = (
            nn.Conv2d(16, 48, 1),
            nn.Conv2d(48, 48, 3, 1, 1, groups=48),
            nn.Conv2d(48, 16, 1),
        )
        self.norm, self.squeeze, self.excite = nn.BatchNorm2d(48), nn.Conv2d(48, 8, 1), nn.Conv2d(8, 48, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.stem(x))
        y = functional.relu6(self.norm(self.deep(functional.relu6(self.expand(x)))))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(y)).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 24))


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, HEADS, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Again(nn.Module):
    """A module that is called twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.inner(x))


# name: (net, the group it is about, units of that group)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "ffn": (lambda: Encoder(Attention(), mlp()), "ffn.0", 64),
    "called twice": (lambda: Encoder(Attention(), Again(mlp())), "ffn.inner.0", 64),
    "heads": (lambda: Encoder(Attention(), mlp()), "attention.q", HEADS),
    "grouped heads": (lambda: Encoder(Attention(2, "repeat"), mlp()), "attention.q", 2),
    "grouped heads, flag": (lambda: Encoder(Attention(2, "flag"), mlp()), "attention.q", 2),
    "fused, reshaped": (lambda: Encoder(Fused("reshape"), mlp()), "attention.qkv", HEADS),
    "fused, in chunks": (lambda: Encoder(Fused("chunk"), mlp()), "attention.qkv", HEADS),
    "heads with bare parameters": (lambda: Encoder(Biased(), mlp()), "attention.q", HEADS),
    "torch's heads": (lambda: Encoder(Packed(False, True), mlp()), "attention.inner.in_proj_weight", HEADS),
    "torch's heads, weights unread": (
        lambda: Encoder(Packed(True, False), mlp()),
        "attention.inner.in_proj_weight",
        HEADS,
    ),
    "torch's encoder": (lambda: Encoder(torch_encoder(), mlp()), "attention.layers.1.self_attn.in_proj_weight", HEADS),
    "torch's encoder, ffn": (lambda: Encoder(torch_encoder(), mlp()), "attention.layers.0.linear1", 48),
    "summed": (lambda: Encoder(Summed(), mlp()), "attention.up", 32),
    "halves gated": (lambda: Encoder(Attention(), Gated(True)), "ffn.up", 32),
    "two layers gated": (lambda: Encoder(Attention(), Gated(False)), "ffn.up", 32),
    "conformer": (lambda: Encoder(Attention(), Convolution()), "ffn.gated", 32),
    "densenet": (Dense, "stem", 32),
    "inception": (Inception, "left", 24),
    "chunks": (Inception, "join", 32),
    "resnext": (Grouped, "reduce", 8),
    "inverted": (Inverted, "expand", 48),
}
# Those that between them have every kind of unit.
STRUCTURES = (
    "fused, in chunks", "grouped heads", "heads with bare parameters", "torch's encoder", "conformer", "densenet", "chunks",
    "resnext", "called twice",
)  # fmt: skip


def make(name: str) -> CanonicalModel:
    """The net of a family with a fixed seed, in canonical form."""
    torch.manual_seed(0)
    return canonical(randomise(FAMILIES[name][0]()), (samples(name, 2),))


def samples(name: str, count: int = 64) -> Tensor:
    """Inputs of a family's net."""
    if not isinstance(FAMILIES[name][0](), Encoder):
        return images(count)
    return torch.randn(count, TOKENS, 24, generator=torch.Generator().manual_seed(1))
