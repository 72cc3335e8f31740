"""Finding and replacing statements of a scheduled function: what schedules cannot say (a line fetched ahead, a matrix instruction)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_UPDATES = ("anchor_update", "anchor_update_o")  # the second where an instruction stands for the block


@dataclass(frozen=True)
class Update:
    """An anchor's update: the loops around it, outermost first, and its block's realisation."""

    loops: list[Any]
    realize: Any

    @property
    def factors(self) -> tuple[Any, Any]:
        """The loads (of the data, of the weight) whose product is added, without what makes numbers of them."""
        product = self.realize.block.body.value.b
        return _load_in(product.a), _load_in(product.b)

    @property
    def weight(self) -> tuple[Any, list[Any]]:
        """The buffer of weights that the update reads, and where: of a block that an instruction stands for, where it begins."""
        block = self.realize.block
        if block.match_buffers:
            region = block.reads[-1]
            return region.source, [each.min for each in region.region]
        load = self.factors[1]
        return load.source, list(load.indices)

    def at(self, indices: Sequence[Any]) -> list[Any]:
        """Indices of the block's own axes, in terms of the loops around it."""
        return substitute([axis.var for axis in self.realize.block.iter_vars], indices, list(self.realize.iter_values))


def _load_in(value: Any) -> Any:
    """The load in an expression of one operand: casts, shifts by a constant, bits read as another type."""
    while not hasattr(value, "indices"):
        value = next(getattr(value, name) for name in ("value", "a", "args") if hasattr(value, name))
        value = value if not hasattr(value, "__len__") else value[0]
    return value


def find_update(statement: Any, loops: Sequence[Any] = ()) -> Update | None:
    """The update of the anchor in a scheduled statement; None where it has none of its own (a whole block, say)."""
    from tvm import s_tir, tirx

    if isinstance(statement, tirx.For):
        return find_update(statement.body, [*loops, statement])
    if isinstance(statement, tirx.SeqStmt):
        return next((found for each in statement if (found := find_update(each, loops))), None)
    if isinstance(statement, s_tir.SBlockRealize):
        if statement.block.name_hint in _UPDATES:
            return Update(list(loops), statement)
        return find_update(statement.block.body, loops)
    return None


def replaced(statement: Any, change: Callable[[Any], Any | None]) -> Any:
    """A statement in which the first statements, from the outside, that ``change`` gives another for are that other."""
    from tvm import s_tir, tirx

    if (other := change(statement)) is not None:
        return other
    if isinstance(statement, tirx.For):
        return with_body(statement, replaced(statement.body, change))
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([replaced(each, change) for each in statement])
    if isinstance(statement, s_tir.SBlockRealize):
        return with_block(statement, replaced(statement.block.body, change))
    return statement


def with_body(loop: Any, body: Any) -> Any:
    """A loop with another body."""
    from tvm import tirx

    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations)


def with_block(realize: Any, body: Any, buffers: Sequence[Any] = ()) -> Any:
    """A block's realisation with another body, and ``buffers`` beside its own."""
    from tvm import s_tir

    block = realize.block
    inner = s_tir.SBlock(
        block.iter_vars, block.reads, block.writes, block.name_hint, body, block.init, [*block.alloc_buffers, *buffers],
        block.match_buffers, block.annotations,
    )  # fmt: skip
    return s_tir.SBlockRealize(realize.iter_values, realize.predicate, inner)


def call(intrinsic: str, *arguments: Any) -> Any:
    """A statement that calls an intrinsic of LLVM."""
    from tvm import tirx
    from tvm.script import tirx as T

    return tirx.Evaluate(tirx.call_llvm_intrin("void", T.llvm_lookup_intrinsic_id(intrinsic), *arguments))


def depends(expressions: Sequence[Any], loop: Any) -> bool:
    """Whether any of the expressions changes with a loop."""
    from tvm_ffi import structural_equal

    fixed = substitute([loop.loop_var], expressions, [zero(loop)])
    return not all(structural_equal(a, b) for a, b in zip(expressions, fixed, strict=True))


def zero(loop: Any) -> Any:
    """0, of a loop's own type."""
    return number(loop, 0)


def number(loop: Any, value: int) -> Any:
    """A constant of a loop's own type."""
    from tvm import tirx

    return tirx.const(value, str(loop.extent.ty.dtype).removeprefix("T."))


def substitute(variables: Sequence[Any], expressions: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Expressions with values in the place of variables, simplified."""
    from tvm import tirx

    if not variables:
        return list(expressions)
    return list(tirx.IndexMap(list(variables), list(expressions), None).map_indices(list(values)))
