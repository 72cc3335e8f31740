"""Windows of a tensor → Relax: frames of a signal, patches of a map, views by strides."""

from __future__ import annotations

from typing import Any

from autocomp.compiler.expressions import shape_of
from autocomp.errors import ExportError


def unfold(node: Any, importer: Any) -> Any:
    """``x.unfold(axis, size, step)``: windows along an axis; what lies in one becomes the last axis."""
    x, shape = importer.env[node.args[0]], tuple(node.meta["val"].shape)
    axis, step = int(node.args[1]) % max(len(shape) - 1, 1), int(node.args[3])

    def compute(x: Any) -> Any:
        from tvm import te

        def element(*at: Any) -> Any:
            return x[(*at[:axis], at[axis] * step + at[-1], *at[axis + 1 : -1])]

        return te.compute(shape, element, name="unfold")

    return importer.block_builder.emit_te(compute, x, primfunc_name_hint="unfold")


def as_strided(node: Any, importer: Any) -> Any:
    """Elements of a contiguous tensor by strides of torch's own choosing."""
    source = node.args[0].meta["val"]
    shape, strides = [int(size) for size in node.args[1]], [int(stride) for stride in node.args[2]]
    start = int(node.args[3] or 0) if len(node.args) > 3 else int(source.storage_offset())
    last = start + sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True))
    if not source.is_contiguous() or source.storage_offset() != 0 or last >= source.numel():
        raise ExportError("it reads memory as no tensor of that shape lies in it; index the tensor instead")
    x = importer.env[node.args[0]]
    sizes = shape_of(x) or ()

    def compute(x: Any) -> Any:
        from tvm import te

        def element(*at: Any) -> Any:
            flat: Any = start
            for position, stride in zip(at, strides, strict=True):
                flat = flat + position * stride
            place: list[Any] = []
            for size in reversed(sizes):
                place.insert(0, flat % size)
                flat = flat // size
            return x[tuple(place)]

        return te.compute(tuple(shape), element, name="as_strided")

    return importer.block_builder.emit_te(compute, x, primfunc_name_hint="as_strided")
