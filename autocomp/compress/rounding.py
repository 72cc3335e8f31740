"""Rounding weights so that what one column loses the others make up: GPTQ (arXiv:2210.17323) for any quantiser.

Columns are settled one after the other, those with the largest diagonal of the Hessian first, as most columns can still compensate for
them; the error of each moves, along the inverse Hessian, into the columns still open. The Hessian is that of the *compressed* inputs:
of the channels kept, with the noise of their quantisation added to the diagonal, and damped (see ``prune.damped``) so that a singular one
has an inverse. Rows are rounded independently of each other; a row that came out worse than by rounding to nearest keeps the nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocomp.compress.prune import damped

BLOCK = 64  # columns whose errors are collected before they move on: one matrix product instead of many


class Metric:
    """The squared error of outputs: ``blocks`` [B, K, K] float64, each the Hessian of O/B successive rows of the weight [O, K].

    One block for a linear layer or convolution, one a group for a grouped convolution, one a channel for a depthwise one.
    """

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks if blocks.dim() == 3 else blocks[None]
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}

    def error(self, difference: Tensor) -> Tensor:
        """Return dW_o H dW_o^T of every row [O]."""
        rows = difference.unflatten(0, (len(self.blocks), -1))
        return ((rows @ self.blocks) * rows).sum(-1).flatten().clamp_min(0.0)

    def diagonal(self) -> Tensor:
        """Return the damped diagonal as [B, K]: how much each column matters by itself."""
        return damped(self.blocks).diagonal(dim1=1, dim2=2)

    def noisy(self, noise: Tensor) -> Metric:
        """Return the metric for inputs with independent noise of these variances [B * K, or K shared] added."""
        added = noise.double().reshape(-1, self.blocks.shape[-1]).expand(len(self.blocks), -1)
        return Metric(self.blocks + torch.diag_embed(added))

    def factor(self, dim: int) -> tuple[Tensor, Tensor]:
        """Return the order of the columns, in runs of ``dim`` (K must be a multiple), and U [K, K, B] with H^-1 = U^T U in that order."""
        if dim not in self._factors:
            diagonal = self.diagonal().mean(0).view(-1, dim).mean(1)
            runs = diagonal.argsort(descending=True, stable=True)
            order = (runs[:, None] * dim + torch.arange(dim)).flatten()
            # With P H P = M M^T, P the reversal of order, the upper factor of H^-1 is the inverse of P M P.
            backwards = order.flip(0)
            lower = torch.linalg.cholesky(damped(self.blocks)[:, backwards][:, :, backwards])
            upper = lower.flip(1, 2)
            eye = torch.eye(upper.shape[-1], dtype=upper.dtype)
            inverse = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
            self._factors[dim] = order, inverse.permute(1, 2, 0).contiguous()
        return self._factors[dim]

    def padded(self, columns: int) -> Metric:
        """Return the metric with columns added that hardly matter."""
        missing = columns - self.blocks.shape[-1]
        if missing == 0:
            return self
        blocks = torch.nn.functional.pad(self.blocks, (0, missing, 0, missing))
        tiny = 1e-9 * float(self.blocks.diagonal(dim1=1, dim2=2).mean())
        blocks.diagonal(dim1=1, dim2=2)[:, -missing:] = tiny
        return Metric(blocks)


class Feedback:
    """A weight [O, K] whose columns are settled in the order of `Metric.factor`; positions below are in that order."""

    def __init__(self, weight: Tensor, metric: Metric, dim: int = 1) -> None:
        self.order, self.upper = metric.factor(dim)
        rows = weight.unflatten(0, (len(metric.blocks), -1))
        self.open = rows.permute(2, 0, 1)[self.order].contiguous()  # [K, B, O/B]
        self._errors = torch.zeros_like(self.open)
        self._start, self._dim = 0, max(1, BLOCK // dim) * dim

    def settle(self, position: int, values: Tensor) -> None:
        """Fix the next column at ``values`` [B, O/B]; what that loses moves into the columns after it."""
        end = min(self._start + self._dim, len(self.open))
        error = (self.open[position] - values) / self.upper[position, position][:, None]
        self._errors[position] = error
        self.open[position] = values
        if position + 1 < end:
            self.open[position + 1 : end].addcmul_(self.upper[position, position + 1 : end, :, None], error, value=-1)
        elif end < len(self.open):
            block = slice(self._start, end)
            self.open[end:] -= torch.einsum("jib,jbr->ibr", self.upper[block, end:], self._errors[block])
            self._start = end

    def result(self) -> Tensor:
        """The settled weight [O, K], columns in their own order."""
        settled = torch.empty_like(self.open)
        settled[self.order] = self.open
        return settled.permute(1, 2, 0).flatten(0, 1)


def round_levels(weight: Tensor, scales: Tensor, lowest: int, highest: int, metric: Metric) -> Tensor:
    """Return int8 levels [O, K] of ``weight`` [O, K] on the grid ``scales`` [O, K] (float64, positive), within [lowest, highest].

    No row's error under the metric is larger than that of rounding to nearest.
    """
    nearest = (weight / scales).round().clamp(lowest, highest)
    feedback = Feedback(weight, metric)
    grid = scales.unflatten(0, (len(metric.blocks), -1)).permute(2, 0, 1)[feedback.order].contiguous()
    for position, steps in enumerate(grid):
        value = (feedback.open[position] / steps).round_().clamp_(lowest, highest).mul_(steps)
        feedback.settle(position, value)
    levels = (feedback.result() / scales).round()
    better = metric.error(levels * scales - weight) < metric.error(nearest * scales - weight)
    return torch.where(better[:, None], levels, nearest).to(torch.int8)
