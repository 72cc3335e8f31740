"""Convolutions of every kind brought to the few that have templates: channels last, and not transposed.

One-dimensional ones run over a picture one row high. Three-dimensional ones whose kernel covers time alone, or space alone, are
two-dimensional over reshaped data. A transposed convolution becomes plain ones of stride 1 (see ``phases``) whose results are interleaved;
what follows it is fused into the interleaving. Weights may be constants or computed at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.compiler.expressions import array_of, is_constant, shape_of
from autocomp.kernels import interleave, phases
from autocomp.kernels.specs import live_taps, padding_left

if TYPE_CHECKING:
    from autocomp.compiler.views import Views
    from autocomp.kernels.phases import Plan, Run

# (data [N, *S, C], weight [O, C/groups, *K], strides, padding, dilation, groups) → [N, *T, O], of two axes or three
Emit = Callable[[Any, "Weight", Sequence[int], Sequence[tuple[int, int]], Sequence[int], int], Any]

CONVOLUTIONS = ("relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d")
TRANSPOSED = ("relax.nn.conv1d_transpose", "relax.nn.conv2d_transpose", "relax.nn.conv3d_transpose")


def imported(node: Any, importer: Any) -> Any:
    """``aten.convolution``: as TVM's importer translates it, which lacks transposed ones of three dimensions."""
    from tvm import relax

    data, weight, bias, stride, padding, dilation, is_transposed, output_padding, groups = importer.retrieve_args(node)
    if not is_transposed or len(shape_of(data) or ()) != 5:
        return importer._convolution(node)
    result = importer.block_builder.emit(
        relax.op.nn.conv3d_transpose(data, weight, stride, padding, output_padding, dilation, groups, "NCDHW", "IODHW")
    )
    if bias is None:
        return result
    return importer.block_builder.emit(relax.op.add(result, relax.op.reshape(bias, (1, -1, 1, 1, 1))))


def channels_first(call: Any) -> bool:
    """Whether a convolution is laid out as torch's."""
    return str(call.attrs.data_layout) in ("NCW", "NCHW", "NCDHW")


def convolution(views: Views, call: Any, data: Any, weight: Any) -> Any:
    """The plain convolution ``call`` of ``data [N, *S, C]``; ``weight`` is its second argument. Returns ``[N, *T, O]``."""
    attrs, builder = call.attrs, views.builder
    result, shape = plain(
        builder, data, Weight.of(builder, weight), _ints(attrs.strides), _pairs(attrs.padding), _ints(attrs.dilation),
        int(attrs.groups), floats(builder),
    )  # fmt: skip
    return views.reshaped(result, shape)


def transposed(builder: Any, call: Any, data: Any, weight: Any, lanes: int) -> Any:
    """The transposed convolution ``call`` of ``data [N, *S, C]``; ``weight [C, O/groups, *K]``. Returns ``[N, *T, O]``."""
    attrs, groups = call.attrs, int(call.attrs.groups)
    strides, dilation, padding = _ints(attrs.strides), _ints(attrs.dilation), [low for low, _ in _pairs(attrs.padding)]
    outputs = list((shape_of(call) or ())[2:])
    kernel_weight = Weight.of(builder, weight)
    inputs, channels, *kernel = kernel_weight.shape
    if groups == inputs and channels == 1 and groups > 1 and not any(step > 1 for step in dilation):
        by_tap = kernel_weight.reshape(groups, *kernel).transpose(*range(1, len(kernel) + 1), 0)
        return builder.emit_te(
            lambda x, w: interleave.depthwise_transposed(x, w, strides, padding, outputs, groups),
            data, by_tap.expression(), primfunc_name_hint="depthwise_transposed",
        )  # fmt: skip
    return in_phases(builder, data, kernel_weight, strides, padding, dilation, groups, outputs, lanes, floats(builder))


def in_phases(
    builder: Any,
    data: Any,
    weight: Weight,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    outputs: Sequence[int],
    lanes: int,
    emit: Emit,
) -> Any:
    """A transposed convolution of ``data [N, *S, C]`` with ``weight [C, O/groups, *K]`` by plain ones, which ``emit`` makes."""
    _, channels, *kernel = weight.shape
    chosen = phases.plan(kernel, strides, padding, dilation, outputs, channels, lanes)
    parts = [_part(builder, data, weight, runs, chosen, groups, emit) for runs in chosen.convolutions()]
    if all(axis.stride == 1 and not axis.crop for axis in chosen.axes):
        return parts[0]
    return builder.emit_te(
        lambda *values: interleave.interleave(values, chosen, groups, channels), *parts, primfunc_name_hint="interleave"
    )


def _part(builder: Any, data: Any, weight: Weight, runs: Sequence[Run], chosen: Plan, groups: int, emit: Emit) -> Any:
    """One of a plan's convolutions; its outputs are ordered by group, by phase and by channel."""
    inputs, channels, *_ = weight.shape
    rank = len(runs)
    # [G, I, O, K...] → every axis of taps as (phases, taps), then [G, phases..., O, I, taps...]
    value = weight.reshape(groups, inputs // groups, *weight.shape[1:])
    for axis, run in enumerate(runs):
        position = 3 + 2 * axis
        value = value.take(position, [tap for taps in run.taps for tap in taps])
        value = value.reshape(*value.shape[:position], len(run.phases), run.length, *value.shape[position + 1 :])
    value = value.transpose(0, *range(3, 3 + 2 * rank, 2), 2, 1, *range(4, 4 + 2 * rank, 2))
    lengths = [run.length for run in runs]
    count = int(np.prod([len(run.phases) for run in runs])) * channels * groups
    value = value.reshape(count, inputs // groups, *lengths)
    padding = []
    for run, planned, size in zip(runs, chosen.axes, (shape_of(data) or ())[1:-1], strict=True):
        last = planned.count - 1 + run.first + (run.length - 1) * run.dilation  # the last input read
        padding.append((-run.first, last - (size - 1)))
    data, padding = _cut(builder, data, padding)
    return _shaped(
        builder, *plain(builder, data, value, [1] * rank, padding, [run.dilation for run in runs], groups, emit)
    )


def constant(
    builder: Any,
    data: Any,
    weight: np.ndarray,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    emit: Emit,
) -> Any:
    """Convolution, by ``emit``, of ``data [N, *S, C]`` with a constant weight [O, C/groups, *K], padded alike on both sides."""
    borders = [(size, size) for size in padding]
    return _shaped(builder, *plain(builder, data, Weight(builder, weight), strides, borders, dilation, groups, emit))


def _shaped(builder: Any, result: Any, shape: tuple[int, ...]) -> Any:
    from tvm import relax

    return result if shape == shape_of(result) else builder.emit(relax.op.reshape(result, list(shape)))


def _cut(builder: Any, data: Any, padding: Sequence[tuple[int, int]]) -> tuple[Any, list[tuple[int, int]]]:
    """Data without what negative padding takes away, and the padding that is left."""
    from tvm import relax

    sizes = (shape_of(data) or ())[1:-1]
    begin = [max(-low, 0) for low, _ in padding]
    end = [size - max(-high, 0) for size, (_, high) in zip(sizes, padding, strict=True)]
    if any(begin) or end != list(sizes):
        data = builder.emit(relax.op.strided_slice(data, list(range(1, len(sizes) + 1)), begin, end))
    return data, [(max(low, 0), max(high, 0)) for low, high in padding]


def plain(
    builder: Any,
    data: Any,
    weight: Weight,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    emit: Emit,
) -> tuple[Any, tuple[int, ...]]:
    """Convolution, by ``emit``, of ``data [N, *S, C]`` with ``weight [O, C/groups, *K]``, by one of two or three
    dimensions; what its result is to be reshaped to."""
    from tvm import relax

    n, *sizes, channels = shape_of(data) or ()
    outputs, depth, *kernel = weight.shape

    def again(shape: Sequence[int], keep: Sequence[int], extra: int | None = None) -> tuple[Any, tuple[int, ...]]:
        """The same over data of another shape, whose axes are those of ``keep``; ``extra`` is put in front as one of size 1."""
        moved = builder.emit(relax.op.reshape(data, [*shape, channels]))
        front = [] if extra is None else [extra]
        result, _ = plain(
            builder, moved, weight.reshape(outputs, depth, *front, *(kernel[axis] for axis in keep)),
            [*front, *(strides[axis] for axis in keep)], [*[(0, 0) for _ in front], *(padding[axis] for axis in keep)],
            [*front, *(dilation[axis] for axis in keep)], groups, emit,
        )  # fmt: skip
        return result, shape_of(result) or ()

    def trivial(axis: int) -> bool:
        return kernel[axis] == strides[axis] == 1 and padding[axis] == (0, 0)

    if len(sizes) == 1:
        result, found = again((n, 1, *sizes), (0,), 1)
        return result, (n, *found[2:])
    if len(sizes) == 3 and trivial(0):  # pictures one by one
        result, found = again((n * sizes[0], *sizes[1:]), (1, 2))
        return result, (n, sizes[0], *found[1:])
    if len(sizes) == 3 and trivial(1) and trivial(2):  # along time alone: every pixel is a column
        result, found = again((n, sizes[0], sizes[1] * sizes[2]), (0, 1))
        return result, (n, found[1], *sizes[1:], outputs)
    taps = [live_taps(*axis) for axis in zip(kernel, sizes, strides, padding, dilation, strict=True)]
    if list(map(len, taps)) != kernel:
        for axis, live in enumerate(taps):
            weight = weight.take(2 + axis, live)
        left = [padding_left(*axis) for axis in zip(kernel, taps, padding, dilation, strict=True)]
        data, padding = _cut(builder, data, left)
    result = emit(data, weight, strides, padding, dilation, groups)
    return result, shape_of(result) or ()


def floats(builder: Any) -> Emit:
    """Convolutions of Relax, which the templates take."""
    from tvm import relax

    def emit(
        data: Any,
        weight: Weight,
        strides: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        groups: int,
    ) -> Any:
        rank = len(strides)
        last = weight.transpose(0, *range(2, 2 + rank), 1).expression()
        operation, layout, order = {
            2: (relax.op.nn.conv2d, "NHWC", "OHWI"),
            3: (relax.op.nn.conv3d, "NDHWC", "ODHWI"),
        }[rank]
        borders = [low for low, _ in padding] + [high for _, high in padding]
        return builder.emit(
            operation(data, last, list(strides), borders, list(dilation), groups, layout, order, out_dtype="float32")
        )

    return emit


@dataclass(frozen=True)
class Weight:
    """A weight that is rearranged now if it is a constant, and by the module if it is computed."""

    builder: Any
    value: Any  # numpy array or Relax expression

    @classmethod
    def of(cls, builder: Any, expression: Any) -> Weight:
        return cls(builder, array_of(expression) if is_constant(expression) else expression)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape) if self._known else shape_of(self.value) or ()

    @property
    def _known(self) -> bool:
        return isinstance(self.value, np.ndarray)

    def transpose(self, *axes: int) -> Weight:
        from tvm import relax

        if self._known:
            return Weight(self.builder, self.value.transpose(axes))
        return self._emit(relax.op.permute_dims(self.value, list(axes)))

    def reshape(self, *shape: int) -> Weight:
        from tvm import relax

        if self._known:
            return Weight(self.builder, self.value.reshape(shape))
        return self._emit(relax.op.reshape(self.value, list(shape)))

    def take(self, axis: int, positions: Sequence[int]) -> Weight:
        """Slices along an axis; zeros where a position is -1."""
        from tvm import relax

        kept = np.maximum(positions, 0)
        along = [-1 if index == axis else 1 for index in range(len(self.shape))]
        present = (np.array(positions) >= 0).astype("float32").reshape(along)
        if self._known:
            return Weight(self.builder, self.value.take(kept, axis) * present.astype(self.value.dtype))
        taken = self._emit(relax.op.take(self.value, relax.const(kept.astype("int32")), axis))
        return taken if present.all() else taken._emit(relax.op.multiply(taken.value, relax.const(present)))

    def expression(self) -> Any:
        from tvm import relax

        return relax.const(np.ascontiguousarray(self.value)) if self._known else self.value

    def _emit(self, expression: Any) -> Weight:
        return Weight(self.builder, self.builder.emit(expression))


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _pairs(padding: Any) -> list[tuple[int, int]]:
    """(before, after) of each axis."""
    values = _ints(padding)
    half = len(values) // 2
    return list(zip(values[:half], values[half:], strict=True))
