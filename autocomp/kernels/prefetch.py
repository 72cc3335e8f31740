"""Ask for a layer's next weights while the present ones are multiplied.

A network's weights rarely stay in the second-level cache from one inference to the next, so each kernel begins by waiting for its own: of
ResNet-18 a sixth of the time. A contraction reads its weights block after block, each for all rows; while the first rows of a block are
computed, the lines of the next are fetched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LEAST = 512 << 10  # bytes of weights below which waiting for them is short beside computing
_READ, _INTO_SECOND_LEVEL, _DATA = 0, 2, 1  # what llvm.prefetch is told: prefetcht1 on x86


@dataclass(frozen=True)
class _Update:
    """An anchor's update: the loops around it, outermost first, and its block's realisation."""

    loops: list[Any]
    realize: Any

    @property
    def weight(self) -> Any:
        """Where it reads the weights: the last factor of the product that is added."""
        return self.realize.block.body.value.b.b


def prefetch_weights(function: Any, blocks_axis: int, vectors: int) -> Any:
    """A scheduled function whose anchor fetches the next ``vectors`` blocks of its weights, which ``blocks_axis`` of them numbers.

    The same function where there is nothing to gain.
    """
    from tvm import tirx

    update = _find(function.body, [])
    if update is None or 4 * math.prod(int(size) for size in update.weight.source.ty.shape) < _LEAST:
        return function
    steps = [
        index for index, loop in enumerate(update.loops) if loop.kind == tirx.ForKind.SERIAL and int(loop.extent) > 1
    ]
    *outer, step = update.loops[: steps[-1] + 1]
    inside = update.loops[steps[-1] + 1 :]
    block = update.realize.block
    at = _substitute([axis.var for axis in block.iter_vars], update.weight.indices, list(update.realize.iter_values))
    at = _substitute([loop.loop_var for loop in inside], at, [_zero(loop) for loop in inside])
    rows = [loop for loop in outer if int(loop.extent) > 1 and not _depends(at, loop)]
    return function.with_body(
        _with_first(function.body, step, _fetch(update.weight.source, at, blocks_axis, vectors, rows))
    )


def _fetch(buffer: Any, at: list[Any], axis: int, vectors: int, rows: list[Any]) -> Any:
    """Fetch the line of ``buffer`` at ``at`` of each of the next blocks, when all loops over rows are at their beginning."""
    from tvm import tirx
    from tvm.script import tirx as T

    fetches = []
    for vector in range(vectors, 2 * vectors):
        place = [index + vector if position == axis else index for position, index in enumerate(at)]
        call = tirx.call_llvm_intrin(
            "void", T.llvm_lookup_intrinsic_id("llvm.prefetch"), tirx.address_of(buffer[tuple(place)]),
            *(tirx.const(value, "int32") for value in (_READ, _INTO_SECOND_LEVEL, _DATA)),
        )  # fmt: skip
        fetches.append(tirx.Evaluate(call))
    body = fetches[0] if len(fetches) == 1 else tirx.SeqStmt(fetches)
    if not rows:
        return body
    return tirx.IfThenElse(tirx.all(*(loop.loop_var == loop.min for loop in rows)), body, None)


def _find(statement: Any, loops: list[Any]) -> _Update | None:
    """The update of the anchor in a scheduled function."""
    from tvm import s_tir, tirx

    if isinstance(statement, tirx.For):
        return _find(statement.body, [*loops, statement])
    if isinstance(statement, tirx.SeqStmt):
        return next((found for each in statement if (found := _find(each, loops))), None)
    if isinstance(statement, s_tir.SBlockRealize):
        if statement.block.name_hint == "anchor_update":
            return _Update(loops, statement)
        return _find(statement.block.body, loops)
    return None


def _with_first(statement: Any, loop: Any, first: Any) -> Any:
    """A statement in which the body of one loop begins with ``first``."""
    from tvm import s_tir, tirx

    if isinstance(statement, tirx.For):
        body = (
            tirx.SeqStmt([first, statement.body])
            if statement.same_as(loop)
            else _with_first(statement.body, loop, first)
        )
        return tirx.For(
            statement.loop_var,
            statement.min,
            statement.extent,
            statement.kind,
            body,
            statement.thread_binding,
            statement.annotations,
        )
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([_with_first(each, loop, first) for each in statement])
    if isinstance(statement, s_tir.SBlockRealize):
        block = statement.block
        inner = s_tir.SBlock(
            block.iter_vars, block.reads, block.writes, block.name_hint, _with_first(block.body, loop, first), block.init,
            block.alloc_buffers, block.match_buffers, block.annotations,
        )  # fmt: skip
        return s_tir.SBlockRealize(statement.iter_values, statement.predicate, inner)
    return statement


def _depends(expressions: list[Any], loop: Any) -> bool:
    from tvm_ffi import structural_equal

    fixed = _substitute([loop.loop_var], expressions, [_zero(loop)])
    return not all(structural_equal(a, b) for a, b in zip(expressions, fixed, strict=True))


def _zero(loop: Any) -> Any:
    from tvm import tirx

    return tirx.const(0, str(loop.extent.ty.dtype).removeprefix("T."))


def _substitute(variables: list[Any], expressions: Sequence[Any], values: list[Any]) -> list[Any]:
    from tvm import tirx

    return (
        list(tirx.IndexMap(variables, list(expressions), None).map_indices(values)) if variables else list(expressions)
    )
