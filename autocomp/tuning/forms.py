"""Which form of a convolution is the fastest on a target: the direct one, or one by fewer products (`kernels.winograd`); by tuned times.

The faster form depends on the shape and the machine, and no rule of ours knows it: both are tuned, without what is fused to them. A form that
needs less time than the target's peak would leave the direct one is taken at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from autocomp.errors import AutocompError
from autocomp.kernels import compute, winograd
from autocomp.kernels.specs import ConvSpec, round_up

if TYPE_CHECKING:
    from autocomp.tuning.tune import Tuner

DIRECT = 0
_NEAR = 2 << 20  # bytes of transformed weights that a core has near; of more, smaller tiles may be ahead
_WASTE = 1.3  # of outputs that large tiles cover to those there are, from which on smaller ones may be ahead
_GAIN = 0.97  # of the direct form's time, within which it stays direct


def choose(tuner: Tuner, specs: Iterable[ConvSpec]) -> dict[ConvSpec, int]:
    """Outputs of a tile along an axis by convolution, `DIRECT` for those that are computed directly; tunes what the store lacks."""
    offered = {spec: sizes for spec in dict.fromkeys(specs) if (sizes := _sizes(spec))}
    times: dict[ConvSpec, dict[int, float]] = {spec: {} for spec in offered}
    _time(tuner, times, [(spec, size) for spec, sizes in offered.items() for size in sizes])
    peak = tuner.peak(winograd.NAME) or math.inf
    near = [spec for spec, found in times.items() if min(found.values()) >= spec.flops / peak]
    _time(tuner, times, [(spec, DIRECT) for spec in near])
    return {spec: _best(found) for spec, found in times.items()}


def _sizes(spec: ConvSpec) -> list[int]:
    """Sizes of tiles worth trying, the best guess first."""
    sizes = [size for size in winograd.SIZES if winograd.fits(spec, size)]
    if not sizes:
        return []
    far = 4 * math.prod(winograd.weight_shape(spec, sizes[0])) > _NEAR
    sides = zip(winograd.axes(spec, sizes[0]), spec.out_size, strict=True)
    covered = math.prod(-(-size // axis.outputs) * axis.outputs for axis, size in sides)
    return sizes if far or covered >= _WASTE * math.prod(spec.out_size) else sizes[:1]


def _best(found: dict[int, float]) -> int:
    size = min(found, key=lambda size: found[size])
    return DIRECT if found[size] >= _GAIN * found.get(DIRECT, math.inf) else size


def _time(tuner: Tuner, times: dict[ConvSpec, dict[int, float]], wanted: Sequence[tuple[ConvSpec, int]]) -> None:
    """Add the seconds of forms to ``times``; infinite where none of a form's schedules builds."""
    functions = [form(spec, size) for spec, size in wanted]
    try:
        found = [tuned.record.seconds for tuned in tuner.tune_all(functions)]
    except AutocompError:
        found = [_alone(tuner, function) for function in functions]
    for (spec, size), seconds in zip(wanted, found, strict=True):
        times[spec][size] = seconds


def _alone(tuner: Tuner, function: Any) -> float:
    try:
        return tuner.tune(function).record.seconds
    except AutocompError:
        return math.inf


def form(spec: ConvSpec, outputs: int) -> Any:
    """A convolution by itself as a PrimFunc: in tiles of ``outputs``, or directly."""
    from tvm import te

    data = te.placeholder((spec.batch, *spec.in_size, spec.in_channels), name="data")
    if outputs == DIRECT:
        blocks = round_up(spec.out_channels, spec.lanes) // spec.lanes
        weight = te.placeholder((blocks, *spec.kernel, spec.in_channels, spec.lanes), name="weight")
        return te.create_prim_func([data, weight, compute.conv2d(data, weight, spec)])
    weight = te.placeholder(winograd.weight_shape(spec, outputs), name="weight")
    return te.create_prim_func([data, weight, winograd.conv2d(data, weight, spec, outputs)])
