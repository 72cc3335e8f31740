"""Short distillation: a compressed model learns the dense one's answers, softened by a temperature that falls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from autocomp.errors import AutocompError, UsageError
from autocomp.graph.batches import Axes, count
from autocomp.tasks.divergence import Comparison, compare
from autocomp.tasks.guess import describe
from autocomp.tasks.outputs import Stated

HOT, COLD = 4.0, 1.0  # temperatures at the first and the last step
LOOKED_AT = 4  # batches that say what the outputs are, and how much those that are numbers vary


def temperature(step: int, steps: int, hot: float = HOT, cold: float = COLD) -> float:
    """Return the temperature of a step: a half cosine from ``hot`` at the first to ``cold`` at the last."""
    along = step / max(1, steps - 1)
    return cold + (hot - cold) * 0.5 * (1 + math.cos(math.pi * along))


def distillation_loss(
    comparison: Comparison, expected: Sequence[Tensor], actual: Sequence[Tensor], at: float
) -> Tensor:
    """Return the divergence of rows of outputs from the teacher's, a mean over samples and places.

    Of classes it is T^2 KL(teacher / T || student / T) at the temperature ``at`` (Hinton et al. 2015, arXiv:1503.02531).
    """
    terms = comparison.terms(expected, actual, at)
    return torch.stack([term.mean() for term in terms if term.requires_grad] or [torch.zeros(())]).sum()


def distil(
    model: nn.Module,
    teacher: nn.Module,
    train: Iterable[tuple[tuple[Tensor, ...], Tensor]],
    steps: int,
    learning_rate: float = 1e-3,
    axes: Axes | None = None,
    stated: Stated | None = None,
) -> nn.Module:
    """Train ``model`` in place against ``teacher`` for some steps (AdamW, one cycle); both are in evaluation mode after it.

    ``train`` is as ``Task.train``: gone through again and again, its targets unread; ``axes`` and ``stated`` as ``Task.batch_axes`` and
    ``Task.outputs``. UsageError if it yields nothing or nothing of the model can be trained (all its weights are integers); AutocompError if
    the loss stops being finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if not parameters:
        raise UsageError("distillation needs weights in floats: every layer of this model is quantised")
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    teacher.eval()
    batches = _endless(train)
    looked_at = [next(batches) for _ in range(min(steps, LOOKED_AT))]
    outputs = describe(teacher, looked_at, axes, stated)
    with torch.no_grad():
        known = [(teacher(*inputs), count(inputs, axes)) for inputs in looked_at]
    comparison, _ = compare(outputs, known, sum(samples for _, samples in known))
    model.train()
    for step, inputs in zip(range(steps), chain(looked_at, batches), strict=False):
        samples = count(inputs, axes)
        with torch.no_grad():
            expected = comparison.rows(teacher(*inputs), samples)
        actual = comparison.rows(model(*inputs), samples)
        loss = distillation_loss(comparison, expected, actual, temperature(step, steps))
        if not bool(torch.isfinite(loss)):
            raise AutocompError(
                f"distillation diverged at step {step} of {steps}: lower the learning rate {learning_rate}"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def _endless(train: Iterable[tuple[tuple[Tensor, ...], Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    while True:
        count = 0
        for inputs, _ in train:
            count += 1
            yield inputs
        if not count:
            raise UsageError("distillation needs training data: Task.train yields no batch")
