"""Attention in one kernel, written as loops: ``softmax(q k^T) v`` by blocks of rows, whose scores never leave the caches.

Products, softmax and products of one block of rows run one after the other, so a matrix of rows times columns, which for speech is a
hundred times the data, is neither written to memory nor read from it twice. Weights of a row are divided by their sum at the very end,
where there are fewer values. A last block, of rows or of a vector's columns, overlaps the one before it: what is computed twice is the same.
Source: the blocks of rows are those of Rabe and Staats 2021 (arXiv 2112.05682); each holds all columns of a row, so nothing is rescaled.
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass
from typing import Any

from autocomp.hardware.profile import Profile
from autocomp.kernels import vector_math
from autocomp.kernels.compute import ravel, unravel
from autocomp.kernels.rows import fold, most_of, vectors_of

TEMPLATE = "attention"
_NEAR = 256 << 10  # bytes of a block's scores, which stay in the second-level cache beside keys and values
_MOST_ROWS = 64  # of a block


@dataclass(frozen=True)
class AttentionSpec:
    """Sizes of attentions, one for each of ``lead``: ``rows`` queries, ``columns`` keys of ``depth`` and values of ``width``.

    Keys are ``[columns, depth]`` where they are ``transposed``, else ``[depth, columns]``. Scores are times ``scale``, plus a bias
    ``[*bias_lead, bias_rows, columns]`` whose axes of size 1 are the same for all; without one, ``bias_rows`` is 0.
    """

    lead: tuple[int, ...]
    rows: int
    columns: int
    depth: int
    width: int
    transposed: bool
    scale: float = 1.0
    bias_lead: tuple[int, ...] = ()
    bias_rows: int = 0

    @property
    def heads(self) -> int:
        return math.prod(self.lead)

    def bias_at(self, head: Any) -> Any:
        """Which of the bias's matrices a head reads."""
        places = zip(unravel(head, self.lead), self.bias_lead, strict=True)
        return ravel([at if size > 1 else 0 for at, size in places], self.bias_lead)


@dataclass(frozen=True)
class _Parts:
    """A range in parts of one size, the last of which may overlap the one before it."""

    size: int
    part: int

    @property
    def count(self) -> int:
        return -(-self.size // self.part)

    @property
    def again(self) -> float:
        """Times what there is, that all parts hold."""
        return self.count * self.part / self.size

    def at(self, index: Any) -> Any:
        """Where a part begins."""
        from tvm import tirx

        return tirx.min(index * self.part, self.size - self.part) if self.size % self.part else index * self.part


def _vectors(size: int, lanes: int) -> _Parts:
    return _Parts(size, vectors_of(size, lanes)[0])


def _tile(rows: int, vectors: int, registers: int) -> tuple[int, int]:
    """(rows, vectors) of sums that are held at a time: the pair that loads least for each product, what is computed twice included."""

    def cost(tile: tuple[int, int]) -> float:
        up, across = tile
        again = _Parts(rows, up).again * _Parts(vectors, across).again
        return (1 + 1.9 / up + 0.7 / across + 9 / (up * across)) * again

    pairs = itertools.product(range(1, min(rows, 14) + 1), range(1, min(vectors, 8) + 1))
    return min((one for one in pairs if one[0] * one[1] + one[1] + 1 <= registers), key=cost)


def _block(spec: AttentionSpec, tiles: tuple[int, int]) -> int:
    """Rows of a block: as many as stay near, whole tiles of both products, and little that is computed twice."""
    least = min(spec.rows, max(tiles))
    most = max(least, min(_MOST_ROWS, _NEAR // (4 * spec.columns), spec.rows))

    def cost(size: int) -> float:
        return _Parts(spec.rows, size).again * sum(_Parts(size, tile).again for tile in tiles) * (1 + 6 / size)

    return min(range(least, most + 1), key=cost)


def attention(spec: AttentionSpec, profile: Profile) -> Any:
    """PrimFunc ``q [heads, rows, depth], k, v [heads, columns, width] (, bias) → [heads, rows, width]``, scheduled.

    Keys and bias as `AttentionSpec` says, leading axes as one.
    """
    from tvm.script import tirx as T

    heads, rows, columns, depth, width = spec.heads, spec.rows, spec.columns, spec.depth, spec.width
    keys, values = _vectors(columns, profile.lanes), _vectors(width, profile.lanes)
    lanes, out_lanes = keys.part, values.part
    up, across = _tile(rows, keys.count, profile.vector_registers)
    out_up, out_across = _tile(rows, values.count, profile.vector_registers)
    block = _block(spec, (up, out_up))
    blocks, tiles, out_tiles = _Parts(rows, block), _Parts(block, up), _Parts(block, out_up)
    groups, out_groups = _Parts(keys.count, across), _Parts(values.count, out_across)
    length = keys.count * lanes
    abreast, find_most = most_of(lanes, keys.count, length - lanes)
    add_up, exp, scale = fold(lanes, operator.add), vector_math.exp_below_zero, T.float32(spec.scale)
    key_shape = (heads, columns, depth) if spec.transposed else (heads, depth, columns)
    bias_shape = (math.prod(spec.bias_lead), spec.bias_rows, columns)
    bias_step = int(spec.bias_rows > 1)
    each = T.parallel if profile.cores > 1 else T.serial

    @T.inline
    def pack(K, packed):  # type: ignore[no-untyped-def]
        for at in each(heads * keys.count):
            for k in T.serial(depth):
                for lane in T.vectorized(lanes):
                    if spec.transposed:
                        packed[at // keys.count, at % keys.count, k, lane] = K[
                            at // keys.count, keys.at(at % keys.count) + lane, k
                        ]
                    else:
                        packed[at // keys.count, at % keys.count, k, lane] = K[
                            at // keys.count, k, keys.at(at % keys.count) + lane
                        ]

    @T.inline
    def multiply(sums, tall, wide, of, count, left, right):  # type: ignore[no-untyped-def]
        for i in T.unroll(tall):
            for j in T.unroll(wide):
                for lane in T.vectorized(of):
                    sums[i, j, lane] = T.float32(0)
        for k in T.serial(count):
            for i in T.unroll(tall):
                for j in T.unroll(wide):
                    for lane in T.vectorized(of):
                        sums[i, j, lane] = sums[i, j, lane] + left(i, k) * right(j, k, lane)

    @T.inline
    def score(Q, packed, S, bias, head, row, r, first):  # type: ignore[no-untyped-def]
        sums = T.sblock_alloc_buffer((up, across, lanes), "float32", scope="local")
        multiply(
            sums, up, across, lanes, depth,
            lambda i, k: Q[head, row + r + i, k], lambda j, k, lane: packed[head, first + j, k, lane],
        )  # fmt: skip
        for i in T.unroll(up):
            for j in T.unroll(across):
                for lane in T.vectorized(lanes):
                    S[r + i, keys.at(first + j) + lane] = sums[i, j, lane] * scale + bias(
                        head, row + r + i, keys.at(first + j) + lane
                    )

    @T.inline
    def weigh(S, most, part, total, share, r):  # type: ignore[no-untyped-def]
        for lane in T.serial(length - columns):
            S[r, columns + lane] = T.float32("-inf")
        find_most(S, r, most, part, total)
        for lane in T.vectorized(lanes):
            part[lane] = T.float32(0)
        for step in T.serial(keys.count):
            for lane in T.vectorized(lanes):
                S[r, step * lanes + lane] = exp(S[r, step * lanes + lane] - total[0])
            for lane in T.vectorized(lanes):
                part[lane] = part[lane] + S[r, step * lanes + lane]
        add_up(part, total)
        share[r] = T.float32(1) / total[0]

    @T.inline
    def weighted(S, V, share, Y, head, row, r, first):  # type: ignore[no-untyped-def]
        sums = T.sblock_alloc_buffer((out_up, out_across, out_lanes), "float32", scope="local")
        multiply(
            sums, out_up, out_across, out_lanes, columns,
            lambda i, n: S[r + i, n], lambda j, n, lane: V[head, n, values.at(first + j) + lane],
        )  # fmt: skip
        for i in T.unroll(out_up):
            for j in T.unroll(out_across):
                for lane in T.vectorized(out_lanes):
                    Y[head, row + r + i, values.at(first + j) + lane] = sums[i, j, lane] * share[r + i]

    @T.inline
    def body(Q, K, V, Y, bias):  # type: ignore[no-untyped-def]
        packed = T.sblock_alloc_buffer((heads, keys.count, depth, lanes), "float32")
        S = T.sblock_alloc_buffer((block, length), "float32")
        share = T.sblock_alloc_buffer((block,), "float32")
        most = T.sblock_alloc_buffer((abreast, lanes), "float32", scope="local")
        part = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
        pack(K, packed)
        # LLVM takes loops of more than three levels for equally hot, and then keeps sums of the innermost in memory
        for at in each(heads * blocks.count):
            for tile in T.serial(groups.count * tiles.count):
                with T.sblock("score"):
                    T.reads()
                    T.writes()
                    score(
                        Q, packed, S, bias, at // blocks.count, blocks.at(at % blocks.count), tiles.at(tile % tiles.count),
                        groups.at(tile // tiles.count),
                    )  # fmt: skip
            for r in T.serial(block):
                weigh(S, most, part, total, share, r)
            for tile in T.serial(out_groups.count * out_tiles.count):
                with T.sblock("weighted"):
                    T.reads()
                    T.writes()
                    weighted(
                        S, V, share, Y, at // blocks.count, blocks.at(at % blocks.count), out_tiles.at(tile // out_groups.count),
                        out_groups.at(tile % out_groups.count),
                    )  # fmt: skip

    @T.prim_func(s_tir=True)
    def plain(
        Q: T.Buffer((heads, rows, depth), "float32"),
        K: T.Buffer(key_shape, "float32"),
        V: T.Buffer((heads, columns, width), "float32"),
        Y: T.Buffer((heads, rows, width), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            body(Q, K, V, Y, lambda head, row, column: T.float32(0))

    if not spec.bias_rows:
        return plain

    @T.prim_func(s_tir=True)
    def biased(
        Q: T.Buffer((heads, rows, depth), "float32"),
        K: T.Buffer(key_shape, "float32"),
        V: T.Buffer((heads, columns, width), "float32"),
        B: T.Buffer(bias_shape, "float32"),
        Y: T.Buffer((heads, rows, width), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            body(Q, K, V, Y, lambda head, row, column: B[spec.bias_at(head), row * bias_step, column])

    return biased
