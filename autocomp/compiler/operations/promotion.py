"""Type promotion made explicit: every operation of a graph reads operands of the one type it computes in.

torch converts on the fly (``int + float``, ``log`` of integers, sums of bools that count in 64 bits); TVM's operations do not, and those
that do follow other rules. Here a conversion is inserted wherever an operand has another type than the operation computes in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# computed in the type of their result; a condition (the first operand of `where`) stays as it is
_ARITHMETIC = {
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "fmod", "remainder", "floor_divide", "atan2", "where", "rsub", "clamp",
    "clamp_min", "clamp_max", "cat", "stack", "mm", "bmm", "addmm", "baddbmm", "masked_fill", "logaddexp",
}  # fmt: skip
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
# of integers and bools these are computed in floats
_UNARY = {
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "erf", "exp", "expm1", "log", "log2", "log10", "log1p", "reciprocal",
    "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh",
}  # fmt: skip
_REDUCTIONS = {"sum", "mean", "prod", "cumsum", "cumprod"}
# defined for numbers only by TVM: bools go through integers
_NUMBERS_ONLY = {"amax", "amin", "argmax", "argmin", "sort", "topk", "max", "min", "scatter", "flip", "bmm", "mm"}
# of integers these change nothing, and TVM has them for floats alone
_ROUNDINGS = {"floor", "ceil", "round", "trunc"}


def promote(graph: fx.Graph) -> None:
    """Insert the conversions that the operations of a decomposed graph imply."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target.namespace != "aten":
            continue
        name = node.target._schema.name.removeprefix("aten::")
        value = node.meta.get("val")
        kind = value.dtype if isinstance(value, torch.Tensor) else None
        if name in _COMPARISONS:
            operands = [_value(argument) for argument in node.args[:2]]
            wanted = torch.result_type(*operands)
            _convert(graph, node, torch.int32 if wanted == torch.bool else wanted)
        elif name in _ARITHMETIC and kind is not None:
            wide = kind == torch.bool and name not in ("where", "cat", "stack", "masked_fill")
            _convert(graph, node, torch.int32 if wide else kind, skip=1 if name == "where" else 0)
            if wide:
                _convert_result(graph, node, torch.int32, kind)
        elif (name in _UNARY or name in _REDUCTIONS) and kind is not None and node.args:
            wide = kind == torch.bool
            _convert(graph, node, torch.int32 if wide else kind)
            node.kwargs = {key: item for key, item in node.kwargs.items() if key != "dtype"}
        elif name in _ROUNDINGS and kind is not None and not kind.is_floating_point:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif (
            name in _NUMBERS_ONLY
            and isinstance(_value(node.args[0]), torch.Tensor)
            and _value(node.args[0]).dtype == torch.bool
        ):
            _convert(graph, node, torch.int32)
            if kind == torch.bool:
                _convert_result(graph, node, torch.int32, torch.bool)


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _convert(graph: fx.Graph, node: fx.Node, wanted: torch.dtype, skip: int = 0) -> None:
    """Convert the tensors a node reads, in lists too, past the first ``skip`` arguments."""

    def converted(argument: Any) -> Any:
        value = _value(argument)
        if not isinstance(argument, fx.Node) or not isinstance(value, torch.Tensor) or value.dtype == wanted:
            return argument
        with graph.inserting_before(node):
            cast = graph.call_function(aten._to_copy.default, (argument,), {"dtype": wanted})
        cast.meta = {**node.meta, "val": value.to(wanted)}
        return cast

    kept, rest = node.args[:skip], node.args[skip:]
    node.args = (*kept, *fx.node.map_aggregate(rest, converted))
    node.kwargs = fx.node.map_aggregate(dict(node.kwargs), converted)


def _convert_result(graph: fx.Graph, node: fx.Node, computed: torch.dtype, wanted: torch.dtype) -> None:
    """A node computes in one type and its readers see another."""
    value = node.meta["val"]
    with graph.inserting_after(node):
        cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": wanted})
    cast.meta = {**node.meta, "val": value}
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    node.meta = {**node.meta, "val": value.to(computed)}
