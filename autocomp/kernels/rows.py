"""Softmax and layer normalisation, written as loops: one row at a time, whole vectors, every pass in the first-level cache.

A row whose length is no multiple of the lanes ends with a vector that overlaps the one before it: elements are then computed
twice with the same result, and sums mask what was counted already, so there is no scalar tail. Rows shorter than a vector
use the largest power of two that fits.
"""

from __future__ import annotations

from typing import Any

from autocomp.kernels import vector_math


def _vectors(length: int, lanes: int) -> tuple[int, int, int]:
    """(lanes used, vectors, elements of the last vector that are counted already)."""
    while lanes > length:
        lanes //= 2
    vectors = -(-length // lanes)
    return lanes, vectors, vectors * lanes - length


def softmax(rows: int, length: int, lanes: int) -> Any:
    """PrimFunc ``x [rows, length] → softmax along the last axis``, float32, scheduled."""
    from tvm.script import tirx as T

    width, vectors, overlap = _vectors(length, lanes)
    last = length - width
    exp = vector_math.exp

    @T.prim_func(s_tir=True)
    def function(X: T.Buffer((rows, length), "float32"), Y: T.Buffer((rows, length), "float32")) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            part = T.sblock_alloc_buffer((width,), "float32", scope="local")
            total = T.sblock_alloc_buffer((1,), "float32", scope="local")
            for row in T.serial(rows):
                for lane in T.vectorized(width):
                    part[lane] = T.float32(-3.4028234663852886e38)
                for step in T.serial(vectors):
                    for lane in T.vectorized(width):
                        part[lane] = T.max(part[lane], X[row, T.min(step * width, last) + lane])
                total[0] = part[0]
                for lane in T.unroll(width - 1):
                    total[0] = T.max(total[0], part[lane + 1])
                for step in T.serial(vectors):
                    for lane in T.vectorized(width):
                        Y[row, T.min(step * width, last) + lane] = exp(
                            X[row, T.min(step * width, last) + lane] - total[0]
                        )
                for lane in T.vectorized(width):
                    part[lane] = T.Select(lane < overlap, T.float32(0), Y[row, last + lane])
                for step in T.serial(vectors - 1):
                    for lane in T.vectorized(width):
                        part[lane] = part[lane] + Y[row, step * width + lane]
                total[0] = part[0]
                for lane in T.unroll(width - 1):
                    total[0] = total[0] + part[lane + 1]
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

    width, vectors, overlap = _vectors(length, lanes)
    last = length - width
    share = 1.0 / length

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
            stats = T.sblock_alloc_buffer((2,), "float32", scope="local")
            for row in T.serial(rows):
                for lane in T.vectorized(width):
                    part[lane] = T.Select(lane < overlap, T.float32(0), X[row, last + lane])
                for step in T.serial(vectors - 1):
                    for lane in T.vectorized(width):
                        part[lane] = part[lane] + X[row, step * width + lane]
                stats[0] = part[0]
                for lane in T.unroll(width - 1):
                    stats[0] = stats[0] + part[lane + 1]
                stats[0] = stats[0] * T.float32(share)
                for lane in T.vectorized(width):
                    part[lane] = T.Select(
                        lane < overlap,
                        T.float32(0),
                        (X[row, last + lane] - stats[0]) * (X[row, last + lane] - stats[0]),
                    )
                for step in T.serial(vectors - 1):
                    for lane in T.vectorized(width):
                        part[lane] = part[lane] + (X[row, step * width + lane] - stats[0]) * (
                            X[row, step * width + lane] - stats[0]
                        )
                stats[1] = part[0]
                for lane in T.unroll(width - 1):
                    stats[1] = stats[1] + part[lane + 1]
                stats[1] = T.float32(1) / T.sqrt(stats[1] * T.float32(share) + T.float32(epsilon))
                for step in T.serial(vectors):
                    for lane in T.vectorized(width):
                        Y[row, T.min(step * width, last) + lane] = (
                            X[row, T.min(step * width, last) + lane] - stats[0]
                        ) * stats[1] * G[T.min(step * width, last) + lane] + B[T.min(step * width, last) + lane]

    return function
