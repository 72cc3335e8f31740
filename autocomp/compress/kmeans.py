"""Codebooks fitted to weights: k-means weighted by what each weight matters, what one vector loses made up by the next."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from autocomp.compress.rounding import Feedback, Metric
from autocomp.layers.codebook import decode
from autocomp.records.precisions import CENTROIDS

SUBSAMPLE = 8192  # vectors that k-means runs on: 32 a centroid


SEEDS = 32  # centroids drawn at once: one by one takes eight times as long and ends no better


ITERATIONS = 10  # of Lloyd's algorithm; what later ones gain is lost in the noise of the subsample


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
    if metric.independent:  # no column can make up for another
        return plain.to(torch.uint8), codebook, scale
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
