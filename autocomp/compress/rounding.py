"""Rounding weights so that what one column loses the others make up: GPTQ (arXiv:2210.17323) for any quantiser.

Columns are settled one after the other, those with the largest diagonal of the Hessian first, as most columns can still compensate for
them; what each loses moves into the columns still open. With H = L L^T, L upper triangular in that order, the error of a row of changes d
is the sum of (d L)^2: column q does best at w_q + sum over the columns p settled before of d_p L_pq / L_qq, so no inverse is needed. The
Hessian is that of the *compressed* inputs:
of the channels kept, with the noise of their quantisation added to the diagonal, and damped (see ``prune.damped``) so that a singular one
has an inverse. Rows are rounded independently of each other; a row that came out worse than by rounding to nearest keeps the nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocomp.compress.hessian import add_to_diagonal, diagonal, times
from autocomp.compress.prune import cholesky, damped

BLOCK = 64  # columns whose errors are collected before they move on: one matrix product instead of many


class Metric:
    """The squared error of outputs: ``hessian`` [B, K, K] float64, each the Hessian of ``count`` = O/B successive rows of the weight [O, K].

    One block for a linear layer or convolution, one a group for a grouped convolution, one a channel for a depthwise one. [K], the diagonal,
    stands for one block whose columns are independent.
    """

    def __init__(self, hessian: Tensor) -> None:
        self.hessian = hessian[None] if hessian.dim() == 2 else hessian
        self.independent = hessian.dim() == 1
        self.count = 1 if self.independent else len(self.hessian)
        self._factors: dict[int, tuple[Tensor, Tensor | None, Tensor]] = {}

    def error(self, difference: Tensor) -> Tensor:
        """Return dW_o H dW_o^T of every row [O]."""
        rows = difference.unflatten(0, (self.count, -1))
        result: Tensor = (times(rows, self.hessian) * rows).sum(-1).flatten().clamp_min(0.0)
        return result

    def better(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Return for every row [O] whether the error of ``ours`` [O, K] is the smaller one: a H a^T - b H b^T = (a - b) H (a + b)^T."""
        by_block = (self.count, -1)
        apart, both = (ours - theirs).unflatten(0, by_block), (ours + theirs).unflatten(0, by_block)
        result: Tensor = (times(apart, self.hessian) * both).sum(-1).flatten() < 0
        return result

    def diagonal(self) -> Tensor:
        """Return the damped diagonal as [B, K]: how much each column matters by itself."""
        return diagonal(damped(self.hessian)).view(self.count, -1)

    def noisy(self, noise: Tensor) -> Metric:
        """Return the metric for inputs with independent noise of these variances [B * K, or K shared] added."""
        own = noise.double() if self.independent else noise.double().reshape(-1, self.hessian.shape[-1])
        return Metric(add_to_diagonal(self.hessian, own))

    def factor(self, dim: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the order of the columns, in runs of ``dim`` (K must be a multiple), and in that order how an error moves.

        That is L_pq / L_qq as [K, K, B] (p settled before q), and the diagonal of L as [K, B]. In float32: H is damped, and what is moved
        is rounded to far coarser steps in the end. None for L_pq / L_qq of independent columns, where nothing moves.
        """
        if dim not in self._factors:
            runs = self.diagonal().mean(0).view(-1, dim).mean(1).argsort(descending=True, stable=True)
            order = (runs[:, None] * dim + torch.arange(dim)).flatten()
            if self.independent:
                self._factors[dim] = order, None, self.diagonal()[0][order].sqrt().float()[:, None]
                return self._factors[dim]
            # Cholesky of the columns in reverse: its lower triangle, turned round, is the upper one wanted.
            backwards = order.flip(0)
            blocks = damped(self.hessian)
            unit = (
                blocks.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)[:, None, None]
            )  # squares may be beyond float32
            lower = cholesky((blocks / unit).float()[:, backwards][:, :, backwards]) * unit.sqrt().float()
            scale = lower.diagonal(dim1=1, dim2=2)
            moves = (lower / scale[:, None, :]).flip(1, 2).permute(1, 2, 0).contiguous()
            self._factors[dim] = order, moves, scale.flip(1).T.contiguous()
        return self._factors[dim]

    def padded(self, columns: int) -> Metric:
        """Return the metric with columns added that hardly matter."""
        missing = columns - self.hessian.shape[-1]
        if missing == 0:
            return self
        sides = (0, missing) if self.independent else (0, missing, 0, missing)
        wider = torch.nn.functional.pad(self.hessian, sides)
        diagonal(wider)[..., -missing:] = 1e-9 * float(diagonal(self.hessian).mean())
        return Metric(wider)


class Feedback:
    """A weight [O, K] whose columns are settled in the order of `Metric.factor`; positions below are in that order."""

    def __init__(self, weight: Tensor, metric: Metric, dim: int = 1) -> None:
        self.order, self._moves, self.scale = metric.factor(dim)
        rows = weight.float().unflatten(0, (metric.count, -1))
        self.open = rows.permute(2, 0, 1)[self.order].contiguous()  # [K, B, O/B]
        self._lost = self.open.clone()  # the weight itself; of a column that is settled, what it lost
        self._start, self._dim = 0, max(1, BLOCK // dim) * dim

    def settle(self, position: int, values: Tensor) -> None:
        """Fix the next column at ``values`` [B, O/B]; what that loses moves into the columns after it."""
        end = min(self._start + self._dim, len(self.open))
        lost = self._lost[position].sub_(values)
        self.open[position] = values
        if self._moves is None:
            return
        if position + 1 < end:
            self.open[position + 1 : end].addcmul_(self._moves[position, position + 1 : end, :, None], lost)
        elif end < len(self.open):
            block = slice(self._start, end)
            for b in range(self.open.shape[1]):
                self.open[end:, b].addmm_(self._moves[block, end:, b].T, self._lost[block, b])
            self._start = end

    def result(self) -> Tensor:
        """The settled weight [O, K], columns in their own order, in float64."""
        settled = torch.empty_like(self.open)
        settled[self.order] = self.open
        return settled.permute(1, 2, 0).flatten(0, 1).double()


def round_levels(weight: Tensor, scales: Tensor, lowest: int, highest: int, metric: Metric) -> Tensor:
    """Return int8 levels [O, K] of ``weight`` [O, K] on the grid ``scales`` [O, K] (float64, positive), within [lowest, highest].

    No row's error under the metric is larger than that of rounding to nearest.
    """
    nearest = (weight / scales).round().clamp(lowest, highest)
    if metric.independent:  # no column can make up for another
        return nearest.to(torch.int8)
    feedback = Feedback(weight, metric)
    grid = scales.unflatten(0, (metric.count, -1)).permute(2, 0, 1)[feedback.order].contiguous()
    for position, steps in enumerate(grid):
        value = (feedback.open[position] / steps).round_().clamp_(lowest, highest).mul_(steps)
        feedback.settle(position, value)
    levels = (feedback.result() / scales).round()
    return torch.where(metric.better(levels * scales - weight, nearest * scales - weight)[:, None], levels, nearest).to(
        torch.int8
    )
