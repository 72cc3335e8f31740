"""Vector quantisation: weights as indices into codebooks of 256 centroids, decoded when a layer is run or compiled.

    vector[n, v] = sum over stages s of codebook[s, indices[n, s, v]]        codebook float16 [S, 256, d], indices uint8 [N, S, V]
    weight[n, k] = scale[n] * vector[n, k // d][k % d]                       scale float32 [N]; K is padded with zeros to V runs of d

The scale of a row keeps one codebook fit for all of them, and lets a BatchNorm fold in without touching the indices. What it wins is
size: no kernel reads indices, the decoded weight is multiplied in float32.

Centroids are found by k-means, every weight counting by the Hessian's diagonal and the Fisher information of its output; indices are then
chosen with the errors fed back (``rounding``; as GPTVQ, arXiv:2402.15319). Stages after the first quantise what the ones before left.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.compress.convolution import Convolution, Geometry, OneRow, convolved
from autocomp.compress.rounding import Feedback, Metric
from autocomp.precisions import CENTROIDS

SUBSAMPLE = 8192  # vectors that k-means runs on: 32 a centroid
SEEDS = 32  # centroids drawn at once: one by one takes eight times as long and ends no better
ITERATIONS = 10  # of Lloyd's algorithm; what later ones gain is lost in the noise of the subsample


def decode(indices: Tensor, codebook: Tensor, scale: Tensor, columns: int) -> Tensor:
    """The float32 weight [N, columns] that indices, codebooks and scales stand for."""
    centroids, chosen = codebook.float(), indices.long()
    vectors = centroids[0][chosen[:, 0]]
    for stage in range(1, len(centroids)):
        vectors = vectors + centroids[stage][chosen[:, stage]]
    return vectors.flatten(1)[:, :columns] * scale[:, None]


def fit(weight: Tensor, metric: Metric, fisher: Tensor, dim: int, stages: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (indices uint8 [N, S, V], codebook float16 [S, 256, d], scale float32 [N]) of a float64 weight [N, K].

    ``fisher`` [N] weighs the rows. A row whose fed-back indices come out worse than the nearest centroids keeps the nearest.
    """
    rows, columns = weight.shape
    width = -(-columns // dim) * dim
    metric = metric.padded(width)
    scale = weight.square().mean(1).sqrt().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    vectors = functional.pad(weight / scale.double()[:, None], (0, width - columns))
    matters = metric.diagonal().repeat_interleave(rows // metric.count, 0)  # [N, width]
    matters = matters * (fisher * scale.double().square())[:, None]
    books, left = [], vectors.reshape(-1, dim).float()
    weights = (matters / matters.mean().clamp_min(1e-300)).reshape(-1, dim).float()
    nearest = []
    for stage in range(stages):
        book = _kmeans(left, weights, seed=stage).half()
        chosen = _assign(left, weights, book.float())
        left = left - book.float()[chosen]
        books.append(book)
        nearest.append(chosen.view(rows, -1))
    codebook = torch.stack(books)
    plain = torch.stack(nearest, 1)
    fed = _with_feedback(vectors, metric, codebook.double())
    nears, feds = (decode(indices, codebook, torch.ones(rows), width).double() - vectors for indices in (plain, fed))
    indices = torch.where(metric.better(feds, nears)[:, None, None], fed, plain)
    return indices.to(torch.uint8), codebook, scale


def _kmeans(vectors: Tensor, weights: Tensor, seed: int) -> Tensor:
    """Return 256 centroids [256, d] of vectors [M, d] whose components weigh ``weights`` [M, d]; seeded as k-means++, several at once."""
    generator = torch.Generator().manual_seed(seed)
    if len(vectors) > SUBSAMPLE:
        some = torch.randperm(len(vectors), generator=generator)[:SUBSAMPLE]
        vectors, weights = vectors[some], weights[some]
    centroids = torch.zeros(CENTROIDS, vectors.shape[1])
    distance = (weights * vectors.square()).sum(
        1
    )  # the first centroid is zero: pruned and padded weights stay what they are
    for start in range(1, CENTROIDS, SEEDS):
        seeds = centroids[start : start + SEEDS]
        if int((distance > 0).sum()) < len(seeds):
            break  # fewer distinct vectors than centroids: the rest stay zero
        seeds.copy_(vectors[torch.multinomial(distance, len(seeds), generator=generator)])
        nearest = seeds[_assign(vectors, weights, seeds)]
        distance = torch.minimum(distance, (weights * (vectors - nearest).square()).sum(1))
    for _ in range(ITERATIONS):
        chosen = _assign(vectors, weights, centroids)
        mass = torch.zeros_like(centroids).index_add_(0, chosen, weights)
        total = torch.zeros_like(centroids).index_add_(0, chosen, weights * vectors)
        centroids = torch.where(mass > 0, total / mass.clamp_min(1e-30), centroids)
    return centroids


def _assign(vectors: Tensor, weights: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroid [M] of each vector under its own weights."""
    squares, chosen = centroids.square().T, []
    for x, w in zip(vectors.split(SUBSAMPLE), weights.split(SUBSAMPLE), strict=True):
        chosen.append(torch.addmm(w @ squares, x * w, centroids.T, alpha=-2.0).argmin(1))
    return torch.cat(chosen)


def _with_feedback(vectors: Tensor, metric: Metric, codebook: Tensor) -> Tensor:
    """Return indices [N, S, V] chosen run by run, what each loses moving into the runs after it."""
    stages, _, dim = codebook.shape
    rows, width = vectors.shape
    feedback = Feedback(vectors, metric, dim)
    indices = torch.zeros(rows, stages, width // dim, dtype=torch.long)
    for start in range(0, width, dim):
        run = slice(start, start + dim)
        saliency = feedback.scale[run].T.double().square()  # [B, d]
        weights = saliency[:, None, :].expand(-1, rows // metric.count, -1).flatten(0, 1)
        left = feedback.open[run].permute(1, 2, 0).flatten(0, 1).double()
        value = torch.zeros_like(left)
        for stage in range(stages):
            chosen = _assign(left - value, weights, codebook[stage])
            indices[:, stage, int(feedback.order[start]) // dim] = chosen
            value = value + codebook[stage][chosen]
        blocks = value.unflatten(0, (metric.count, -1))
        for offset in range(dim):
            feedback.settle(start + offset, blocks[..., offset].contiguous())
    return indices


class CodebookLinear(nn.Module):
    """A linear layer whose weight is ``weight`` (indices [N, S, V]), ``codebook`` and ``scale``; float32 ``bias`` [N]."""

    weight: Tensor
    codebook: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, codebook: Tensor, scale: Tensor, bias: Tensor, in_features: int) -> None:
        super().__init__()
        for name, value in {"weight": weight, "codebook": codebook, "scale": scale, "bias": bias}.items():
            self.register_buffer(name, value)
        self.in_features, self.out_features = in_features, weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.float_weight(), self.bias)

    def float_weight(self) -> Tensor:
        """The float32 weight [N, K] that is multiplied."""
        return decode(self.weight, self.codebook, self.scale, self.in_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, stages={len(self.codebook)}, dim={self.codebook.shape[2]}"


class CodebookConv2d(Convolution):
    """A convolution stored as `CodebookLinear` is; ``kernel`` is (inputs of a group, height, width), K their product."""

    codebook: Tensor
    scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        codebook: Tensor,
        scale: Tensor,
        bias: Tensor,
        kernel: tuple[int, ...],
        geometry: Geometry,
    ) -> None:
        super().__init__({"weight": weight, "codebook": codebook, "scale": scale, "bias": bias}, geometry)
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, self.float_weight(), self.bias, self.geometry)

    def float_weight(self) -> Tensor:
        """The float32 weight OIHW that is multiplied."""
        weight = decode(self.weight, self.codebook, self.scale, math.prod(self.kernel))
        return weight.unflatten(1, self.kernel)

    def extra_repr(self) -> str:
        return f"{self.sizes(self.kernel)}, stages={len(self.codebook)}, dim={self.codebook.shape[2]}"


class CodebookConv1d(OneRow, CodebookConv2d):
    """A convolution of ``[N, C, L]``."""
