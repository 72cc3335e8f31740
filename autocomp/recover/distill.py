"""Short distillation: a compressed model learns the dense one's answers, softened by a temperature that falls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.accuracy.calibrate import logits_of
from autocomp.errors import AutocompError, UsageError

HOT, COLD = 4.0, 1.0  # temperatures at the first and the last step


def temperature(step: int, steps: int, hot: float = HOT, cold: float = COLD) -> float:
    """Return the temperature of a step: a half cosine from ``hot`` at the first to ``cold`` at the last."""
    along = step / max(1, steps - 1)
    return cold + (hot - cold) * 0.5 * (1 + math.cos(math.pi * along))


def distillation_loss(student: Tensor, teacher: Tensor, at: float) -> Tensor:
    """Return T^2 KL(teacher / T || student / T), the mean over rows of logits ``[N, classes]`` (Hinton et al. 2015, arXiv:1503.02531)."""
    expected = functional.log_softmax(teacher / at, dim=-1)
    actual = functional.log_softmax(student / at, dim=-1)
    return at * at * functional.kl_div(actual, expected, reduction="batchmean", log_target=True)


def distil(
    model: nn.Module,
    teacher: nn.Module,
    train: Iterable[tuple[tuple[Tensor, ...], Tensor]],
    steps: int,
    learning_rate: float = 1e-3,
) -> nn.Module:
    """Train ``model`` in place against ``teacher`` for some steps (AdamW, one cycle); both are in evaluation mode after it.

    ``train`` is as ``Task.train``: gone through again and again, its targets unread. UsageError if it yields nothing or nothing of the model
    can be trained (all its weights are integers); AutocompError if the loss stops being finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if not parameters:
        raise UsageError("distillation needs weights in floats: every layer of this model is quantised")
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    teacher.eval()
    model.train()
    batches = _endless(train)
    for step in range(steps):
        inputs = next(batches)
        with torch.no_grad():
            expected = logits_of(teacher(*inputs))
        loss = distillation_loss(logits_of(model(*inputs)), expected, temperature(step, steps))
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
