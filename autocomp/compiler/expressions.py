"""Reading Relax expressions: shapes and constants."""

from __future__ import annotations

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
    return constant.value.numpy()
