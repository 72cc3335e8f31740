"""Channels-last, decided once: convolutions and pools run NHWC, and the transposes between them cancel.

One walk over the function. Each value may be known as ``permute_dims(source, axes)`` without that transpose being emitted;
elementwise operations, reductions, padding and concatenation are carried over to the source, and a transpose is made
only for an operation that needs the original order. TVM's own ConvertLayout leaves transposes around ``clip`` (ReLU6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from autocomp.compiler import convolutions
from autocomp.compiler.expressions import array_of, is_constant, reshape_parts, shape_of
from autocomp.compiler.views import Views

_ELEMENTWISE = {
    "relax." + name
    for name in """
    add subtract multiply divide maximum minimum power less greater equal where
    nn.relu nn.relu6 nn.gelu nn.gelu_tanh nn.silu nn.leakyrelu sigmoid tanh exp log sqrt rsqrt erf square
    abs negative round floor ceil clip astype
    """.split()  # noqa: SIM905 - a list of quoted names would be harder to read
}
_LAYOUTS = {4: "NHWC", 5: "NDHWC"}
_POOLS = {f"relax.nn.{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg") for rank in (2, 3)}
_REDUCTIONS = {"relax.mean", "relax.sum", "relax.max", "relax.min"}


def to_channels_last(mod: Any, lanes: int = 16) -> Any:
    """Rewrite ``main`` of a Relax module so that its convolutions and pools have channels last. Results are unchanged.

    ``lanes`` is a vector's: it decides how transposed convolutions are split.
    """
    import tvm
    from tvm import relax

    function = mod["main"]
    others = {name: body for name, body in mod.functions.items() if name.name_hint != "main"}
    builder = relax.BlockBuilder(tvm.IRModule(others))
    walk = _Walk(builder, lanes)
    with builder.function("main", list(function.params)):
        with builder.dataflow():
            for block in function.body.blocks:
                for binding in block.bindings:
                    walk.bind(binding)
            result = builder.emit_output(walk.rewrite(function.body.body))
        builder.emit_func_output(result)
    return relax.transform.DeadCodeElimination()(builder.finalize())


@dataclass(frozen=True)
class _Permuted:
    """A value that equals ``permute_dims(source, axes)``."""

    source: Any
    axes: tuple[int, ...]


@dataclass(frozen=True)
class _Outputs:
    """The outputs of an operation that has several, each as a value of its own."""

    outputs: tuple[Any, ...]


class _Walk:
    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self.lanes, self.views = builder, lanes, Views(builder)
        self.known: dict[Any, Any] = {}  # variable of the old function -> new expression or _Permuted
        self.made: dict[Any, Any] = {}  # _Permuted key -> transposed value already emitted

    def bind(self, binding: Any) -> None:
        self.known[binding.var] = self._value(binding.value)

    def rewrite(self, expression: Any) -> Any:
        """The new value of an old expression, in its original order of axes."""
        from tvm import relax

        if isinstance(expression, relax.Tuple):
            return relax.Tuple([self.rewrite(field) for field in expression.fields])
        value = self._lookup(expression)
        if isinstance(value, _Outputs):
            return relax.Tuple([self._plain(output) for output in value.outputs])
        return self._plain(value)

    def _plain(self, value: Any) -> Any:
        return self._transpose(value.source, value.axes) if isinstance(value, _Permuted) else value

    def _lookup(self, expression: Any) -> Any:
        from tvm import relax

        return self.known.get(expression, expression) if isinstance(expression, relax.Var) else expression

    def _value(self, value: Any) -> Any:
        from tvm import ir, relax

        if isinstance(value, relax.Var):
            return self._lookup(value)
        if isinstance(value, relax.TupleGetItem):
            found = self._lookup(value.tuple_value)
            return found.outputs[value.index] if isinstance(found, _Outputs) else self._emit(value)
        if isinstance(value, relax.Tuple):  # (a max-pool's values, and indices that nobody reads)
            return _Outputs(tuple(map(self._lookup, value.fields)))
        if not isinstance(value, relax.Call) or not isinstance(value.op, ir.Op):
            return self._emit(value)
        name = value.op.name
        if name == "relax.permute_dims":
            return self._permute(value)
        if name in convolutions.CONVOLUTIONS + convolutions.TRANSPOSED and convolutions.channels_first(value):
            return self._convolution(value)
        if name == "relax.nn.batch_norm" and not value.attrs.training and all(map(is_constant, value.args[1:])):
            return self._batch_norm(value)
        if name in _POOLS and value.attrs.layout in ("NCHW", "NCDHW"):
            return self._pool(value)
        if name in _ELEMENTWISE:
            return self._elementwise(value)
        if name in _REDUCTIONS:
            return self._reduce(value)
        if name == "relax.concat":
            return self._concat(value)
        if name in ("relax.reshape", "relax.expand_dims", "relax.squeeze"):
            return self._reshape(value)
        if name == "relax.broadcast_to" and shape_of(value) is not None and shape_of(value) == shape_of(value.args[0]):
            return self._lookup(value.args[0])
        if name == "relax.matmul":
            return self._matmul(value)
        if name == "relax.strided_slice":
            return self._slice(value)
        if name == "relax.split":
            return self._split(value)
        if name == "relax.take":
            return self._take(value)
        return self._emit(value)

    def _emit(self, value: Any) -> Any:
        """Emit an operation that wants its inputs in their original order."""
        from tvm import relax

        if isinstance(value, relax.Call):
            arguments = [self.rewrite(argument) for argument in value.args]
            value = relax.Call(value.op, arguments, value.attrs, value.ty_args)
        elif isinstance(value, relax.Tuple):
            value = self.rewrite(value)
        elif isinstance(value, relax.TupleGetItem):
            value = relax.TupleGetItem(self.rewrite(value.tuple_value), value.index)
        return self.builder.emit(value)

    def _transpose(self, source: Any, axes: tuple[int, ...]) -> Any:
        from tvm import relax

        if axes == tuple(range(len(axes))):
            return source
        key = (source, axes)
        if key not in self.made:
            shape = shape_of(source) or ()
            target = [shape[axis] for axis in axes]
            moved = [axis for axis in axes if shape[axis] != 1]
            free = moved == sorted(moved)  # only axes of size 1 move: the data stay where they are
            op = relax.op.reshape(source, target) if free else relax.op.permute_dims(source, list(axes))
            self.made[key] = self.builder.emit(op)
        return self.made[key]

    def _as(self, expression: Any, axes: tuple[int, ...]) -> Any:
        """The value ``v`` such that ``permute_dims(v, axes)`` is the old expression."""
        value = self._lookup(expression)
        if isinstance(value, _Permuted):
            if value.axes == axes:
                return value.source
            composed = tuple(value.axes[axis] for axis in _inverse(axes))
            return self._transpose(value.source, composed)
        return self._transpose(value, _inverse(axes))

    def _permute(self, call: Any) -> Any:
        value = self._lookup(call.args[0])
        rank = len(shape_of(call.args[0]) or ())
        axes = tuple(int(axis) for axis in call.attrs.axes) if call.attrs.axes else tuple(reversed(range(rank)))
        if not isinstance(value, _Permuted):
            return _Permuted(value, axes)
        composed = tuple(value.axes[axis] for axis in axes)
        return value.source if composed == tuple(range(rank)) else _Permuted(value.source, composed)

    def _convolution(self, call: Any) -> Any:
        axes = _channels_first(len(shape_of(call) or ()))
        data, weight = self._as(call.args[0], axes), self.rewrite(call.args[1])
        if call.op.name in convolutions.TRANSPOSED:
            return _Permuted(convolutions.transposed(self.builder, call, data, weight, self.lanes), axes)
        return _Permuted(convolutions.convolution(self.views, call, data, weight), axes)

    def _batch_norm(self, call: Any) -> Any:
        """A BatchNorm that could not be folded, as one multiplication and one addition with constants."""
        from tvm import relax

        gamma, beta, mean, variance = (array_of(argument).astype("float64") for argument in call.args[1:])
        factor = gamma / np.sqrt(variance + call.attrs.epsilon)
        shift = beta - mean * factor
        rank, axis = len(shape_of(call.args[0]) or ()), int(call.attrs.axis)
        along = [-1 if position == axis % rank else 1 for position in range(rank)]
        value = self._lookup(call.args[0])
        axes = value.axes if isinstance(value, _Permuted) else tuple(range(rank))
        source = self._as(call.args[0], axes)
        for op, array in ((relax.op.multiply, factor), (relax.op.add, shift)):
            constant = relax.const(np.ascontiguousarray(array.reshape(along).transpose(_inverse(axes)), "float32"))
            source = self.builder.emit(op(source, constant))
        return _Outputs((_Permuted(source, axes), call.args[3], call.args[4]))

    def _pool(self, call: Any) -> Any:
        from tvm import relax

        rank, attrs = len(shape_of(call.args[0]) or ()), call.attrs
        axes = _channels_first(rank)
        data, layout = self._as(call.args[0], axes), _LAYOUTS[rank]
        operation = getattr(relax.op.nn, call.op.name.removeprefix("relax.nn."))
        if "adaptive" in call.op.name:
            pooled = operation(data, attrs.output_size, layout)
        else:
            pooled = operation(
                data, attrs.pool_size, attrs.strides, attrs.padding, attrs.dilation, attrs.ceil_mode, attrs.count_include_pad, layout
            )  # fmt: skip
        return _Permuted(self.builder.emit(pooled), axes)

    def _elementwise(self, call: Any) -> Any:
        axes = self._common_axes(call.args)
        if axes is None:
            return self._emit(call)
        return _Permuted(self.views.elementwise(call, [self._aligned(argument, axes) for argument in call.args]), axes)

    def _common_axes(self, arguments: Any) -> tuple[int, ...] | None:
        """The order that the permuted inputs share, if every other input can be brought to it."""

        permuted = [value for value in map(self._lookup, arguments) if isinstance(value, _Permuted)]
        if not permuted or len({value.axes for value in permuted}) != 1:
            return None
        rank = len(permuted[0].axes)
        for argument in arguments:
            shape = shape_of(argument)
            if shape is not None and len(shape) not in (0, rank) and not is_constant(self._lookup(argument)):
                return None
        return permuted[0].axes

    def _aligned(self, argument: Any, axes: tuple[int, ...]) -> Any:
        from tvm import relax

        shape = shape_of(argument)
        if not shape:  # a scalar, or no tensor at all
            return self._lookup(argument)
        if is_constant(value := self._lookup(argument)):
            array = array_of(value)
            array = array.reshape((1,) * (len(axes) - array.ndim) + array.shape).transpose(_inverse(axes))
            return relax.const(np.ascontiguousarray(array))
        return self._as(argument, axes)

    def _reduce(self, call: Any) -> Any:
        from tvm import relax

        value = self._lookup(call.args[0])
        if not isinstance(value, _Permuted) or call.attrs.axis is None:
            return self._emit(call)
        rank = len(value.axes)
        reduced = [int(axis) % rank for axis in call.attrs.axis]
        kept = [value.axes[axis] for axis in range(rank) if axis not in reduced]
        if not call.attrs.keepdims and kept != sorted(kept):
            return self._emit(call)
        op = getattr(relax.op, call.op.name.removeprefix("relax."))
        out = self.builder.emit(op(value.source, [value.axes[axis] for axis in reduced], call.attrs.keepdims))
        return _Permuted(out, value.axes) if call.attrs.keepdims else out

    def _concat(self, call: Any) -> Any:
        from tvm import relax

        fields = self._lookup(call.args[0])
        parts = list(fields.fields) if isinstance(fields, relax.Tuple) else []
        axes = self._common_axes(parts) if parts else None
        if axes is None:
            return self._emit(call)
        joined = relax.op.concat([self._as(part, axes) for part in parts], axes[int(call.attrs.axis) % len(axes)])
        return _Permuted(self.builder.emit(joined), axes)

    def _reshape(self, call: Any) -> Any:
        """Reshape, squeeze and expand_dims. Where axes split, merge, or of size 1 come and go, a permuted value may stay permuted."""
        from tvm import relax

        value, target = self._lookup(call.args[0]), shape_of(call)
        if target is not None and is_constant(call.args[0]):
            return relax.const(array_of(call.args[0]).reshape(target))
        if not target or 0 in target or not isinstance(value, _Permuted):
            return self._emit(call)
        shape = shape_of(value.source) or ()
        moved = [axis for axis in value.axes if shape[axis] != 1]
        if moved == sorted(moved):  # (N, C, 1, 1) flattened: the order in memory is the same
            return self.builder.emit(relax.op.reshape(value.source, target))
        parts = reshape_parts([shape[axis] for axis in moved], target)
        sources = [[moved[position] for position in old] for old, _ in parts]
        if any(axes != list(range(axes[0], axes[-1] + 1)) for axes in sources if axes):
            return self._emit(call)  # axes that are apart in memory become one
        # the parts in the source's order; what holds only 1s goes in front
        order = sorted(range(len(parts)), key=lambda index: sources[index][:1])
        places = [position for index in order for position in parts[index][1]]
        source = self.builder.emit(relax.op.reshape(value.source, [target[position] for position in places]))
        return _Permuted(source, _inverse(tuple(places)))

    def _matmul(self, call: Any) -> Any:
        """A right-hand side whose rows lie across memory is made by two transposes, of which the template reads the last as it is."""
        from tvm import relax

        right = self._lookup(call.args[1])
        if isinstance(right, _Permuted) and len(right.axes) > 2 and right.axes[-2] == len(right.axes) - 1:
            *leading, depth, across = right.axes
            last = [*range(len(leading)), len(leading) + 1, len(leading)]
            rows = self._transpose(right.source, (*leading, across, depth))
            transposed = self.builder.emit(relax.op.permute_dims(rows, last))
            return self.builder.emit(
                relax.Call(call.op, [self.rewrite(call.args[0]), transposed], call.attrs, call.ty_args)
            )
        return self._emit(call)

    def _slice(self, call: Any) -> Any:
        from tvm import relax

        value = self._lookup(call.args[0])
        if not isinstance(value, _Permuted):
            return self._emit(call)
        axes, begin, end, *strides = ([int(item) for item in field.fields] for field in call.args[1:])
        axes = [value.axes[axis % len(value.axes)] for axis in axes]
        return _Permuted(
            self.builder.emit(relax.op.strided_slice(value.source, axes, begin, end, *strides)), value.axes
        )

    def _take(self, call: Any) -> Any:
        """Lookups at a list of places (resizing, reflection at the edges), along whichever axis holds them now."""
        from tvm import relax

        value, places = self._lookup(call.args[0]), shape_of(call.args[1])
        if not isinstance(value, _Permuted) or places is None or len(places) != 1 or call.attrs.axis is None:
            return self._emit(call)
        axis = value.axes[int(call.attrs.axis) % len(value.axes)]
        taken = relax.op.take(value.source, self.rewrite(call.args[1]), axis=axis, mode=str(call.attrs.mode))
        return _Permuted(self.builder.emit(taken), value.axes)

    def _split(self, call: Any) -> Any:
        from tvm import relax

        value, sections = self._lookup(call.args[0]), call.attrs.indices_or_sections
        if not isinstance(value, _Permuted):
            return self._emit(call)
        axis = value.axes[int(call.attrs.axis) % len(value.axes)]
        parts = self.builder.emit(
            relax.op.split(
                value.source, int(sections) if hasattr(sections, "value") else [int(i) for i in sections], axis
            )
        )
        count = len(call.ty.fields)
        return _Outputs(
            tuple(_Permuted(self.builder.emit(relax.TupleGetItem(parts, i)), value.axes) for i in range(count))
        )


def _channels_first(rank: int) -> tuple[int, ...]:
    """The axes that bring channels from the last to the second place."""
    return (0, rank - 1, *range(1, rank - 1))


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.argsort(axes))
