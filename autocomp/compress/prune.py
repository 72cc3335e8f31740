"""Structured pruning: which channels to keep, and the least-squares update of the layers that read them.

Removal is physical: `take` returns smaller modules. A group's ordering is nested: the units (channels, heads) kept at a
smaller width are a subset of those kept at a larger one (`orders`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocomp.compress.hessian import add_to_diagonal, chosen, diagonal, times
from autocomp.errors import UsageError

# Of the mean diagonal, one after the other, where a factorisation fails all the same.
_MORE_DAMPING = (1e-6, 1e-4, 1e-2, 1.0)
DAMPING = 1e-2  # of the mean diagonal of H, added to the diagonal: as in GPTQ (arXiv:2210.17323, section 3.3)


def spread(channels: Tensor, times: int) -> Tensor:
    """Return the columns of ``channels`` where each channel stands for ``times`` neighbouring columns."""
    if times == 1:
        return channels
    return (channels[:, None] * times + torch.arange(times)).flatten()


def damped(covariance: Tensor) -> Tensor:
    """Return H with `DAMPING` times its mean diagonal added to the diagonal, so that it can be inverted."""
    added = DAMPING * float(diagonal(covariance).mean())
    return add_to_diagonal(covariance, added if added > 0 else 1.0)  # an input that never changes: any H will do


def cholesky(matrix: Tensor) -> Tensor:
    """The lower triangle L of a matrix, or of each of several, L L^T: damped further where rounding, or data of few kinds, made it singular.

    UsageError where nothing helps, since it holds values that are not finite.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix)
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    for step in _MORE_DAMPING:
        if not bool(failed.any()):
            result: Tensor = lower
            return result
        more = matrix.clone()
        more.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, step * mean, 1.0))
        lower, failed = torch.linalg.cholesky_ex(more)
    if not bool(failed.any()):
        result = lower
        return result
    raise UsageError(
        "the calibration data drive a layer to values that cannot be computed with (their squares are beyond the range of the numbers): look "
        "for samples far out of range among Task.calibration"
    )


def least_squares(weight: Tensor, covariance: Tensor, columns: Tensor) -> Tensor:
    """Return the weights [O, kept columns] of the kept inputs that best reproduce ``weight`` [O, K] on all inputs.

    They minimise tr((W - W'S) H (W - W'S)^T) for the damped H, which pulls them towards the weights they had. Where H is its diagonal, they
    are those they had.
    """
    if covariance.dim() == 1:
        return weight[:, columns]
    h = damped(covariance)
    kept = chosen(h, columns)
    return torch.cholesky_solve(h[columns] @ weight.T, cholesky(kept)).T


def output_error(difference: Tensor, covariance: Tensor) -> Tensor:
    """Return dW_o H dW_o^T of every output [O]: the mean squared error at one position, of rows [O, K] of dW."""
    return (times(difference, covariance) * difference).sum(1).clamp_min(0.0)


def keep(order: Tensor, width: int) -> Tensor:
    """Return the units kept at a width, in ascending order, given the group's units best first."""
    return order[:width].sort().values
