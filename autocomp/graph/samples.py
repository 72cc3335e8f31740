"""Which axis of each input and output of a model counts samples: found by running two samples at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from autocomp.graph.program import Batch

Axes = tuple[int | None, ...]
MOST = 16  # ways to give each input an axis of its own that are tried; chosen by hand, not measured
_CLOSE = 1e-3  # of the output's range: other batch sizes may sum in another order


def find_batch(
    model: nn.Module, inputs: Sequence[Tensor], others: Sequence[Sequence[Tensor]] = (), stated: Axes | None = None
) -> Batch | None:
    """Return the batch axes of a model's inputs and outputs, or None if no axis of its inputs counts samples.

    ``others`` are more inputs (calibration batches); ``stated`` is what the user says of the inputs. An answer is right if two samples at
    once give what they give one after the other.
    """
    first = tuple(tensor.clone() for tensor in inputs)
    alone = _outputs(model, first)
    if alone is None:
        return None
    for axes in [stated] if stated is not None else _candidates(first, others):
        second = _other(first, others, axes)
        outputs = _checked(model, first, second, axes, alone)
        if outputs is not None:
            return Batch(axes, outputs)
    return None


def doubled(inputs: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
    """The inputs with every sample twice; inputs without a batch axis as they are."""
    return tuple(t if a is None else torch.cat([t, t], a) for t, a in zip(inputs, batch.inputs, strict=True))


def varying_axes(inputs: Sequence[Tensor], others: Sequence[Sequence[Tensor]]) -> list[set[int]]:
    """For each input the axes along which the others differ from it in size."""
    return [
        {axis for other in others if other[i].dim() == x.dim() for axis in range(x.dim()) if other[i].shape[axis] != x.shape[axis]}
        for i, x in enumerate(inputs)
    ]  # fmt: skip


def _candidates(inputs: Sequence[Tensor], others: Sequence[Sequence[Tensor]]) -> Iterator[Axes]:
    """Likely batch axes, the likeliest first."""
    found: dict[Axes, None] = {}
    moving = varying_axes(inputs, others)
    # Each input its own, all alike in number: one sample fits any number by broadcasting, so what leaves an input out comes after.
    nothing: Sequence[int | None] = (None,)
    for options in ([sorted(axes) for axes in moving], [list(range(min(2, x.dim()))) for x in inputs]):
        for axes in islice(product(*(some or nothing for some in options)), MOST):
            if len({x.shape[axis] for x, axis in zip(inputs, axes, strict=True) if axis is not None}) == 1:
                found[axes] = None
    if any(moving):
        for axis in (0, 1):
            found[tuple(axis if axis in axes else None for axes in moving)] = None
    for axis in (0, 1):
        sizes = [x.shape[axis] if x.dim() > axis else None for x in inputs]
        lead = next((size for size in sizes if size is not None), None)
        found[tuple(axis if x.dim() > axis else None for x in inputs)] = None
        found[tuple(axis if size == lead and size is not None else None for size in sizes)] = None
        found[tuple(axis if i == 0 and x.dim() > axis else None for i, x in enumerate(inputs))] = None
    rank = max(x.dim() for x in inputs)  # states of recurrent layers: [layers, N, H] beside [N, T, F]
    found[tuple(0 if x.dim() == rank else None for x in inputs)] = None
    if len(inputs) > 1:
        found[(0, *(1 if x.dim() > 1 else None for x in inputs[1:]))] = None
    yield from (axes for axes in found if any(axis is not None for axis in axes))


def _other(inputs: Sequence[Tensor], others: Sequence[Sequence[Tensor]], axes: Axes) -> tuple[Tensor, ...]:
    """A batch of the same shapes with other values: of the calibration data where there is one, else the inputs turned round."""
    for other in others:
        taken = []
        for x, y, axis in zip(inputs, other, axes, strict=True):
            part = (
                x
                if axis is None
                else y.narrow(axis, max(0, y.shape[axis] - x.shape[axis]), min(x.shape[axis], y.shape[axis]))
            )
            taken.append(part)
        if all(a.shape == b.shape for a, b in zip(taken, inputs, strict=True)):
            return tuple(t.clone() for t in taken)
    return tuple(x if axis is None else x.roll(1, -1) for x, axis in zip(inputs, axes, strict=True))


def _checked(
    model: nn.Module, first: Sequence[Tensor], second: Sequence[Tensor], axes: Axes, alone: list[Any]
) -> Axes | None:
    together = _outputs(
        model, [a if axis is None else torch.cat([a, b], axis) for a, b, axis in zip(first, second, axes, strict=True)]
    )
    after = _outputs(model, second)
    if together is None or after is None or len(together) != len(alone) or len(after) != len(alone):
        return None
    found: list[int | None] = []
    for whole, one, two in zip(together, alone, after, strict=True):
        if not isinstance(whole, Tensor):
            found.append(None)
            continue
        axis = _joined_along(whole, one, two)
        if axis is None and (whole.shape != one.shape or not near(whole, one)):
            return None
        found.append(axis)
    return tuple(found) if any(axis is not None for axis in found) else None


def _joined_along(whole: Tensor, one: Tensor, two: Tensor) -> int | None:
    """The axis along which a tensor is two others in a row; None if there is none."""
    if whole.dim() != one.dim():
        return None
    for axis in range(whole.dim()):
        if whole.shape[axis] == one.shape[axis] + two.shape[axis]:
            parts = torch.cat([one, two], axis)
            if parts.shape == whole.shape and near(whole, parts):
                return axis
    return None


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape differ by no more than sums in another order do."""
    if not b.is_floating_point() or not b.numel():
        return bool((a == b).double().mean() > 1 - _CLOSE) if b.numel() else True
    a, b = a.double(), b.double()
    finite = torch.isfinite(b)
    if not bool((torch.isfinite(a) == finite).all()):
        return False
    scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
    return not bool(finite.any()) or float((a - b)[finite].abs().max()) <= _CLOSE * max(scale, 1e-30)


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Any] | None:
    """The model's outputs in a row, on copies of the inputs; None if it cannot take them."""
    try:
        with torch.no_grad():
            return list(_pytree.tree_leaves(model(*(tensor.clone() for tensor in inputs))))
    except Exception:  # whatever a user's forward does with a batch of another size
        return None
