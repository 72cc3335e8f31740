"""Batches of a task: how many samples one holds, parts of it, several made one. Every pass over calibration data cuts them here.

A batch is what the model is called with: a tuple of tensors. ``axes`` says along which axis of each input its samples lie; None for an
input that has none (a table), which every part gets whole. Without ``axes`` it is the first of every input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from autocomp.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    Batch = tuple[Tensor, ...]
else:  # torch is not imported for a name
    Batch = tuple
Axes = tuple[int | None, ...]


def axes_of(batch: Sequence[Tensor], axes: Axes | None = None) -> Axes:
    """Return the axis of samples of each input; the first, where nobody said."""
    return (0,) * len(batch) if axes is None else axes


def count(batch: Sequence[Tensor], axes: Axes | None = None) -> int:
    """Return the number of samples. UsageError if inputs disagree on it."""
    sizes = {
        index: tensor.shape[axis]
        for index, (tensor, axis) in enumerate(zip(batch, axes_of(batch, axes), strict=True))
        if axis is not None
    }
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{size} in input {index}" for index, size in sizes.items())
        raise UsageError(
            f"the inputs of a batch must hold as many samples each; found {found or 'no input with samples'}. "
            "Say with Task.batch_axes along which axis samples lie, None for an input without"
        )
    return next(iter(sizes.values()))


def part(batch: Batch, start: int, length: int, axes: Axes | None = None) -> Batch:
    """Return ``length`` samples from ``start`` on."""
    return tuple(
        tensor if axis is None else tensor.narrow(axis, start, length)
        for tensor, axis in zip(batch, axes_of(batch, axes), strict=True)
    )


def split(batch: Batch, size: int, axes: Axes | None = None) -> Iterator[Batch]:
    """Yield parts of ``size`` samples at most, as even as can be: none is a small remainder."""
    samples = count(batch, axes)
    parts = -(-samples // size)
    for index in range(parts):
        start, stop = samples * index // parts, samples * (index + 1) // parts
        yield part(batch, start, stop - start, axes)


def shape_of(batch: Batch, axes: Axes | None = None) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of one sample: those of the inputs, 0 in the place of the number of samples."""
    return tuple(
        tuple(0 if index == axis else size for index, size in enumerate(tensor.shape))
        for tensor, axis in zip(batch, axes_of(batch, axes), strict=True)
    )


def first(batches: Sequence[Batch], samples: int, axes: Axes | None = None) -> tuple[Batch, ...]:
    """Take the first samples; those of one shape become one batch, which later passes are faster for."""
    import torch

    groups: list[list[Batch]] = []
    left = samples
    for batch in batches:
        if left <= 0:
            break
        taken = part(batch, 0, min(left, count(batch, axes)), axes)
        left -= count(taken, axes)
        group = next((group for group in groups if _joinable(group[0], taken, axes)), None)
        if group is None:
            groups.append(group := [])
        group.append(taken)
    return tuple(
        tuple(
            tensors[0].detach() if axis is None else torch.cat(tensors, axis).detach()
            for tensors, axis in zip(zip(*group, strict=True), axes_of(group[0], axes), strict=True)
        )
        for group in groups
    )


def _joinable(batch: Batch, other: Batch, axes: Axes | None) -> bool:
    """Whether samples have the same shapes and inputs without samples the same values."""
    if shape_of(batch, axes) != shape_of(other, axes):
        return False
    inputs = zip(batch, other, axes_of(batch, axes), strict=True)
    return all(axis is not None or bool((one == two).all()) for one, two, axis in inputs)


def like(example: Batch, batches: Sequence[Batch], axes: Axes | None = None) -> Iterator[Batch]:
    """Yield parts of ``batches`` that have the shapes of ``example``; batches of other shapes have none."""
    size, wanted = count(example, axes), shape_of(example, axes)
    for batch in batches:
        if shape_of(batch, axes) == wanted:
            for start in range(0, count(batch, axes) - size + 1, size):
                yield part(batch, start, size, axes)
