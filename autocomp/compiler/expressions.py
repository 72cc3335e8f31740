"""Reading Relax expressions: shapes, reshapes and constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def shape_of(expression: Any) -> tuple[int, ...] | None:
    """The static shape of a tensor expression; None for anything else, or where a size is symbolic."""
    shape = getattr(getattr(expression, "ty", None), "shape", None)
    if shape is None:
        return None
    try:
        return tuple(int(size) for size in shape)
    except TypeError:
        return None


def is_constant(expression: Any) -> bool:
    from tvm import ir

    return isinstance(expression, ir.GenericConst)


def array_of(constant: Any) -> np.ndarray:
    """The array of a Relax constant."""
    result: np.ndarray = constant.value.numpy()
    return result


def number_of(expression: Any) -> float | None:
    """The number that a constant of one element is; None for anything else."""
    array = array_of(expression) if is_constant(expression) else None
    return float(array.item()) if array is not None and array.size == 1 else None


def dtype_of(expression: Any) -> str:
    """The type of a tensor expression's elements."""
    return str(expression.ty.dtype).removeprefix("T.")


def calls(expression: Any, operation: str) -> bool:
    """Whether an expression is a call of an operation, by its full name."""
    from tvm import ir, relax

    return isinstance(expression, relax.Call) and isinstance(expression.op, ir.Op) and expression.op.name == operation


def turns_matrices(axes: Sequence[int] | None) -> bool:
    """Whether a permutation of axes transposes the last two and leaves the others; None does not."""
    rank = len(axes or ())
    return rank > 1 and list(axes or ()) == [*range(rank - 2), rank - 1, rank - 2]


def reshape_parts(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the least parts that hold as many elements on both sides: positions in ``old`` and ``new`` of each."""
    parts: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        have = want = 1
        if j < len(new) and new[j] == 1:
            parts.append(([], [j]))
            j += 1
            continue
        while not left or have != want:
            if have <= want:
                left.append(i)
                have, i = have * old[i], i + 1
            else:
                right.append(j)
                want, j = want * new[j], j + 1
        parts.append((left, right))
    return parts
