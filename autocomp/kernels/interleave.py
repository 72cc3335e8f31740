"""The outputs of a transposed convolution put in their places, and transposed convolutions of each channel by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocomp.kernels.phases import Axis, Plan


def interleave(parts: Sequence[Any], plan: Plan, groups: int, channels: int) -> Any:
    """``parts [N, *count, groups * phases * channels]``, one for each convolution of the plan → ``[N, *outputs, groups * channels]``.

    Outputs of phases that are in no part are zero.
    """
    from tvm import te, tirx

    def value(n: Any, *index: Any) -> Any:
        *place, c = index
        pairs = zip(plan.axes, place, strict=True)
        at = [axis_position(axis, q) for axis, q in pairs]
        result: Any = None
        for runs, part in reversed(list(zip(plan.convolutions(), parts, strict=True))):
            phase: Any = 0
            inside = []
            for run, (_, rest), axis in zip(runs, at, plan.axes, strict=True):
                phase = phase * len(run.phases) + _number(run.phases, rest)
                if len(run.phases) < axis.stride:
                    inside.append(_among(run.phases, rest))
            phases = _count(runs)
            channel = (
                phase * channels + c if groups == 1 else (c // channels * phases + phase) * channels + c % channels
            )
            read = part[(n, *(t for t, _ in at), channel)]
            if not inside:
                return read
            otherwise = tirx.const(0, part.dtype) if result is None else result
            result = tirx.if_then_else(tirx.all(*inside) if len(inside) > 1 else inside[0], read, otherwise)
        return result

    outputs = [axis.outputs for axis in plan.axes]
    return te.compute((int(parts[0].shape[0]), *outputs, groups * channels), value, name="interleave")


def axis_position(axis: Axis, q: Any) -> tuple[Any, Any]:
    """(which output of its phase, which phase) output ``q`` is."""
    moved = q + axis.crop if axis.crop else q
    return (moved, 0) if axis.stride == 1 else (moved // axis.stride, moved % axis.stride)


def _count(runs: Sequence[Any]) -> int:
    count = 1
    for run in runs:
        count *= len(run.phases)
    return count


def _contiguous(phases: Sequence[int]) -> bool:
    return list(phases) == list(range(phases[0], phases[0] + len(phases)))


def _number(phases: Sequence[int], phase: Any) -> Any:
    """Which of the phases one is (any number for one that is not among them)."""
    from tvm import tirx

    if len(phases) == 1:
        return 0
    if _contiguous(phases):
        return phase - phases[0] if phases[0] else phase
    number: Any = 0
    for position, member in enumerate(phases):
        number = tirx.Select(phase == member, position, number)
    return number


def _among(phases: Sequence[int], phase: Any) -> Any:
    from tvm import tirx

    if len(phases) == 1:
        return phase == phases[0]
    if _contiguous(phases):
        return tirx.all(phase >= phases[0], phase <= phases[-1])
    return tirx.any(*(phase == member for member in phases))


def depthwise_transposed(
    data: Any, weight: Any, stride: Sequence[int], padding: Sequence[int], outputs: Sequence[int], channels: int
) -> Any:
    """Transposed convolution of each channel with its own kernel: ``data [N, *S, C]``, ``weight [*K, C]`` → ``[N, *outputs, C]``."""
    from tvm import te, tirx

    kernel = [int(size) for size in weight.shape[:-1]]
    inputs = [int(size) for size in data.shape[1:-1]]
    taps = [te.reduce_axis((0, -(-k // s)), "tap") for k, s in zip(kernel, stride, strict=True)]

    def value(n: Any, *index: Any) -> Any:
        *place, c = index
        at, tap, inside = [], [], []
        for q, j, s, p, k, size in zip(place, taps, stride, padding, kernel, inputs, strict=True):
            position, which = (q + p) // s - j, (q + p) % s + j * s
            at.append(position)
            tap.append(which)
            inside += [position >= 0, position < size, which < k]
        product = data[(n, *at, c)] * weight[(*tap, c)]
        return te.sum(tirx.if_then_else(tirx.all(*inside), product, tirx.const(0, data.dtype)), taps)

    return te.compute((int(data.shape[0]), *outputs, channels), value, name="transposed")
