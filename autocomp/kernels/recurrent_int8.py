"""An LSTM layer's loop over time with 8-bit recurrent weights: at batch one a step does little but read them.

A step's new hidden state is quantised once, then each block of hidden units sums its four gates in integers, in registers. The
inputs' share of the gates is made for all steps at once, outside. Hidden units are padded to whole blocks of zero weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from autocomp.kernels import vector_math
from autocomp.kernels.intrinsics import DotProduct
from autocomp.kernels.specs import round_up
from autocomp.records.recurrent import GATES as BY_KIND

GATES = BY_KIND["lstm"]  # input, forget, new value, output: torch's order
_SPARE = 4  # registers that hold no sums: the input, and what the gates' formulas need
_FEWEST = 10  # sums in flight that hide the latency of a dot product: 5 cycles, two a cycle


@dataclass(frozen=True)
class LstmSpec:
    """Shapes of one layer in one direction; ``vectors`` registers of each gate are summed at a time."""

    steps: int
    batch: int
    hidden: int
    batch_first: bool
    reverse: bool
    dot: DotProduct
    vectors: int

    @classmethod
    def of(
        cls, steps: int, batch: int, hidden: int, batch_first: bool, reverse: bool, dot: DotProduct, registers: int
    ) -> LstmSpec:
        """With the block that wastes least of the padding, then of the latency."""
        dot = dot.of_width(dot.depth)

        def cost(vectors: int) -> float:
            return round_up(hidden, vectors * dot.lanes) * max(1.0, _FEWEST / (GATES * vectors))

        vectors = min(range(1, max(2, (registers - _SPARE) // GATES + 1)), key=lambda vectors: (cost(vectors), vectors))
        return cls(steps, batch, hidden, batch_first, reverse, dot, vectors)

    @property
    def width(self) -> int:
        """Hidden units of a block."""
        return self.vectors * self.dot.lanes

    @property
    def padded(self) -> int:
        return round_up(self.hidden, self.width)

    @property
    def sizes(self) -> tuple[int, int]:
        """The leading sizes of inputs and outputs."""
        return (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)

    def by_block(self, rows: np.ndarray) -> np.ndarray:
        """``[4 * hidden, ...]`` → ``[blocks, 4 * width, ...]``, padded with zeros."""
        shape = rows.shape[1:]
        padded = np.zeros((GATES, self.padded, *shape), rows.dtype)
        padded[:, : self.hidden] = rows.reshape(GATES, self.hidden, *shape)
        blocks = padded.reshape(GATES, -1, self.width, *shape).swapaxes(0, 1)
        return np.ascontiguousarray(blocks.reshape(-1, GATES * self.width, *shape))

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """``[4 * hidden, hidden]`` int8 → ``[blocks, inputs / depth, 4 * width * depth]``."""
        depth = self.dot.depth
        inputs = round_up(self.hidden, depth)
        blocks = np.zeros((self.padded // self.width, GATES * self.width, inputs), self.dot.weight)
        blocks[:, :, : self.hidden] = self.by_block(weight)
        steps = blocks.reshape(*blocks.shape[:2], inputs // depth, depth).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(steps.reshape(*steps.shape[:2], -1))


def lstm(spec: LstmSpec, inv_xs: float, zero_point: int) -> Any:
    """PrimFunc ``gates [*sizes, 4 * padded], weight, offset, scale [blocks, 4 * width], h0, c0 [N, H] → outputs [*sizes, H], h, c``.

    ``offset`` is what the sums begin with, minus the zero point (of the stored integers) times the sum of the weights.
    """
    from tvm import tirx
    from tvm.script import tirx as T

    steps, batch, hidden, width, vectors, padded = (
        spec.steps, spec.batch, spec.hidden, spec.width, spec.vectors, spec.padded
    )  # fmt: skip
    dot = spec.dot
    lanes, depth, stored, weights = dot.lanes, dot.depth, dot.activation, dot.weight
    blocks, wide, chunk = padded // width, GATES * width, dot.lanes * dot.depth
    inputs = round_up(hidden, depth)
    first, second = spec.sizes
    batch_first, last = spec.batch_first, steps - 1 if spec.reverse else 0
    step = -1 if spec.reverse else 1
    sigmoid, tanh = vector_math.sigmoid, vector_math.tanh
    lowest, highest = -dot.offset, 255 - dot.offset
    sums_type, input_type, weight_type = f"int32x{lanes}", f"{stored}x{depth}", f"{weights}x{chunk}"

    def product(sums: Any, values: Any, taps: Any) -> Any:
        everywhere = tirx.reinterpret(weight_type, tirx.Broadcast(tirx.reinterpret("int32", values), lanes))
        if dot.depth == 4:
            return tirx.call_llvm_pure_intrin(sums_type, dot.intrinsic, sums, everywhere, taps)
        return sums + tirx.call_llvm_pure_intrin(sums_type, dot.intrinsic, everywhere, taps)

    def quantised(value: Any) -> Any:
        level = tirx.nearbyint(value * tirx.const(inv_xs, "float32")) + tirx.const(float(zero_point), "float32")
        return tirx.max(
            tirx.min(level, tirx.const(float(highest), "float32")), tirx.const(float(lowest), "float32")
        ).astype(stored)

    @T.prim_func(s_tir=True)
    def function(
        X: T.Buffer((first, second, GATES * padded), "float32"),
        W: T.Buffer((blocks, inputs // depth, wide * depth), weights),
        B: T.Buffer((blocks, wide), "int32"),
        S: T.Buffer((blocks, wide), "float32"),
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
            sums = T.sblock_alloc_buffer((wide,), "int32", scope="local")
            gate = T.sblock_alloc_buffer((GATES * lanes,), "float32", scope="local")
            H = T.sblock_alloc_buffer((padded,), "float32")
            C = T.sblock_alloc_buffer((padded,), "float32")
            Q = T.sblock_alloc_buffer((padded,), stored)
            for n in T.serial(batch):
                for j in T.serial(padded):
                    H[j] = T.if_then_else(j < hidden, H0[n, T.min(j, hidden - 1)], T.float32(0))
                    C[j] = T.if_then_else(j < hidden, C0[n, T.min(j, hidden - 1)], T.float32(0))
                for t in T.serial(steps):
                    for v in T.serial(padded // lanes):
                        for lane in T.vectorized(lanes):
                            Q[v * lanes + lane] = quantised(H[v * lanes + lane])
                    for b in T.serial(blocks):
                        for g in T.unroll(GATES * vectors):
                            for lane in T.vectorized(lanes):
                                sums[g * lanes + lane] = B[b, g * lanes + lane]
                        for k in T.serial(inputs // depth):
                            for g in T.unroll(GATES * vectors):
                                sums[T.ramp(g * lanes, 1, lanes)] = product(
                                    sums.vload([g * lanes], dtype=sums_type),
                                    Q.vload([k * depth], dtype=input_type),
                                    W.vload([b, k, g * chunk], dtype=weight_type),
                                )
                        for v in T.unroll(vectors):
                            for g in T.unroll(GATES):
                                for lane in T.vectorized(lanes):
                                    if batch_first:
                                        gate[g * lanes + lane] = (
                                            X[n, last + step * t, g * padded + b * width + v * lanes + lane]
                                            + T.cast(sums[(g * vectors + v) * lanes + lane], "float32")
                                            * S[b, (g * vectors + v) * lanes + lane]
                                        )
                                    else:
                                        gate[g * lanes + lane] = (
                                            X[last + step * t, n, g * padded + b * width + v * lanes + lane]
                                            + T.cast(sums[(g * vectors + v) * lanes + lane], "float32")
                                            * S[b, (g * vectors + v) * lanes + lane]
                                        )
                            for lane in T.vectorized(lanes):
                                C[b * width + v * lanes + lane] = sigmoid(gate[lanes + lane]) * C[
                                    b * width + v * lanes + lane
                                ] + sigmoid(gate[lane]) * tanh(gate[2 * lanes + lane])
                            for lane in T.vectorized(lanes):
                                H[b * width + v * lanes + lane] = sigmoid(gate[3 * lanes + lane]) * tanh(
                                    C[b * width + v * lanes + lane]
                                )
                    for j in T.serial(hidden):
                        if batch_first:
                            Y[n, last + step * t, j] = H[j]
                        else:
                            Y[last + step * t, n, j] = H[j]
                for j in T.serial(hidden):
                    HN[n, j] = H[j]
                    CN[n, j] = C[j]

    return function
