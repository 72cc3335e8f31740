"""Low-rank factors of a layer, best on the calibration data: SVD for matrices, Tucker-2 for convolution kernels.

Both solve a reduced-rank regression: the factors minimise the Fisher-weighted output error under the covariance of the
inputs that are kept (whitening as in SVD-LLM, arXiv:2403.07378; Tucker-2 as in arXiv:1511.06530, its factors fitted to
outputs instead of weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autocomp.compress.prune import damped


@dataclass(frozen=True)
class Factors:
    """Factors in the order they are applied, float64: SVD [r, K], [O, r]; Tucker-2 [r1, C], [r2, r1, taps], [O, r2]."""

    parts: tuple[Tensor, ...]

    @property
    def product(self) -> Tensor:
        """The matrix [O, K] that the factors amount to."""
        return self.after(0)

    def after(self, stage: int) -> Tensor:
        """The matrix from the features that enter factor ``stage`` to the outputs."""
        if stage == len(self.parts) - 1:
            return self.parts[-1]
        if len(self.parts) == 2:
            return self.parts[1] @ self.parts[0]
        first, core, last = self.parts
        if stage == 1:
            return last @ core.flatten(1)
        return last @ torch.einsum("abt,bc->act", core, first).flatten(1)


def svd(weight: Tensor, covariance: Tensor, fisher: Tensor, rank: int) -> Factors:
    """Return the two factors of the best rank-``rank`` approximation of ``weight`` [O, K] in output error.

    ``covariance`` [K, K] is that of the inputs, ``fisher`` [O] weighs the outputs. At full rank the product is
    ``weight``.
    """
    lower = torch.linalg.cholesky(damped(covariance))
    importance = fisher.sqrt()
    u, s, vt = torch.linalg.svd((importance[:, None] * weight) @ lower, full_matrices=False)
    root = s[:rank].sqrt()
    # Both factors take the root of the singular values: balanced magnitudes quantise better.
    first = torch.linalg.solve_triangular(lower, root[:, None] * vt[:rank], upper=False, left=False)
    return Factors((first, (u[:, :rank] * root) / importance[:, None]))


def tucker2(weight: Tensor, covariance: Tensor, fisher: Tensor, taps: int, ranks: tuple[int, int]) -> Factors:
    """Return the three factors of a kernel ``weight`` [O, C * taps] at ranks (inputs, outputs).

    The input factor comes from the higher-order SVD of the weighted kernel, whitened by the covariance of the channels
    (averaged over taps); core and output factor are then the best there are for it. At full ranks the product is
    ``weight``.
    """
    outputs, columns = weight.shape
    channels = columns // taps
    blocks = covariance.view(channels, taps, channels, taps).diagonal(dim1=1, dim2=3).mean(-1)
    lower = torch.linalg.cholesky(damped(blocks))
    weighted = (fisher.sqrt()[:, None] * weight).view(outputs, channels, taps)
    unfolded = lower.T @ weighted.permute(1, 0, 2).reshape(channels, -1)
    # The left singular vectors of a wide matrix, from the small Gram matrix of its rows.
    _, vectors = torch.linalg.eigh(unfolded @ unfolded.T)
    basis = vectors.flip(1)[:, : ranks[0]]
    first = torch.linalg.solve_triangular(lower, basis.T, upper=False, left=False)
    # Features z = first x at every tap: regress the outputs on them, then cut that map down to the output rank.
    expand = torch.einsum("rc,ts->rtcs", first, torch.eye(taps, dtype=weight.dtype)).reshape(ranks[0] * taps, columns)
    seen = expand @ damped(covariance)
    inner = seen @ expand.T
    fitted = torch.linalg.solve(inner, seen @ weight.T).T
    second = svd(fitted, inner, fisher, ranks[1])
    return Factors((first, second.parts[0].view(-1, ranks[0], taps), second.parts[1]))
