"""How far a model's answers are from the dense one's, in nats or what is as bad; a sum over the outputs that count.

``classes``, ``probabilities``  KL(dense || model), the mean over samples and places
``binary`` (and probabilities)  the same of yes and no, summed over the axis
``regression``                  squared error over the variance of the dense output (1 - R^2), the mean over the quantities of the axis
``embedding``                   the same of vectors brought to length one: 2 (1 - cosine) over their variance
``decisions``                   the share that differs

All are 0 for the dense model, and near 1 for one that no longer answers to its input: a constant has 1 - R^2 = 1 and is as far from an
embedding as others are, and scores that lost what they knew have a KL of about the entropy of what they should know, 0.7 to 2.3 nats for 2 to
10 classes. So 0.25 means much the same of each: a model of which a quarter is lost.

The variance is that between samples at one place, since places (the anchors of boxes) may differ by themselves, and at least `STEADY` of
the mean square: an output that hardly varies about a large value is not asked to be right to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autocomp.errors import AutocompError
from autocomp.tasks.outputs import Output, leaves

STEADY = 1e-4
KEPT = (
    2**25
)  # numbers of an output's answers that are kept at most, all samples together; of larger ones only some places are compared
CHUNK = 2**22  # numbers compared at once
SURE = 1e-6  # a probability is held to be between this and one less it


@dataclass(frozen=True)
class Comparison:
    """The outputs that are compared, each with the step between places looked at, and the variance [K] or [1] of those that are numbers."""

    outputs: tuple[Output, ...]
    steps: tuple[int, ...]
    scales: tuple[Tensor | None, ...] = ()

    def rows(self, answer: Any, samples: int) -> list[Tensor]:
        """Return each compared output as [samples, places, K]: K numbers along its axis, or one."""
        found = list(leaves(answer))
        if len(found) != len(self.outputs):
            raise AutocompError(f"the model returns {len(found)} tensors, and {len(self.outputs)} before")
        pairs = zip(self.outputs, found, strict=True)
        counted = [_rows(tensor, output, samples) for output, (_, tensor) in pairs if output.kind != "ignored"]
        return [rows[:, ::step] for rows, step in zip(counted, self.steps or (1,) * len(counted), strict=True)]

    @property
    def counted(self) -> list[Output]:
        return [output for output in self.outputs if output.kind != "ignored"]

    def terms(self, expected: Sequence[Tensor], actual: Sequence[Tensor], at: float = 1.0) -> list[Tensor]:
        """Return the divergence [samples, places] of each compared output. Logits are divided by ``at``, a temperature, and the result
        multiplied by its square."""
        terms = []
        for output, scale, one, other in zip(self.counted, self.scales, expected, actual, strict=True):
            terms.append(_terms(output, scale, one, other, at))
        return terms

    def draws(self, rows: Sequence[Tensor], generator: torch.Generator) -> list[Tensor | None]:
        """Return a random gradient for each compared output, like its rows (None for decisions).

        Its mean product with itself is the matrix of the divergence's second order, so that squared gradients behind it estimate half of what a
        small change costs: for classes, that of -log p(y) with y drawn from the model's own answers.
        """
        return [
            None if output.kind == "decisions" else _draw(output, scale, x.detach(), generator) / math.sqrt(x.shape[1])
            for output, scale, x in zip(self.counted, self.scales, rows, strict=True)
        ]


def compare(
    outputs: Sequence[Output], answers: Iterable[tuple[Any, int]], samples: int
) -> tuple[Comparison, list[list[Tensor]]]:
    """Return how ``outputs`` are compared and the rows to compare with, from the dense model's answers, each with its number of samples.

    ``samples`` are there in all.
    """
    whole = Comparison(tuple(outputs), ())
    kept: list[list[Tensor]] = []
    steps: tuple[int, ...] = ()
    for answer, here in answers:
        rows = whole.rows(answer, here)
        steps = steps or tuple(_step(x, samples) for x in rows)
        kept.append([x[:, ::step].detach().clone() for x, step in zip(rows, steps, strict=True)])
    scales = [_scale(output, [rows[k] for rows in kept]) for k, output in enumerate(whole.counted)]
    return Comparison(tuple(outputs), steps, tuple(scales)), kept


def total(comparison: Comparison, pairs: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> float:
    """Return the divergence over pairs of rows (the dense model's, another's); infinite if it is not finite or shapes differ."""
    sums = [0.0] * len(comparison.counted)
    places = [0] * len(sums)
    for expected, actual in pairs:
        for k, (output, scale) in enumerate(zip(comparison.counted, comparison.scales, strict=True)):
            one, other = expected[k], actual[k]
            if one.shape != other.shape:
                return math.inf
            at_once = max(1, CHUNK // max(1, one[0].numel()))
            for a, b in zip(one.split(at_once), other.detach().split(at_once), strict=True):
                sums[k] += float(_terms(output, scale, _exact(a), _exact(b), 1.0).sum())
            places[k] += one.shape[0] * one.shape[1]
    value = sum(found / max(1, count) for found, count in zip(sums, places, strict=True))
    return max(0.0, value) if math.isfinite(value) else math.inf


def _exact(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _rows(tensor: Tensor, output: Output, samples: int) -> Tensor:
    """[samples, places, K] of an output; several rows a sample may lie along its axis of samples."""
    assert output.samples is not None
    x = tensor.unsqueeze(-1) if output.axis is None else tensor.movedim(output.axis, -1)
    x = x.movedim(output.samples - (output.axis is not None and output.axis < output.samples), 0)
    if len(x) % samples:
        raise AutocompError(f"output {output.name!r} has {len(x)} rows for {samples} samples")
    return x.reshape(samples, -1, x.shape[-1])


def _step(rows: Tensor, samples: int) -> int:
    """Between places that are kept; odd, so that on a map not the same columns come again and again."""
    step = -(-rows[0].numel() * samples // KEPT)
    return max(1, min(step + (step + 1) % 2, rows.shape[1]))


def _scale(output: Output, rows: Sequence[Tensor]) -> Tensor | None:
    if output.kind not in ("regression", "embedding"):
        return None
    values = [_unit(x.double()) if output.kind == "embedding" else x.double() for x in rows]
    alike = len({x.shape[1] for x in values}) == 1 and sum(map(len, values)) > 1
    values = [torch.cat(values)] if alike else [torch.cat([x.flatten(0, 1) for x in values])[:, None]]
    squares = values[0].square().mean((0, 1))
    variance = values[0].var(0, correction=0).mean(0)
    if output.kind == "embedding":
        variance, squares = variance.sum(0, keepdim=True), squares.sum(0, keepdim=True)
    variance = torch.maximum(variance, STEADY * squares)
    typical = max(float(variance.mean()), 1e-30)
    return torch.where(squares > 0, variance, typical)  # a quantity that is always 0 has no scale of its own


def _unit(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1)


def _terms(output: Output, scale: Tensor | None, expected: Tensor, actual: Tensor, at: float) -> Tensor:
    kind = output.kind
    if kind == "decisions":
        return (expected != actual).double().mean(-1)
    if kind in ("classes", "probabilities"):
        if kind == "probabilities":
            expected, actual = expected.clamp_min(SURE).log(), actual.clamp_min(SURE).log()
        one, other = functional.log_softmax(expected / at, -1), functional.log_softmax(actual / at, -1)
        return at * at * functional.kl_div(other, one, reduction="none", log_target=True).sum(-1)
    if kind in ("binary", "binary-probabilities"):
        if kind == "binary-probabilities":
            expected, actual = expected.logit(SURE), actual.logit(SURE)
        one, other = expected / at, actual / at
        return at * at * (one.sigmoid() * (one - other) + functional.softplus(other) - functional.softplus(one)).sum(-1)
    assert scale is not None
    if kind == "embedding":
        return (_unit(expected) - _unit(actual)).square().sum(-1) / scale.to(actual.dtype)[0]
    return ((expected - actual).square() / scale.to(actual.dtype)).mean(-1)


def _draw(output: Output, scale: Tensor | None, x: Tensor, generator: torch.Generator) -> Tensor:
    kind = output.kind
    if kind in ("classes", "probabilities"):
        p = functional.softmax(x.float(), -1) if kind == "classes" else x.float().clamp_min(SURE)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(*x.shape[:2], 1)
        if kind == "probabilities":
            return torch.zeros_like(p).scatter(-1, drawn, 1 / p.gather(-1, drawn))
        return p - torch.zeros_like(p).scatter(-1, drawn, 1.0)
    if kind in ("binary", "binary-probabilities"):
        p = x.float().sigmoid() if kind == "binary" else x.float().clamp(SURE, 1 - SURE)
        wrong = p - torch.bernoulli(p, generator=generator)
        return wrong if kind == "binary" else wrong / (p * (1 - p))
    assert scale is not None
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
    if kind == "regression":
        return signs * (2 / (scale * x.shape[-1])).sqrt().to(x.dtype)
    drawn, unit = signs * (2 / scale).sqrt().to(x.dtype), _unit(x)
    result: Tensor = (drawn - unit * (drawn * unit).sum(-1, keepdim=True)) / x.norm(dim=-1, keepdim=True).clamp_min(
        1e-12
    )
    return result
