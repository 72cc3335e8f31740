"""Recurrent layers as one loop over time: a step's products, gates and new states stay in registers for a block of hidden units.

The inputs' share of the products is made for all steps at once, outside (a dense kernel), and comes as ``gates``. Hidden units are padded to
whole blocks; padded units have zero weights, and nothing reads them. States are held twice, the old and the new, so the last rows of a
batch may be computed by two tiles that overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from autocomp.kernels import vector_math
from autocomp.kernels.specs import round_up
from autocomp.records.recurrent import GATES, Kind


@dataclass(frozen=True)
class RecurrentSpec:
    """Shapes of one layer in one direction; ``rows x vectors`` registers of each gate are summed at a time."""

    kind: Kind
    steps: int
    batch: int
    hidden: int
    batch_first: bool
    reverse: bool
    lanes: int
    rows: int
    vectors: int

    @classmethod
    def of(
        cls,
        kind: Kind,
        steps: int,
        batch: int,
        hidden: int,
        batch_first: bool,
        reverse: bool,
        lanes: int,
        registers: int,
    ) -> RecurrentSpec:
        """With the block that an analytic model likes best for a machine of so many vector registers of ``lanes`` floats."""
        gates = GATES[kind]

        def cost(rows: int, vectors: int) -> float:
            # a step loads a vector of weights for each sum's column and a value for each row, two loads and two products a cycle
            sums = rows * vectors * gates
            cycles = max(sums / 2, 4.5, (rows + vectors * gates) / 2)
            wasted = round_up(hidden, vectors * lanes) / hidden * round_up(batch, rows) / batch
            return cycles / sums * wasted * (1 + 0.01 * vectors)

        blocks = [
            (rows, vectors)
            for rows in range(1, min(batch, 8) + 1)
            for vectors in (1, 2, 3, 4, 6, 8)
            if rows * vectors * gates + 3 <= registers
        ]
        rows, vectors = min(blocks, key=lambda block: cost(*block)) if blocks else (1, 1)
        return cls(kind, steps, batch, hidden, batch_first, reverse, lanes, rows, vectors)

    @property
    def gates(self) -> int:
        return GATES[self.kind]

    @property
    def width(self) -> int:
        """Hidden units of a block."""
        return self.vectors * self.lanes

    @property
    def blocks(self) -> int:
        return -(-self.hidden // self.width)

    @property
    def sizes(self) -> tuple[int, int]:
        """The leading sizes of inputs and outputs."""
        return (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)

    @property
    def padded(self) -> int:
        """Hidden units of all blocks, those of zeros included."""
        return self.blocks * self.width

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """The recurrent weight ``[gates * hidden, hidden]`` → ``[blocks, hidden, gates * width]``, padded with zeros."""
        padded = np.zeros((self.gates, self.padded, self.hidden), weight.dtype)
        padded[:, : self.hidden] = weight.reshape(self.gates, self.hidden, self.hidden)
        blocks = padded.reshape(self.gates, self.blocks, self.width, self.hidden).transpose(1, 3, 0, 2)
        return np.ascontiguousarray(blocks.reshape(self.blocks, self.hidden, -1))


def lstm(spec: RecurrentSpec) -> Any:
    """PrimFunc ``gates [*sizes, gates * padded], weight, h0, c0 [N, H] → outputs [*sizes, H], h, c [N, H]``, float32, scheduled."""
    from tvm.script import tirx as T

    steps, batch, hidden, lanes, rows, vectors, gates = (
        spec.steps, spec.batch, spec.hidden, spec.lanes, spec.rows, spec.vectors, spec.gates
    )  # fmt: skip
    first, second = spec.sizes
    blocks, width, padded, wide = spec.blocks, spec.width, spec.padded, gates * spec.width
    batch_first, last = spec.batch_first, steps - 1 if spec.reverse else 0
    step = -1 if spec.reverse else 1
    tiles, lowest = -(-batch // rows), batch - rows
    sigmoid, tanh = vector_math.sigmoid, vector_math.tanh

    def gate_at(register: Any, block: Any) -> Any:
        return register // vectors * padded + block * width + register % vectors * lanes

    @T.prim_func(s_tir=True)
    def function(
        X: T.Buffer((first, second, gates * padded), "float32"),
        W: T.Buffer((blocks, hidden, wide), "float32"),
        H0: T.Buffer((batch, hidden), "float32"),
        C0: T.Buffer((batch, hidden), "float32"),
        Y: T.Buffer((first, second, hidden), "float32"),
        HN: T.Buffer((batch, hidden), "float32"),
        CN: T.Buffer((batch, hidden), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            sums = T.sblock_alloc_buffer((rows * 4 * width,), "float32", scope="local")
            H = T.sblock_alloc_buffer((2, batch, padded), "float32")
            C = T.sblock_alloc_buffer((2, batch, padded), "float32")
            for n in T.serial(batch):
                for j in T.serial(padded):
                    H[0, n, j] = T.if_then_else(j < hidden, H0[n, T.min(j, hidden - 1)], T.float32(0))
                    C[0, n, j] = T.if_then_else(j < hidden, C0[n, T.min(j, hidden - 1)], T.float32(0))
            for t in T.serial(steps):
                for tile in T.serial(tiles):
                    for b in T.serial(blocks):
                        for r in T.unroll(rows):
                            for g in T.unroll(4 * vectors):
                                for lane in T.vectorized(lanes):
                                    if batch_first:
                                        sums[(r * 4 * vectors + g) * lanes + lane] = X[
                                            T.min(tile * rows, lowest) + r, last + step * t, gate_at(g, b) + lane
                                        ]
                                    else:
                                        sums[(r * 4 * vectors + g) * lanes + lane] = X[
                                            last + step * t, T.min(tile * rows, lowest) + r, gate_at(g, b) + lane
                                        ]
                        for k in T.serial(hidden):
                            for r in T.unroll(rows):
                                for g in T.unroll(4 * vectors):
                                    for lane in T.vectorized(lanes):
                                        sums[(r * 4 * vectors + g) * lanes + lane] = (
                                            sums[(r * 4 * vectors + g) * lanes + lane]
                                            + H[t % 2, T.min(tile * rows, lowest) + r, k] * W[b, k, g * lanes + lane]
                                        )
                        for r in T.unroll(rows):
                            for v in T.unroll(vectors):
                                for lane in T.vectorized(lanes):
                                    C[(t + 1) % 2, T.min(tile * rows, lowest) + r, b * width + v * lanes + lane] = (
                                        sigmoid(sums[(r * 4 * vectors + vectors + v) * lanes + lane])
                                        * C[t % 2, T.min(tile * rows, lowest) + r, b * width + v * lanes + lane]
                                        + sigmoid(sums[(r * 4 * vectors + v) * lanes + lane])
                                        * tanh(sums[(r * 4 * vectors + 2 * vectors + v) * lanes + lane])
                                    )
                                for lane in T.vectorized(lanes):
                                    H[(t + 1) % 2, T.min(tile * rows, lowest) + r, b * width + v * lanes + lane] = (
                                        sigmoid(sums[(r * 4 * vectors + 3 * vectors + v) * lanes + lane])
                                        * tanh(
                                            C[(t + 1) % 2, T.min(tile * rows, lowest) + r, b * width + v * lanes + lane]
                                        )
                                    )
                for n in T.serial(batch):
                    for j in T.serial(hidden):
                        if batch_first:
                            Y[n, last + step * t, j] = H[(t + 1) % 2, n, j]
                        else:
                            Y[last + step * t, n, j] = H[(t + 1) % 2, n, j]
            for n in T.serial(batch):
                for j in T.serial(hidden):
                    HN[n, j] = H[steps % 2, n, j]
                    CN[n, j] = C[steps % 2, n, j]

    return function


def simple(spec: RecurrentSpec) -> Any:
    """PrimFunc ``gates [*sizes, gates * padded], weight, bias [blocks * width], h0 [N, H] → outputs [*sizes, H], h [N, H]``.

    It runs a GRU or a plain recurrent layer.
    ``bias`` is that of a GRU's new state, which its reset gate multiplies; others do not read it.
    """
    from tvm.script import tirx as T

    steps, batch, hidden, lanes, rows, vectors, gates = (
        spec.steps, spec.batch, spec.hidden, spec.lanes, spec.rows, spec.vectors, spec.gates
    )  # fmt: skip
    first, second = spec.sizes
    blocks, width, padded, wide = spec.blocks, spec.width, spec.padded, gates * spec.width
    batch_first, last = spec.batch_first, steps - 1 if spec.reverse else 0
    step = -1 if spec.reverse else 1
    tiles, lowest = -(-batch // rows), batch - rows
    registers = gates * vectors
    given = 2 * vectors if spec.kind == "gru" else registers  # sums that begin with the inputs' share
    sigmoid, tanh, is_gru = vector_math.sigmoid, vector_math.tanh, spec.kind == "gru"

    def gate_at(register: Any, block: Any) -> Any:
        return register // vectors * padded + block * width + register % vectors * lanes

    def activation(x: Any) -> Any:
        return tanh(x) if spec.kind == "rnn_tanh" else T.max(x, T.float32(0))

    def mixed(update: Any, new: Any, old: Any) -> Any:
        return new + update * (old - new)

    @T.prim_func(s_tir=True)
    def function(
        X: T.Buffer((first, second, gates * padded), "float32"),
        W: T.Buffer((blocks, hidden, wide), "float32"),
        B: T.Buffer((padded,), "float32"),
        H0: T.Buffer((batch, hidden), "float32"),
        Y: T.Buffer((first, second, hidden), "float32"),
        HN: T.Buffer((batch, hidden), "float32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            sums = T.sblock_alloc_buffer((rows * wide,), "float32", scope="local")
            fresh = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
            H = T.sblock_alloc_buffer((2, batch, padded), "float32")
            for n in T.serial(batch):
                for j in T.serial(padded):
                    H[0, n, j] = T.if_then_else(j < hidden, H0[n, T.min(j, hidden - 1)], T.float32(0))
            for t in T.serial(steps):
                for tile in T.serial(tiles):
                    for b in T.serial(blocks):
                        for r in T.unroll(rows):
                            for g in T.unroll(given):
                                for lane in T.vectorized(lanes):
                                    if batch_first:
                                        sums[(r * registers + g) * lanes + lane] = X[
                                            T.min(tile * rows, lowest) + r, last + step * t, gate_at(g, b) + lane
                                        ]
                                    else:
                                        sums[(r * registers + g) * lanes + lane] = X[
                                            last + step * t, T.min(tile * rows, lowest) + r, gate_at(g, b) + lane
                                        ]
                            for g in T.unroll(registers - given):
                                for lane in T.vectorized(lanes):
                                    sums[(r * registers + given + g) * lanes + lane] = B[b * width + g * lanes + lane]
                        for k in T.serial(hidden):
                            for r in T.unroll(rows):
                                for g in T.unroll(registers):
                                    for lane in T.vectorized(lanes):
                                        sums[(r * registers + g) * lanes + lane] = (
                                            sums[(r * registers + g) * lanes + lane]
                                            + H[t % 2, T.min(tile * rows, lowest) + r, k] * W[b, k, g * lanes + lane]
                                        )
                        for r in T.unroll(rows):
                            for v in T.unroll(vectors):
                                if is_gru:
                                    for lane in T.vectorized(lanes):
                                        if batch_first:
                                            fresh[lane] = X[
                                                T.min(tile * rows, lowest) + r, last + step * t,
                                                gate_at(2 * vectors + v, b) + lane,
                                            ]  # fmt: skip
                                        else:
                                            fresh[lane] = X[
                                                last + step * t, T.min(tile * rows, lowest) + r,
                                                gate_at(2 * vectors + v, b) + lane,
                                            ]  # fmt: skip
                                    for lane in T.vectorized(lanes):
                                        fresh[lane] = tanh(
                                            fresh[lane]
                                            + sigmoid(sums[(r * registers + v) * lanes + lane])
                                            * sums[(r * registers + 2 * vectors + v) * lanes + lane]
                                        )
                                    for lane in T.vectorized(lanes):
                                        H[(t + 1) % 2, T.min(tile * rows, lowest) + r, b * width + v * lanes + lane] = mixed(
                                            sigmoid(sums[(r * registers + vectors + v) * lanes + lane]), fresh[lane],
                                            H[t % 2, T.min(tile * rows, lowest) + r, b * width + v * lanes + lane],
                                        )  # fmt: skip
                                else:
                                    for lane in T.vectorized(lanes):
                                        H[(t + 1) % 2, T.min(tile * rows, lowest) + r, b * width + v * lanes + lane] = (
                                            activation(sums[(r * registers + v) * lanes + lane])
                                        )
                for n in T.serial(batch):
                    for j in T.serial(hidden):
                        if batch_first:
                            Y[n, last + step * t, j] = H[(t + 1) % 2, n, j]
                        else:
                            Y[last + step * t, n, j] = H[(t + 1) % 2, n, j]
            for n in T.serial(batch):
                for j in T.serial(hidden):
                    HN[n, j] = H[steps % 2, n, j]

    return function
