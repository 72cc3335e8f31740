"""Reductions of floats, shapes, indices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from operation_cases.draw import (
    X,
    bools,
    case,
    floats,
    integers,
)

# ---------------------------------------------------------------- reductions of floats
for _name, _f in {
    "mean": lambda x: x.mean(),
    "mean 1": lambda x: x.mean(1),
    "mean dims": lambda x: x.mean((0, 2), keepdim=True),
    "var": lambda x: x.var(-1),
    "var biased": lambda x: x.var(1, unbiased=False),
    "std": lambda x: x.std(),
    "std 1": lambda x: x.std(1, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, 1),
    "std_mean": lambda x: torch.std_mean(x, -1),
    "norm": lambda x: x.norm(),
    "norm 1": lambda x: x.norm(dim=1),
    "norm p1": lambda x: x.norm(p=1, dim=-1),
    "norm inf": lambda x: x.norm(p=float("inf"), dim=-1),
    "linalg norm": lambda x: torch.linalg.norm(x, dim=-1),
    "vector_norm 3": lambda x: torch.linalg.vector_norm(x, 3, dim=1),
    "vector_norm 0": lambda x: torch.linalg.vector_norm(x, 0, dim=1),
    "matrix_norm": lambda x: torch.linalg.matrix_norm(x),
    "logsumexp": lambda x: x.logsumexp(-1),
    "logsumexp dims": lambda x: torch.logsumexp(x, (0, 2), keepdim=True),
    "logcumsumexp": lambda x: x.logcumsumexp(-1),
    "median": lambda x: x.median(-1).values,
    "median all": lambda x: x.median(),
    "nansum": lambda x: x.nansum(1),
    "nanmean": lambda x: x.nanmean(1),
    "quantile": lambda x: x.quantile(0.5, dim=-1),
    "dist": lambda x: torch.dist(x, x * 0.5),
    "mean dtype": lambda x: x.mean(1, dtype=torch.float32),
    "softmax of sum": lambda x: x.sum(1).softmax(-1),
    "cosine": lambda x: F.cosine_similarity(x, x + 1, dim=-1),
    "mse": lambda x: F.mse_loss(x, x * 0.5),
    "l1": lambda x: F.l1_loss(x, x * 0.5),
    "smooth l1": lambda x: F.smooth_l1_loss(x, x * 0.5),
    "bce logits": lambda x: F.binary_cross_entropy_with_logits(x, torch.sigmoid(x + 1)),
    "pairwise": lambda x: F.pairwise_distance(x[0], x[1]),
    "cdist": lambda x: torch.cdist(x, x + 1),
    "pdist-free": lambda x: (x[:, :, None] - x[:, None]).pow(2).sum(-1),
    "histc-free bucketize": lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])),
    "searchsorted": lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x),
    "cov": lambda x: torch.cov(x[0]),
    "trapezoid": lambda x: torch.trapezoid(x),
}.items():
    case(_name, _f, X)


# ---------------------------------------------------------------- shapes and data movement
for _name, _f in {
    "view": lambda x: x.view(6, 4),
    "view -1": lambda x: x.view(2, -1),
    "reshape": lambda x: x.transpose(1, 2).reshape(2, 12),
    "flatten": lambda x: x.flatten(1),
    "flatten all": lambda x: x.flatten(),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "squeeze all": lambda x: x[:1, :1].squeeze(),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(0, 2),
    "t": lambda x: x[0].t(),
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim(0, -1),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 5),
    "expand_as": lambda x: x[:1].expand_as(x) + x,
    "expand new": lambda x: x[0].expand(3, 3, 4),
    "repeat": lambda x: x.repeat(1, 2, 3),
    "repeat new": lambda x: x.repeat(2, 1, 1, 1),
    "tile": lambda x: x.tile(2),
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "cat -1": lambda x: torch.cat([x, x, x[..., :1]], -1),
    "cat with empty": lambda x: torch.cat([torch.zeros(0), x], 1),
    "cat with empty shaped": lambda x: torch.cat([x[:, :0], x], 1),
    "cat empties": lambda x: torch.cat([x.new_zeros(2, 0, 4), x, x.new_zeros(2, 0, 4)], -2),
    "cat mixed": lambda x: torch.cat([x, (x > 0).long()], 1),
    "stack": lambda x: torch.stack([x, x + 1], -1),
    "stack 0": lambda x: torch.stack([x, x]),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x, x]),
    "split": lambda x: x.split(2, -1),
    "split uneven": lambda x: x.split(3, -1),
    "split sizes": lambda x: x.split([1, 3], -1),
    "chunk": lambda x: x.chunk(2, 1),
    "tensor_split": lambda x: x.tensor_split(3, -1),
    "unbind": lambda x: x.unbind(1),
    "unbind 0": lambda x: x.unbind(),
    "slice": lambda x: x[:, 1:3],
    "slice step": lambda x: x[:, ::2],
    "slice negative": lambda x: x[..., -2:],
    "slice end": lambda x: x[..., :-1],
    "slice beyond": lambda x: x[:, 1:100],
    "slice steps": lambda x: x[..., 1::2],
    "select": lambda x: x[:, 0],
    "select -1": lambda x: x[:, -1],
    "select last axis": lambda x: x[..., -1],
    "ellipsis None": lambda x: x[..., None, :],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "index list": lambda x: x[:, [0, 2]],
    "index tensor": lambda x: x[:, torch.tensor([2, 0, 1])],
    "index negative": lambda x: x[:, torch.tensor([-1, 0])],
    "index two": lambda x: x[torch.tensor([0, 1]), torch.tensor([2, 1])],
    "index apart": lambda x: x[torch.tensor([0, 1]), :, torch.tensor([2, 1])],
    "index grid": lambda x: x[torch.arange(2)[:, None], torch.tensor([[0, 2], [1, 1]])],
    "index two from 1": lambda x: x[:, torch.tensor([0, 1]), torch.tensor([2, 1])],
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "gather": lambda x: x.gather(1, torch.tensor([[[0, 1, 2, 0]], [[2, 2, 1, 1]]])),
    "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(-1), -1),
    "take": lambda x: torch.take(x, torch.tensor([0, 5, -1])),
    "diagonal": lambda x: x.diagonal(dim1=1, dim2=2),
    "diagonal offset": lambda x: x.diagonal(1, 1, 2),
    "diag_embed": lambda x: torch.diag_embed(x),
    "diag": lambda x: torch.diag(x[0, 0]),
    "unfold": lambda x: x.unfold(-1, 2, 1),
    "unfold step": lambda x: x.unfold(2, 2, 2),
    "as_strided": lambda x: x.as_strided((2, 2), (12, 1)),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0], x[0, 1, :3], indexing="ij"),
    "meshgrid xy": lambda x: torch.meshgrid(x[0, 0], x[0, 1, :3], indexing="xy"),
    "cartesian": lambda x: torch.cartesian_prod(x[0, 0], x[0, 1]),
    "fliplr": lambda x: x.fliplr(),
    "index_put": lambda x: x.index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(5.0)),
    "assign slice": lambda x: _assigned(x),
    "assign masked": lambda x: _assigned_mask(x),
    "scatter": lambda x: x.scatter(1, torch.tensor([[[0, 1, 2, 0]], [[2, 2, 1, 1]]]), 9.0),
    "scatter src": lambda x: x.scatter(1, torch.tensor([[[0, 1, 2, 0]], [[2, 2, 1, 1]]]), x * 2),
    "scatter_add": lambda x: x.scatter_add(1, torch.tensor([[[0, 1, 2, 0]], [[2, 2, 1, 1]]]), x * 2),
    "index_add": lambda x: x.index_add(1, torch.tensor([0, 2]), x[:, :2]),
    "index_copy": lambda x: x.index_copy(1, torch.tensor([0, 2]), x[:, 1:]),
    "index_fill": lambda x: x.index_fill(1, torch.tensor([0, 2]), 7.0),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, :1] * 3, 1, 1, 2),
    "select_scatter": lambda x: torch.select_scatter(x, x[:, 0] * 3, 1, 2),
    "masked_scatter-free": lambda x: torch.where(x > 0, x, x.mean()),
    "pad": lambda x: F.pad(x, (1, 2)),
    "pad 2": lambda x: F.pad(x, (1, 2, 0, 1), value=3.0),
    "pad crop": lambda x: F.pad(x, (-1, 1)),
    "pad all": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "pad reflect": lambda x: F.pad(x, (1, 2), mode="reflect"),
    "pad replicate": lambda x: F.pad(x, (1, 2), mode="replicate"),
    "pad circular": lambda x: F.pad(x, (1, 2), mode="circular"),
    "arange": lambda x: x + torch.arange(4),
    "arange float": lambda x: x + torch.arange(0, 2, 0.5),
    "arange size": lambda x: x * torch.arange(x.shape[-1], dtype=torch.float32),
    "linspace": lambda x: x + torch.linspace(0, 1, 4),
    "eye": lambda x: x[:, :, :3] + torch.eye(3),
    "ones": lambda x: x + torch.ones(4),
    "zeros int": lambda x: x + torch.zeros(4, dtype=torch.long),
    "full": lambda x: x + torch.full((4,), 1.5),
    "tril of ones": lambda x: x @ torch.ones(4, 4).tril(),
    "causal mask": lambda x: x.mT.matmul(x).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf")).softmax(-1),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().view(2, 12),
    "clone": lambda x: x.clone() + 1,
    "detach": lambda x: x.detach() * 2,
    "view_as": lambda x: x.view_as(x) + 1,
    "size arithmetic": lambda x: x.view(x.size(0), x.size(1) * x.size(2)),
    "view dtype-free": lambda x: x.reshape(-1, 2),
    "atleast": lambda x: torch.atleast_2d(x[0, 0]),
    "ravel": lambda x: x.ravel(),
    "block_diag": lambda x: torch.block_diag(x[0], x[1]),
    "kron": lambda x: torch.kron(x[0], x[1, :2, :2]),
    "outer": lambda x: torch.outer(x[0, 0], x[0, 1]),
    "cross": lambda x: torch.linalg.cross(x[:, :, :3], x[:, :, 1:]),
    "tensordot": lambda x: torch.tensordot(x, x, ([1, 2], [1, 2])),
    "vdot": lambda x: torch.dot(x[0, 0], x[1, 0]),
    "renorm-free": lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1),
    "unsafe split": lambda x: torch.unsafe_split(x, 2, -1),
    "pixel 1d": lambda x: x.reshape(2, 3, 2, 2).permute(0, 2, 1, 3).flatten(2),
    "positions": lambda x: torch.arange(x.shape[1]).unsqueeze(0).expand(x.shape[0], -1),
    "bool output": lambda x: x > 0,
    "int output": lambda x: x.argmax(-1),
    "input as output": lambda x: (x, x * 2),
    "constant output": lambda x: (x * 2, torch.ones(3)),
    "same output twice": lambda x: (x + 1,) * 2,
    "view of input": lambda x: x.view(2, 12),
    "nested outputs": lambda x: [x, (x + 1, [x * 2])],
    "dict output": lambda x: {"a": x + 1, "b": (x * 2, x > 0)},
    "None in outputs": lambda x: (x + 1, None, x * 2),
    "zero dim output": lambda x: x.sum(),
    "int constant output": lambda x: (x, x.shape[0]),
    "empty output": lambda x: (x + 1, x[:, :0]),
}.items():
    case(_name, _f, X)


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = 0
    y[..., -1] += 2
    y[0, :2] = x[1, 1:]
    return y


def _assigned_mask(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0.5] = -1.0
    return y


case("assign strided", lambda x: _strided(x), X)


def _strided(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, ::2] = x[:, :2]
    return y


case("embedding", lambda i, w: F.embedding(i, w), integers(2, 5, low=0, high=7), floats(7, 4))
case("embedding int32", lambda i, w: F.embedding(i, w), integers(2, 5, low=0, high=7, dtype=torch.int32), floats(7, 4))
case(
    "embedding padding_idx", lambda i, w: F.embedding(i, w, padding_idx=0), integers(2, 5, low=0, high=7), floats(7, 4)
)
case("embedding_bag", lambda i, w: F.embedding_bag(i, w, mode="mean"), integers(2, 5, low=0, high=7), floats(7, 4))
case("one_hot", lambda i: F.one_hot(i, 7), integers(2, 5, low=0, high=7))
case("index by input", lambda i, w: w[i], integers(2, 5, low=0, high=7), floats(7, 4))
case("index by negative input", lambda i, w: w[:, i], integers(2, 5, low=-4, high=4), floats(7, 4))
case("gather by input", lambda i, w: torch.gather(w, 1, i), integers(2, 3, low=0, high=4), floats(2, 4))
case("mask where", lambda m, x: x * m.unsqueeze(-1), bools(2, 3), X)
case("mask to additive", lambda m: (1.0 - m[:, None, None, :].float()) * torch.finfo(torch.float32).min, bools(2, 3))
case("padding mask positions", lambda m: torch.cumsum(m, 1).type_as(m) * m + 1, integers(2, 5, low=0, high=2))
case("int mask cumsum", lambda m: (m.long().cumsum(-1) - 1).masked_fill(m == 0, 1), integers(2, 5, low=0, high=2))
case("relative buckets", lambda x: _buckets(x), floats(1, 1))


def _buckets(x: Tensor) -> Tensor:
    """T5's relative positions: logarithms of integers."""
    position = torch.arange(9)
    relative = position[None, :] - position[:, None]
    bucket = (relative > 0).to(torch.long) * 8
    relative = torch.abs(relative)
    large = 4 + (torch.log(relative.clamp(min=1).float() / 4) / 2.0 * 4).to(torch.long)
    large = torch.min(large, torch.full_like(large, 7))
    return bucket + torch.where(relative < 4, relative, large) + x.long() * 0
