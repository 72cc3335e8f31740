"""Reductions, running sums, integer division and products of other types → Relax."""

from __future__ import annotations

import math
from typing import Any

from autocomp.compiler.expressions import dtype_of, shape_of
from autocomp.kernels import scans


def reduction(name: str) -> Any:
    """``aten.amax(x, axes, keepdim)`` and its like as the Relax reduction of that name."""

    def convert(node: Any, importer: Any) -> Any:
        from tvm import relax

        x = importer.env[node.args[0]]
        axes = node.args[1] if len(node.args) > 1 else None
        axes = [axes] if isinstance(axes, int) else list(axes) if axes else None
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        if not shape_of(x):
            return x
        return importer.block_builder.emit(getattr(relax.op, name)(x, axes, keepdims=keep))

    return convert


def position(name: str) -> Any:
    """``aten.argmax(x, axis, keepdim)``; of equal values the first counts."""

    def convert(node: Any, importer: Any) -> Any:
        from tvm import relax

        x, axis = importer.env[node.args[0]], node.args[1]
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        if not shape_of(x):
            return relax.const(0, "int64")
        return importer.block_builder.emit(getattr(relax.op, name)(x, int(axis), keep))

    return convert


def running(how: str) -> Any:
    """A running sum, product or extreme along an axis."""

    def convert(node: Any, importer: Any) -> Any:
        return along(importer.block_builder, importer.env[node.args[0]], int(node.args[1]), how)

    return convert


def running_extreme(how: str) -> Any:
    """``cummax`` and ``cummin``: the values; where they stand is not computed."""

    def convert(node: Any, importer: Any) -> Any:
        from tvm import relax

        if any(user.args[1] == 1 and user.users for user in node.users):
            raise ValueError("its values are compiled, its indices are not")
        values = along(importer.block_builder, importer.env[node.args[0]], int(node.args[1]), how)
        return relax.Tuple([values, values])

    return convert


def along(builder: Any, x: Any, axis: int, how: str) -> Any:
    from tvm import relax

    shape = shape_of(x) or ()
    if not shape or 0 in shape:
        return x
    axis %= len(shape)
    kind = dtype_of(x)
    three = [math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])]
    flat = builder.emit(relax.op.reshape(x, three))
    function = builder.add_func(
        scans.scan(three[0], three[1], three[2], kind, how).without_attr("global_symbol"), "scan"
    )
    result = builder.emit(relax.call_tir(function, [flat], out_ty=relax.TensorType(three, kind)))
    return builder.emit(relax.op.reshape(result, list(shape)))


def divide_integers(node: Any, importer: Any) -> Any:
    """Quotients of integers, rounded down or towards zero."""
    down = node.kwargs.get("rounding_mode") == "floor"
    return elementwise(node, importer, lambda a, b: _floor(a, b) if down else _truncated(a, b), "quotient")


def remainder_of_integers(node: Any, importer: Any) -> Any:
    """The remainder with the sign of the divisor."""
    return elementwise(node, importer, lambda a, b: a - _floor(a, b) * b, "remainder")


def fmod(node: Any, importer: Any) -> Any:
    """The remainder with the sign of the dividend."""
    from tvm import tirx

    def function(a: Any, b: Any) -> Any:
        if not floats:
            return a - _truncated(a, b) * b
        x, y = a.astype("float64"), b.astype("float64")  # in which the quotient of two floats is as good as exact
        return (x - tirx.trunc(x / y) * y).astype(kind)

    floats = node.meta["val"].dtype.is_floating_point
    kind = str(node.meta["val"].dtype).removeprefix("torch.")
    return elementwise(node, importer, function, "fmod")


def shift(left: bool) -> Any:
    def convert(node: Any, importer: Any) -> Any:
        return elementwise(node, importer, (lambda a, b: a << b) if left else (lambda a, b: a >> b), "shift")

    return convert


def _floor(a: Any, b: Any) -> Any:
    from tvm import tirx

    return tirx.floordiv(a, _divisor(b))


def _truncated(a: Any, b: Any) -> Any:
    from tvm import tirx

    return tirx.truncdiv(a, _divisor(b))


def _divisor(b: Any) -> Any:
    """Where it is zero torch raises, and the processor would stop: kernels are timed on zeros."""
    from tvm import tirx

    return b if isinstance(b, int) else tirx.Select(b == 0, tirx.const(1, b.dtype), b)


def elementwise(node: Any, importer: Any, function: Any, name: str) -> Any:
    """A function of two broadcast operands, of which either may be a number."""
    from tvm import relax, te

    from autocomp.compiler.operations.indexing import aligned

    target = tuple(int(size) for size in node.meta["val"].shape)
    tensors = [importer.env[argument] for argument in node.args[:2] if hasattr(argument, "meta")]
    kind = dtype_of(tensors[0])
    operands = [importer.env[a] if hasattr(a, "meta") else relax.const(a, kind) for a in node.args[:2]]
    return importer.block_builder.emit_te(
        lambda a, b: te.compute(
            target, lambda *at: function(a[aligned(at, a.shape)], b[aligned(at, b.shape)]), name=name
        ),
        *operands,
        primfunc_name_hint=name,
    )


def product(node: Any, importer: Any) -> Any:
    """``mm`` and ``bmm``, in the type of their operands."""
    from tvm import relax

    a, b = (importer.env[argument] for argument in node.args[:2])
    return importer.block_builder.emit(relax.op.matmul(a, b, out_dtype=dtype_of(a)))
