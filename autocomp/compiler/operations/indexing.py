"""Reading and writing at indices → Relax. An index below zero counts from the end; one outside the tensor means its nearest element,
where TVM's own translations read foreign memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from autocomp.compiler.expressions import dtype_of, shape_of
from autocomp.kernels import scans


def index(node: Any, importer: Any) -> Any:
    """``x[i, :, j]`` with tensors of integers; torch's rule for where the indexed axes go."""
    x, given = importer.env[node.args[0]], list(node.args[1])
    shape = shape_of(x) or ()
    axes = [axis for axis, item in enumerate(given) if item is not None]
    values = [importer.env[given[axis]] for axis in axes]
    shapes = [shape_of(value) or () for value in values]
    builder = importer.block_builder
    apart = _own_axis(shapes, axes)
    if apart is not None:  # each index has an axis of its own: one lookup after the other
        for axis, value, size in zip(axes, values, apart, strict=True):
            flat = builder.emit(_reshape(_wrapped(builder, value, shape[axis]), [size]))
            x = builder.emit(_take(x, flat, axis))
        return x
    common = _broadcast(shapes)
    target, position = _lookup(shape, axes, common)
    wrapped = [_wrapped(builder, value, shape[axis]) for axis, value in zip(axes, values, strict=True)]

    def compute(x: Any, *indices: Any) -> Any:
        from tvm import te

        def element(*at: Any) -> Any:
            return x[tuple(position(at, indices))]

        return te.compute(tuple(target), element, name="index")

    return builder.emit_te(compute, x, *wrapped, primfunc_name_hint="index")


def _lookup(
    shape: Sequence[int], axes: Sequence[int], common: Sequence[int]
) -> tuple[list[int], Callable[[Sequence[Any], Sequence[Any]], list[Any]]]:
    """The shape of what indices of ``axes``, of the shape ``common`` together, choose; and where an element of it lies in the whole."""
    place = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    target = [shape[axis] for axis in kept]
    target[place:place] = common

    def position(at: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
        inner, outer = at[place : place + len(common)], [*at[:place], *at[place + len(common) :]]
        found: list[Any] = [None] * len(shape)
        for axis, where in zip(kept, outer, strict=True):
            found[axis] = where
        for axis, tensor in zip(axes, tensors, strict=True):
            found[axis] = tensor[aligned(inner, tensor.shape)]
        return found

    return target, position


def gather(node: Any, importer: Any) -> Any:
    """``out[i, j] = x[index[i, j], j]`` along an axis."""
    x, indices = importer.env[node.args[0]], importer.env[node.args[2]]
    builder, shape = importer.block_builder, shape_of(x) or ()
    if not shape:
        return x
    axis = int(node.args[1]) % len(shape)
    target = shape_of(indices) or ()

    def compute(x: Any, i: Any) -> Any:
        from tvm import te

        return te.compute(target, lambda *at: x[(*at[:axis], i[at], *at[axis + 1 :])], name="gather")

    return builder.emit_te(compute, x, _wrapped(builder, indices, shape[axis]), primfunc_name_hint="gather")


def sort(node: Any, importer: Any) -> Any:
    """Values in order along an axis, and where each stood; of equal ones the first comes first."""
    from tvm import relax

    names = ("self", "dim", "descending") if node.target._overloadname == "default" else ("self",)
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, builder = importer.env[node.args[0]], importer.block_builder
    shape = shape_of(x) or ()
    axis = int(given.get("dim", -1)) % max(len(shape), 1)
    indices = builder.emit(relax.op.argsort(x, axis, bool(given.get("descending", False)), dtype="int64"))

    def compute(x: Any, i: Any) -> Any:
        from tvm import te

        return te.compute(shape, lambda *at: x[(*at[:axis], i[at], *at[axis + 1 :])], name="sorted")

    return relax.Tuple([builder.emit_te(compute, x, indices, primfunc_name_hint="sorted"), indices])


def embedding(node: Any, importer: Any) -> Any:
    """Rows of a table."""
    from tvm import relax

    table, indices = importer.env[node.args[0]], importer.env[node.args[1]]
    extents = [*(shape_of(indices) or ()), (shape_of(table) or ())[-1]]
    value = indices
    for step in (
        lambda x: relax.op.astype(x, "int32"),
        lambda x: relax.op.reshape(x, (-1,)),
        lambda x: relax.op.take(table, x, axis=0, mode="clip"),
        lambda x: relax.op.reshape(x, extents),
    ):
        value = importer.block_builder.emit(step(value))
    return value


def index_put(node: Any, importer: Any) -> Any:
    """``x[i, j] = values``, or ``+=``: a mask chooses elements, indices are written one after the other."""
    from tvm import relax

    builder = importer.block_builder
    x, given, values = importer.env[node.args[0]], list(node.args[1]), importer.env[node.args[2]]
    accumulate = bool(node.args[3]) if len(node.args) > 3 else False
    shape = shape_of(x) or ()
    if dtype_of(importer.env[next(item for item in given if item is not None)]) == "bool":
        mask = importer.env[given[0]]
        mask = builder.emit(_reshape(mask, [*(shape_of(mask) or ()), *[1] * (len(shape) - len(shape_of(mask) or ()))]))
        value = builder.emit(relax.op.add(x, values)) if accumulate else values
        return builder.emit(relax.op.where(mask, value, x))
    axes = [axis for axis, item in enumerate(given) if item is not None]
    indices = [_wrapped(builder, importer.env[given[axis]], shape[axis]) for axis in axes]
    common = _broadcast([shape_of(i) or () for i in indices])
    source, position = _lookup(shape, axes, common)
    values = builder.emit(relax.op.broadcast_to(values, source))
    return _write(builder, x, values, indices, position, "add" if accumulate else "update")


def scatter(reduce: str) -> Any:
    """``out[index[i, j], j] = source[i, j]`` along an axis, or summed, multiplied, the larger or smaller of the two."""

    def convert(node: Any, importer: Any) -> Any:
        from tvm import relax

        builder = importer.block_builder
        x, axis, indices = importer.env[node.args[0]], int(node.args[1]), importer.env[node.args[2]]
        shape, target = shape_of(x) or (), shape_of(indices) or ()
        axis %= max(len(shape), 1)
        how = reduce
        if reduce == "named":
            how = {"sum": "add", "prod": "multiply", "amax": "max", "amin": "min"}.get(str(node.args[4]), "")
            if not how or node.kwargs.get("include_self") is False or (len(node.args) > 5 and not node.args[5]):
                raise ValueError(f"scatter_reduce with {node.args[4]!r} that leaves the tensor's own values out")
        source = node.args[3]
        if hasattr(source, "meta"):
            values = importer.env[source]
            if (shape_of(values) or ()) != target:
                values = builder.emit(
                    relax.op.strided_slice(values, list(range(len(target))), [0] * len(target), list(target))
                )
        else:
            values = builder.emit(relax.op.full(target, relax.const(source, dtype_of(x)), dtype_of(x)))
        wrapped = _wrapped(builder, indices, shape[axis])
        return _write(builder, x, values, [wrapped], lambda at, i: [*at[:axis], i[0][tuple(at)], *at[axis + 1 :]], how)

    return convert


def _write(builder: Any, x: Any, values: Any, indices: Sequence[Any], position: Any, how: str) -> Any:
    """Copy ``x``, then take in every element of ``values`` at its position, in order."""
    from tvm import relax, te

    shape, source, kind = shape_of(x) or (), shape_of(values) or (), dtype_of(x)
    elements, size = math.prod(shape), math.prod(source)
    if not size or not elements:
        return x
    kind = "int8" if dtype_of(x) == "bool" else kind  # which is written a byte at a time
    data = builder.emit(_reshape(builder.emit(relax.op.astype(x, kind)), [elements]))
    new = builder.emit(_reshape(builder.emit(relax.op.astype(values, kind)), [size]))

    def places(*tensors: Any) -> Any:
        return te.compute(
            (size,), lambda i: _ravel(position(_unravel(i, source), tensors), shape).astype("int32"), name="places"
        )

    at = builder.emit_te(places, *indices, primfunc_name_hint="places")
    function = builder.add_func(scans.write(elements, size, kind, how).without_attr("global_symbol"), "write")
    written = builder.emit(relax.call_tir(function, [data, new, at], out_ty=relax.TensorType([elements], kind)))
    return builder.emit(relax.op.astype(builder.emit(_reshape(written, shape)), dtype_of(x)))


def _ravel(at: Sequence[Any], shape: Sequence[int]) -> Any:
    from tvm import tirx

    flat: Any = tirx.const(0, "int64")
    for where, size in zip(at, shape, strict=True):
        flat = flat * size + where
    return flat


def _unravel(flat: Any, shape: Sequence[int]) -> tuple[Any, ...]:
    from tvm import tirx

    at: list[Any] = []
    for size in reversed(shape):
        at.append(tirx.indexmod(flat, size))
        flat = tirx.indexdiv(flat, size)
    return tuple(reversed(at))


def _wrapped(builder: Any, value: Any, size: int) -> Any:
    """Indices as 32-bit integers from 0 to ``size`` - 1."""
    from tvm import te, tirx

    def compute(value: Any) -> Any:
        def element(*at: Any) -> Any:
            i = value[at].astype("int32")
            return tirx.max(tirx.min(tirx.if_then_else(i < 0, i + size, i), size - 1), 0)

        return te.compute(value.shape, element, name="wrap")

    return builder.emit_te(compute, value, primfunc_name_hint="wrap")


def _own_axis(shapes: Sequence[Sequence[int]], axes: Sequence[int]) -> list[int] | None:
    """Sizes of indices that each vary along an axis of their own, in order, beside each other; None for any others."""
    if axes != list(range(axes[0], axes[-1] + 1)):
        return None
    rank = max(len(shape) for shape in shapes)
    if rank != len(axes):
        return None
    sizes = []
    for position, shape in enumerate(shapes):
        full = [1] * (rank - len(shape)) + list(shape)
        if any(size != 1 for other, size in enumerate(full) if other != position):
            return None
        sizes.append(full[position])
    return sizes


def _broadcast(shapes: Sequence[Sequence[int]]) -> list[int]:
    import numpy as np

    return list(np.broadcast_shapes(*map(tuple, shapes)))


def aligned(at: Sequence[Any], shape: Sequence[Any]) -> tuple[Any, ...]:
    """The position in a tensor that is broadcast to where ``at`` is a position."""
    behind = at[len(at) - len(shape) :] if len(shape) else []
    return tuple(0 if int(size) == 1 else where for where, size in zip(behind, shape, strict=True))


def _take(x: Any, indices: Any, axis: int) -> Any:
    from tvm import relax

    return relax.op.take(x, indices, axis=axis, mode="fast")


def _reshape(x: Any, shape: Sequence[int]) -> Any:
    from tvm import relax

    return relax.op.reshape(x, list(shape))
