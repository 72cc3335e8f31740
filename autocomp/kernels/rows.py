"""Softmax and layer normalisation, written as loops: one row at a time, whole vectors, every pass in the first-level cache.

A row whose length is no multiple of the lanes ends with a vector that overlaps the one before it: elements are then computed
twice with the same result, and sums mask what was counted already, so there is no scalar tail. Rows shorter than a vector
use the largest power of two that fits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from autocomp.kernels import vector_math


def vectors_of(length: int, lanes: int) -> tuple[int, int, int]:
    """(lanes used, vectors, elements of the last vector that are counted already)."""
    while lanes > length:
        lanes //= 2
    vectors = -(-length // lanes)
    return lanes, vectors, vectors * lanes - length


def fold(width: int, combine: Callable[[Any, Any], Any]) -> Any:
    """An inline function that combines a vector's lanes, by halves, to ``into[0]``; the vector is spent."""
    from tvm.script import tirx as T

    @T.inline
    def fold(part, into):  # type: ignore[no-untyped-def]
        if width >= 16:
            for lane in T.vectorized(8):
                part[lane] = combine(part[lane], part[lane + 8])
        if width >= 8:
            for lane in T.vectorized(4):
                part[lane] = combine(part[lane], part[lane + 4])
        if width >= 4:
            for lane in T.vectorized(2):
                part[lane] = combine(part[lane], part[lane + 2])
        if width >= 2:
            into[0] = combine(part[0], part[1])
        else:
            into[0] = part[0]

    return fold


def most_of(width: int, vectors: int, last: int) -> tuple[int, Any]:
    """How many maxima are found side by side, and an inline function that leaves the most of a row's vectors in ``into[0]``.

    No vector begins behind ``last``; ``side`` holds the maxima ``[side by side, width]``, and ``part`` a vector that is spent.
    """
    from tvm.script import tirx as T

    abreast = 4 if vectors >= 8 else 1  # that do not wait for one another
    rounds = -(-vectors // abreast)
    find_most = fold(width, T.max)

    @T.inline
    def most(X, row, side, part, into):  # type: ignore[no-untyped-def]
        for k in T.unroll(abreast):
            for lane in T.vectorized(width):
                side[k, lane] = X[row, T.min(k * width, last) + lane]
        for step in T.serial(rounds - 1):
            for k in T.unroll(abreast):
                for lane in T.vectorized(width):
                    side[k, lane] = T.max(side[k, lane], X[row, T.min(((step + 1) * abreast + k) * width, last) + lane])
        for lane in T.vectorized(width):
            part[lane] = side[0, lane]
        for k in T.unroll(abreast - 1):
            for lane in T.vectorized(width):
                part[lane] = T.max(part[lane], side[k + 1, lane])
        find_most(part, into)

    return abreast, most


def softmax(rows: int, length: int, lanes: int) -> Any:
    """PrimFunc ``x [rows, length] → softmax along the last axis``, float32, scheduled."""
    from tvm.script import tirx as T

    width, vectors, overlap = vectors_of(length, lanes)
    last = length - width
    exp, add_up = vector_math.exp_below_zero, fold(width, operator.add)
    abreast, find_most = most_of(width, vectors, last)

    @T.prim_func(s_tir=True)
    def function(X: T.Buffer((rows, length), "float32"), Y: T.Buffer((rows, length), "float32")) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            most = T.sblock_alloc_buffer((abreast, width), "float32", scope="local")
            part = T.sblock_alloc_buffer((width,), "float32", scope="local")
            total = T.sblock_alloc_buffer((1,), "float32", scope="local")
            for row in T.serial(rows):
                find_most(X, row, most, part, total)
                for lane in T.vectorized(width):
                    Y[row, last + lane] = exp(X[row, last + lane] - total[0])
                for lane in T.vectorized(width):
                    part[lane] = T.Select(lane < overlap, T.float32(0), Y[row, last + lane])
                for step in T.serial(vectors - 1):
                    for lane in T.vectorized(width):
                        Y[row, step * width + lane] = exp(X[row, step * width + lane] - total[0])
                    for lane in T.vectorized(width):
                        part[lane] = part[lane] + Y[row, step * width + lane]
                add_up(part, total)
                total[0] = T.float32(1) / total[0]
                for step in T.serial(vectors - 1):
                    for lane in T.vectorized(width):
                        Y[row, step * width + lane] = Y[row, step * width + lane] * total[0]
                for lane in T.vectorized(width):
                    Y[row, last + lane] = Y[row, last + lane] * T.Select(lane < overlap, T.float32(1), total[0])

    return function


def layer_norm(rows: int, length: int, epsilon: float, lanes: int) -> Any:
    """PrimFunc ``x [rows, length], gamma, beta [length] → (x - mean) / sqrt(variance + epsilon) * gamma + beta``, scheduled.

    The variance is the mean of squared differences, in a second pass, as torch's.
    """
    from tvm.script import tirx as T

    width, vectors, overlap = vectors_of(length, lanes)
    last = length - width
    share = 1.0 / length
    add_up = fold(width, operator.add)

    @T.prim_func(s_tir=True)
    def function(
        X: T.Buffer((rows, length), "float32"),
        G: T.Buffer((length,), "float32"),
        B: T.Buffer((length,), "float32"),
        Y: T.Buffer((rows, length), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            part = T.sblock_alloc_buffer((width,), "float32", scope="local")
            mean = T.sblock_alloc_buffer((1,), "float32", scope="local")
            scale = T.sblock_alloc_buffer((1,), "float32", scope="local")
            for row in T.serial(rows):
                for lane in T.vectorized(width):
                    part[lane] = T.Select(lane < overlap, T.float32(0), X[row, last + lane])
                for step in T.serial(vectors - 1):
                    for lane in T.vectorized(width):
                        part[lane] = part[lane] + X[row, step * width + lane]
                add_up(part, mean)
                mean[0] = mean[0] * T.float32(share)
                for lane in T.vectorized(width):
                    part[lane] = T.Select(
                        lane < overlap,
                        T.float32(0),
                        (X[row, last + lane] - mean[0]) * (X[row, last + lane] - mean[0]),
                    )
                for step in T.serial(vectors - 1):
                    for lane in T.vectorized(width):
                        part[lane] = part[lane] + (X[row, step * width + lane] - mean[0]) * (
                            X[row, step * width + lane] - mean[0]
                        )
                add_up(part, scale)
                scale[0] = T.float32(1) / T.sqrt(scale[0] * T.float32(share) + T.float32(epsilon))
                for step in T.serial(vectors):
                    for lane in T.vectorized(width):
                        Y[row, T.min(step * width, last) + lane] = (
                            X[row, T.min(step * width, last) + lane] - mean[0]
                        ) * scale[0] * G[T.min(step * width, last) + lane] + B[T.min(step * width, last) + lane]

    return function
