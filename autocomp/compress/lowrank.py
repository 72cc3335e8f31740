"""Low-rank factors of a layer, best on the calibration data: SVD for matrices, Tucker-2 and spatial SVD for convolution kernels.

All solve a reduced-rank regression: the factors minimise the Fisher-weighted output error under the covariance of the
inputs that are kept (whitening as in SVD-LLM, arXiv:2403.07378; Tucker-2 as in arXiv:1511.06530 and the k x 1, 1 x k
kernels of arXiv:1405.3866, their factors fitted to outputs instead of weights). One decomposition serves every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from autocomp.compress.prune import cholesky, damped


@dataclass(frozen=True)
class Factors:
    """Factors in the order they are applied, float64.

    The first is a matrix [r, p] applied at each of ``taps`` places: its inputs are columns (p, tap), its outputs (r, tap). SVD: [r, K],
    [O, r] and one place. Spatial: [r, C * height], [O, r, width], a place for each column of the kernel. Tucker-2: [r1, C],
    [r2, r1, taps], [O, r2].
    """

    parts: tuple[Tensor, ...]
    taps: int = 1

    @property
    def product(self) -> Tensor:
        """The matrix [O, K] that the factors amount to."""
        return self.after(0)

    def after(self, stage: int) -> Tensor:
        """The matrix from the features that enter factor ``stage`` to the outputs."""
        matrix = self.parts[-1].flatten(1)
        for part in self.parts[max(stage, 1) : -1]:  # the core of three
            matrix = matrix @ part.flatten(1)
        if stage == 0:
            by_tap = matrix.unflatten(1, (len(self.parts[0]), self.taps))
            matrix = torch.einsum("oat,ap->opt", by_tap, self.parts[0]).flatten(1)
        return matrix

    def rows(self, stage: int, features: Tensor) -> Tensor:
        """Features [S, columns] as the rows that factor ``stage`` is multiplied by: the first one's has a row for each place."""
        if stage or self.taps == 1:
            return features
        result: Tensor = features.unflatten(1, (-1, self.taps)).transpose(1, 2).flatten(0, 1)
        return result

    def metric(self, stage: int, covariance: Tensor) -> Tensor:
        """The covariance of `rows`, given that of the features."""
        if stage or self.taps == 1:
            return covariance
        return _over_taps(covariance, self.taps)

    def spread(self, stage: int, values: Tensor) -> Tensor:
        """Values by column of `rows` as values by feature."""
        return values if stage else values.repeat_interleave(self.taps)

    def apply(self, stage: int, features: Tensor, factor: Tensor) -> Tensor:
        """What ``factor``, in the place of factor ``stage``, makes of features."""
        if stage:
            return features @ factor.flatten(1).T.to(features.dtype)
        return _lift(features, factor.to(features.dtype), self.taps)

    def carry(self, stage: int, covariance: Tensor, factor: Tensor) -> Tensor:
        """The covariance of what `apply` makes of features with this one."""
        return self.apply(stage, self.apply(stage, covariance, factor).T.contiguous(), factor)


def _lift(rows: Tensor, factor: Tensor, taps: int) -> Tensor:
    """Apply a factor [r, p] to rows [S, p * taps] at every place → [S, r * taps]."""
    if taps == 1:
        return rows @ factor.T
    return torch.einsum("spt,rp->srt", rows.unflatten(1, (-1, taps)), factor).flatten(1)


def _over_taps(covariance: Tensor, taps: int) -> Tensor:
    """The covariance [p, p] of the inputs at one place, averaged over places, from that of columns (p, tap)."""
    size = len(covariance) // taps
    return covariance.view(size, taps, size, taps).diagonal(dim1=1, dim2=3).mean(-1)


class Whitened:
    """The factors of one weight [O, K] at any ranks: ``factors`` of one rank are SVD or spatial, of two Tucker-2.

    ``covariance`` [K, K] is that of the inputs, ``fisher`` [O] weighs the outputs, ``kernel`` is (height, width). At full ranks the
    product is ``weight``.
    """

    def __init__(self, weight: Tensor, covariance: Tensor, fisher: Tensor, kernel: Sequence[int]) -> None:
        self.weight, self.covariance, self.fisher, self.kernel = weight, damped(covariance), fisher, kernel
        self._plain = covariance
        self._bases: dict[int, tuple[Tensor, Tensor]] = {}
        self._cores: dict[int, tuple[Tensor, _Decomposed]] = {}

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        height, width = self.kernel
        if len(ranks) == 2:
            first, core = self._core(ranks[0])
            inner, last = core.at(ranks[1])
            taps = height * width
            return Factors((first, inner.view(-1, ranks[0], taps), last), taps)
        if height * width == 1:
            return Factors(self._whole.at(ranks[0]))
        first = self._first(width, ranks[0])
        fitted, _ = self._regressed(first, width)
        return Factors((first, fitted.view(-1, ranks[0], width)), width)

    @cached_property
    def _whole(self) -> _Decomposed:
        return _Decomposed(self.weight, self.covariance, self.fisher)

    def _first(self, taps: int, rank: int) -> Tensor:
        """The first factor [rank, p]: the leading left singular vectors of the weighted kernel, whitened by place."""
        if taps not in self._bases:
            lower = cholesky(damped(_over_taps(self._plain, taps)))
            weighted = (self.fisher.sqrt()[:, None] * self.weight).unflatten(1, (-1, taps))
            unfolded = lower.T @ weighted.permute(1, 0, 2).flatten(1)
            # The left singular vectors of a wide matrix, from the small Gram matrix of its rows.
            self._bases[taps] = lower, torch.linalg.eigh(unfolded @ unfolded.T)[1].flip(1)
        lower, vectors = self._bases[taps]
        result: Tensor = torch.linalg.solve_triangular(lower, vectors[:, :rank].T, upper=False, left=False)
        return result

    def _regressed(self, first: Tensor, taps: int) -> tuple[Tensor, Tensor]:
        """Regress the outputs on the features z = first x: return their matrix, and the covariance of z."""
        seen = _lift(self.covariance, first, taps).T.contiguous()
        inner = _lift(seen, first, taps)
        return torch.cholesky_solve(seen @ self.weight.T, cholesky(inner)).T, inner

    def _core(self, rank: int) -> tuple[Tensor, _Decomposed]:
        if rank not in self._cores:
            taps = self.kernel[0] * self.kernel[1]
            first = self._first(taps, rank)
            fitted, inner = self._regressed(first, taps)
            self._cores[rank] = first, _Decomposed(fitted, damped(inner), self.fisher)
        return self._cores[rank]


class _Decomposed:
    """The singular value decomposition of a whitened, weighted matrix: the best factors of every rank."""

    def __init__(self, weight: Tensor, covariance: Tensor, fisher: Tensor) -> None:
        self.lower, self.importance = cholesky(covariance), fisher.sqrt()
        weighted = (self.importance[:, None] * weight) @ self.lower
        self.u, self.s, self.vt = torch.linalg.svd(weighted, full_matrices=False)

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        # Both factors take the root of the singular values: balanced magnitudes quantise better.
        root = self.s[:rank].sqrt()
        scaled = root[:, None] * self.vt[:rank]
        first = torch.linalg.solve_triangular(self.lower, scaled, upper=False, left=False)
        return first, (self.u[:, :rank] * root) / self.importance[:, None]


def svd(weight: Tensor, covariance: Tensor, fisher: Tensor, rank: int) -> Factors:
    """Return the two factors of the best rank-``rank`` approximation of ``weight`` [O, K] in output error; see `Whitened`."""
    return Whitened(weight, covariance, fisher, (1, 1)).factors((rank,))


def tucker2(weight: Tensor, covariance: Tensor, fisher: Tensor, taps: int, ranks: tuple[int, int]) -> Factors:
    """Return the three factors of a kernel ``weight`` [O, C * taps] at ranks (inputs, outputs); see `Whitened`."""
    return Whitened(weight, covariance, fisher, (1, taps)).factors(ranks)


def spatial(weight: Tensor, covariance: Tensor, fisher: Tensor, kernel: tuple[int, int], rank: int) -> Factors:
    """Return a column kernel [r, C * height] and a row kernel [O, r, width] for ``weight`` [O, C * height * width]."""
    return Whitened(weight, covariance, fisher, kernel).factors((rank,))
