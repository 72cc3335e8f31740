"""Resizing and uneven pooling → Relax.

Every such operation is linear and separable, whatever its options (corners aligned or not, scale factors, antialiasing): along one axis
each output is a weighted sum of a few inputs. Which, torch is asked itself, by resizing unit vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from autocomp.compiler.expressions import shape_of

_PROBES = 1 << 24  # elements of one call
_TAPS = 8  # sums of more inputs than that are a product with the matrix


def resample(node: Any, importer: Any) -> Any:
    """An upsampling or adaptive average pooling, one axis after the other."""
    value = importer.env[node.args[0]]
    shape, target = shape_of(value) or (), tuple(node.meta["val"].shape)
    first = next((axis for axis in range(len(shape)) if shape[axis] != target[axis]), len(shape))
    rank = len(shape) - 2 if len(shape) > 2 else 1
    axes = range(min(first, len(shape) - rank), len(shape))
    # where the map shrinks first, less is left to do for the other axes
    for axis in sorted(axes, key=lambda axis: target[axis] / shape[axis]):
        matrix = _matrix(node, shape, target, axis)
        if matrix.shape[0] != matrix.shape[1] or not np.array_equal(matrix, np.eye(len(matrix), dtype="float32")):
            value = _along(importer.block_builder, value, matrix, axis)
    return value


def _matrix(node: Any, shape: tuple[int, ...], target: tuple[int, ...], axis: int) -> np.ndarray:
    """Weights ``[out, in]`` of one axis: what unit vectors along it become, the same at every place of the other axes."""
    size, others = shape[axis], [length for place, length in enumerate(shape[2:], 2) if place != axis]
    per_call = max(1, _PROBES // max(size * int(np.prod(others, initial=1)), 1))
    rows = []
    for start in range(0, size, per_call):
        units = torch.eye(size)[start : start + per_call]
        along = [1] * (len(shape) - 2)
        along[axis - 2] = size
        probe = units.reshape(1, len(units), *along).expand(1, len(units), *shape[2:]).contiguous()
        with torch.no_grad():
            answer = node.target(probe, *node.args[1:], **node.kwargs)
        rows.append(answer[(0, slice(None), *[slice(None) if place == axis else 0 for place in range(2, len(shape))])])
    return torch.cat(rows).numpy().T.copy()


def _along(builder: Any, value: Any, matrix: np.ndarray, axis: int) -> Any:
    """Apply a matrix ``[out, in]`` to an axis of a tensor."""
    from tvm import relax

    rank = len(shape_of(value) or ())
    used = matrix != 0
    taps = int(used.sum(1).max())
    if taps > _TAPS:
        order = [place for place in range(rank) if place != axis] + [axis]
        back = [int(place) for place in np.argsort(order)]
        last = builder.emit(relax.op.permute_dims(value, order))
        product = builder.emit(relax.op.matmul(last, relax.const(np.ascontiguousarray(matrix.T))))
        return builder.emit(relax.op.permute_dims(product, back))
    # the places of the inputs used, first to last; an output of fewer repeats one with no weight
    places = np.argsort(~used, axis=1, kind="stable")[:, :taps]
    weights = np.take_along_axis(matrix, places, 1)
    total = None
    for tap in range(taps):
        term = builder.emit(relax.op.take(value, relax.const(places[:, tap].astype("int32")), axis=axis, mode="fast"))
        if not (weights[:, tap] == 1).all():
            along = [-1 if place == axis else 1 for place in range(rank)]
            term = builder.emit(
                relax.op.multiply(term, relax.const(np.ascontiguousarray(weights[:, tap].reshape(along))))
            )
        total = term if total is None else builder.emit(relax.op.add(total, term))
    return total
