"""Loops whose steps depend on each other, written as they run: running sums, and writing at indices in order."""

from __future__ import annotations

from typing import Any


def scan(outer: int, length: int, inner: int, kind: str, how: str) -> Any:
    """PrimFunc ``x [outer, length, inner] → running result along the middle axis``; ``how`` is add, multiply, max, min or logaddexp."""
    from tvm.script import tirx as T

    combine = _combine(how)

    @T.prim_func(s_tir=True)
    def function(X: T.Buffer((outer, length, inner), kind), Y: T.Buffer((outer, length, inner), kind)) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in T.serial(outer):
                for k in T.serial(inner):
                    Y[i, 0, k] = X[i, 0, k]
                for j in T.serial(length - 1):
                    for k in T.serial(inner):
                        Y[i, j + 1, k] = combine(Y[i, j, k], X[i, j + 1, k])

    return function


def write(elements: int, size: int, kind: str, how: str) -> Any:
    """PrimFunc ``x [elements], values [size], places [size] → x with every value taken in at its place, in order``.

    ``how`` is update (the value replaces what is there), add, multiply, max or min. Places lie inside ``x``.
    """
    from tvm.script import tirx as T

    combine = _combine(how)

    @T.prim_func(s_tir=True)
    def function(
        X: T.Buffer((elements,), kind), V: T.Buffer((size,), kind), P: T.Buffer((size,), "int32"), Y: T.Buffer((elements,), kind)
    ) -> None:  # fmt: skip
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            for i in T.serial(elements):
                Y[i] = X[i]
            for i in T.serial(size):
                Y[P[i]] = combine(Y[P[i]], V[i])

    return function


def _combine(how: str) -> Any:
    from tvm import tirx

    def logaddexp(a: Any, b: Any) -> Any:
        larger, smaller = tirx.max(a, b), tirx.min(a, b)
        return larger + tirx.log(1.0 + tirx.exp(smaller - larger))

    return {
        "update": lambda old, new: new,
        "add": lambda old, new: old + new,
        "multiply": lambda old, new: old * new,
        "max": tirx.max,
        "min": tirx.min,
        "logaddexp": logaddexp,
    }[how]
