"""A transposed convolution as plain ones: which outputs are computed alike, and from which taps of the kernel.

Along one axis, output ``q`` of stride ``s`` is the sum over taps ``k`` of ``x[(q + padding - k * dilation) / s] * w[k]`` where that is a whole
number. Outputs with the same ``q mod s``, a phase, read the same taps at neighbouring inputs: they are one convolution of stride 1. Phases
with as many taps, from the same first input on, are the channels of one convolution. Zero taps can make all phases alike, and beginning a
little before the first output can too: both cost products and save convolutions (Shi et al. 2016, arXiv 1609.07009, for the sub-pixel view).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# What one more convolution costs beside its products, in multiply-adds: its call, its border, and reading its inputs anew.
_ANOTHER = 50_000


@dataclass(frozen=True)
class Run:
    """Phases of one axis that are one convolution: ``taps`` of each phase in the order of the inputs, -1 for none.

    The first tap of output 0 lies on input ``first``, the others ``dilation`` further on each.
    """

    phases: tuple[int, ...]
    taps: tuple[tuple[int, ...], ...]
    first: int
    dilation: int

    @property
    def length(self) -> int:
        return len(self.taps[0])


@dataclass(frozen=True)
class Axis:
    """One axis of a transposed convolution: ``count`` outputs of each phase, of which the first ``crop`` of all are dropped."""

    stride: int
    outputs: int
    count: int
    crop: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Plan:
    """The axes of a transposed convolution; each choice of one run of every axis is a convolution."""

    axes: tuple[Axis, ...]

    def convolutions(self) -> Iterator[tuple[Run, ...]]:
        return itertools.product(*(axis.runs for axis in self.axes))


def plan(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    outputs: Sequence[int],
    channels: int,
    lanes: int,
) -> Plan:
    """The cheapest way to compute ``outputs`` of a transposed convolution; ``padding`` is what is cut from the start of each axis.

    ``channels`` (of a group) times the phases of a convolution are computed in whole vectors of ``lanes``.
    """
    choices = [list(_choices(*axis)) for axis in zip(kernel, stride, padding, dilation, outputs, strict=True)]

    def cost(axes: tuple[Axis, ...]) -> int:
        pixels, total = math.prod(axis.count for axis in axes), 0
        for runs in Plan(axes).convolutions():
            sums = channels * math.prod(len(run.phases) for run in runs)
            taps = math.prod(run.length for run in runs)
            total += pixels * -(-sums // lanes) * lanes * taps + _ANOTHER // channels
        return total

    return Plan(min(itertools.product(*choices), key=cost))


def _choices(kernel: int, stride: int, padding: int, dilation: int, outputs: int) -> Iterator[Axis]:
    for crop in {0, padding % stride}:
        whole = outputs + crop
        runs = _runs(kernel, stride, padding - crop, dilation)
        axes = [runs]
        if (merged := _merged(runs)) is not None:
            axes.append((merged,))
        for chosen in axes:
            yield Axis(stride, outputs, -(-whole // stride), crop, chosen)


def _runs(kernel: int, stride: int, padding: int, dilation: int) -> tuple[Run, ...]:
    """Phases by how many taps they have and where those begin; phases without taps, whose outputs are zero, are in no run."""
    common = math.gcd(stride, dilation)
    alike: dict[tuple[int, int], list[tuple[int, tuple[int, ...]]]] = {}
    for phase in range(stride):
        shift, rest = divmod(phase + padding, stride)
        taps = tuple(tap for tap in reversed(range(kernel)) if tap * dilation % stride == rest)
        if taps:
            first = shift - (taps[0] * dilation - rest) // stride
            alike.setdefault((len(taps), first), []).append((phase, taps))
    return tuple(
        Run(tuple(phase for phase, _ in members), tuple(taps for _, taps in members), first, dilation // common)
        for (_, first), members in alike.items()
    )


def _merged(runs: Sequence[Run]) -> Run | None:
    """All phases as one run, with zero taps where they begin later or end sooner; None where their inputs do not interlock."""
    step, first = runs[0].dilation, min(run.first for run in runs)
    if len(runs) == 1 or any((run.first - first) % step for run in runs):
        return None
    length = max((run.first - first) // step + run.length for run in runs)
    members = []
    for run in runs:
        before = (run.first - first) // step
        for phase, taps in zip(run.phases, run.taps, strict=True):
            members.append((phase, (-1,) * before + taps + (-1,) * (length - before - len(taps))))
    members.sort()
    return Run(tuple(phase for phase, _ in members), tuple(taps for _, taps in members), first, step)
