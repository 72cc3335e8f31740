"""Masks of single weights: which to keep, what that costs in accuracy, and how small the rest is on disk.

A saliency study and a form for files. No kernel here skips single zeros, so no speed is claimed: a masked layer takes as long as a dense
one. Saliency is OBS's (Hassibi & Stork 1993): w^2 / [H^-1]_kk, H being the damped calibration Hessian; the weights that stay then take
their least-squares update row by row (as SparseGPT, arXiv:2301.00774, here exactly).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocomp.compress.prune import cholesky, damped, output_error

PATTERNS = ((2, 4), (1, 4), (4, 8))  # N weights kept of M neighbours along K
_SOLVED = 64 * 2**20  # bytes of the systems that are solved at once


@dataclass(frozen=True)
class SparsePoint:
    """One mask of one layer: ``pattern`` is ``unstructured`` or N:M; ``kept`` the share of weights that stay.

    ``error`` is Fisher times dW H dW^T summed over outputs (nats a sample). The bytes store float32 values: by ``csr`` (column numbers of
    16 or 32 bits, row starts of 32), by ``bitmap`` (a bit a weight), and N:M ones by their ``positions`` within a run of M.
    """

    layer: str
    pattern: str
    kept: float
    error: float
    csr: int
    bitmap: int
    positions: int | None = None

    @property
    def bytes(self) -> int:
        """The smallest of the forms."""
        return min(size for size in (self.csr, self.bitmap, self.positions) if size is not None)


def saliency(weight: Tensor, covariance: Tensor) -> Tensor:
    """Return the OBS saliency [O, K] of single weights, float64."""
    inverse = torch.cholesky_inverse(cholesky(damped(covariance)))
    return weight.double().square() / inverse.diagonal()


def unstructured_mask(values: Tensor, share: float) -> Tensor:
    """Return a boolean mask [O, K] of the ``share`` of weights with the largest saliency in the whole layer."""
    count = max(1, round(share * values.numel()))
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.flatten().topk(count).indices] = True
    return mask.view_as(values)


def pattern_mask(values: Tensor, n: int, m: int) -> Tensor:
    """Return a mask [O, K] with the ``n`` most salient of every ``m`` neighbours along K kept; a shorter last run keeps ``n`` too."""
    outputs, columns = values.shape
    padded = torch.full((outputs, -(-columns // m) * m), -1.0, dtype=values.dtype)
    padded[:, :columns] = values
    runs = padded.view(outputs, -1, m)
    mask = torch.zeros_like(runs, dtype=torch.bool).scatter_(2, runs.topk(n, dim=2).indices, True)
    return mask.flatten(1)[:, :columns]


def updated(weight: Tensor, covariance: Tensor, mask: Tensor) -> Tensor:
    """Return the masked weight [O, K] float64 whose kept weights best reproduce ``weight``, each row by its own least squares.

    With H' the damped Hessian: rows of H' that are masked are replaced by the identity's, which keeps the system as large for every row.
    """
    h, weight = damped(covariance), weight.double()
    target = weight @ h
    columns = len(h)
    eye = torch.eye(columns, dtype=h.dtype)
    rows = max(1, _SOLVED // (8 * columns * columns))
    solved = []
    for keep, wanted in zip(mask.split(rows), target.split(rows), strict=True):
        both = keep[:, :, None] & keep[:, None, :]
        system = torch.where(both, h, eye)
        solved.append(torch.linalg.solve(system, torch.where(keep, wanted, 0.0)))
    return torch.cat(solved)


def csr_bytes(mask: Tensor, value: int = 4) -> int:
    """Bytes of a masked matrix by compressed rows: ``value`` bytes a weight, its column in 2 or 4, and 4 for each row's start and the end."""
    outputs, columns = mask.shape
    return int(mask.sum()) * (value + (2 if columns <= 2**16 else 4)) + 4 * (outputs + 1)


def bitmap_bytes(mask: Tensor, value: int = 4) -> int:
    """Bytes of a masked matrix by a bit for each weight and ``value`` bytes for those kept."""
    return int(mask.sum()) * value + -(-mask.numel() // 8)


def position_bytes(mask: Tensor, m: int, value: int = 4) -> int:
    """Bytes of an N:M matrix by the place of each kept weight within its run: log2(m) bits."""
    kept = int(mask.sum())
    return kept * value + -(-kept * (m - 1).bit_length() // 8)


def pack_bitmap(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (bits uint8 [ceil(O K / 8)], lowest bit first, and the values that are kept, in order)."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8), weight[mask].clone()


def unpack_bitmap(bits: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the dense weight [O, K] that `pack_bitmap` stored."""
    mask = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[: shape[0] * shape[1]]
    weight = torch.zeros(len(mask), dtype=values.dtype)
    weight[mask] = values
    return weight.view(shape)


def study(
    layer: str, weight: Tensor, covariance: Tensor, fisher: Tensor, shares: Sequence[float] = (0.75, 0.5, 0.25, 0.1)
) -> list[SparsePoint]:
    """Return what masks of one layer [O, K] cost and save: unstructured at each share, and the N:M `PATTERNS`.

    ``covariance`` [K, K] and ``fisher`` [O] are those of ``database.calibrate``. Ungrouped layers only (ValueError by the shapes).
    """
    if covariance.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"{layer}: a mask study needs one Hessian of {weight.shape[1]} columns, not {tuple(covariance.shape)}"
        )
    values = saliency(weight, covariance)
    masks = [("unstructured", unstructured_mask(values, share), 0) for share in shares]
    masks += [(f"{n}:{m}", pattern_mask(values, n, m), m) for n, m in PATTERNS]
    points = []
    for pattern, mask, m in masks:
        difference = weight.double() - updated(weight, covariance, mask)
        error = float((output_error(difference, covariance) * fisher).sum())
        positions = position_bytes(mask, m) if m else None
        share = float(mask.double().mean())
        points.append(SparsePoint(layer, pattern, share, error, csr_bytes(mask), bitmap_bytes(mask), positions))
    return points
