"""The Hessian H of a layer's squared output error, as calibration keeps it: whole, in blocks, or of very wide layers its diagonal.

[K, K] of a layer that mixes all its K columns; [G, k, k] of a grouped convolution, a block for each group (depthwise: each channel); [K] of
one with more than `WIDE` columns, whose whole H would take gigabytes and minutes: its columns are then taken to be independent, so what one
loses the others do not make up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WIDE = 8192  # columns up to which H is whole: half a gigabyte


def chosen(hessian: Tensor, columns: Tensor) -> Tensor:
    """H of some of the columns; of one that is not in blocks."""
    return hessian[columns] if hessian.dim() == 1 else hessian[columns][:, columns]


def times(rows: Tensor, hessian: Tensor) -> Tensor:
    """Rows [O, K] times H [K, K] or its diagonal [K]; rows [B, O, K] times blocks [B, K, K]."""
    return rows * hessian if hessian.dim() == 1 else rows @ hessian


def diagonal(hessian: Tensor) -> Tensor:
    """The diagonal: [K], or [B, K] of blocks."""
    return hessian if hessian.dim() == 1 else hessian.diagonal(dim1=-2, dim2=-1)


def add_to_diagonal(hessian: Tensor, values: Tensor | float) -> Tensor:
    """A copy with something added to the diagonal."""
    result = hessian.clone()
    diagonal(result).add_(values)
    return result
