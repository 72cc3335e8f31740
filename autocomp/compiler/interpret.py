"""Run the main function of a lowered module step by step, with kernels computed by whoever can run the target's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from autocomp.compiler.expressions import array_of, is_constant
from autocomp.errors import ExportError

Kernel = Callable[
    [str, list[np.ndarray]], list[np.ndarray]
]  # (function's name, its inputs and outputs) → all as it left them


def interpret(module: Any, inputs: Sequence[np.ndarray], kernel: Kernel) -> Any:
    """The result (an array, or a tuple of arrays) of ``main`` of a module of fused functions. ExportError for what is no kernel."""
    main = module["main"]
    values: dict[Any, Any] = dict(zip(main.params, inputs, strict=True))
    for block in main.body.blocks:
        for binding in block.bindings:
            values[binding.var] = _value(binding.value, values, kernel)
    return _value(main.body.body, values, kernel)


def _value(expression: Any, values: dict[Any, Any], kernel: Kernel) -> Any:
    from tvm import ir, relax

    if isinstance(expression, relax.Var):
        return values[expression]
    if is_constant(expression):
        return array_of(expression)
    if isinstance(expression, relax.Tuple):
        return tuple(_value(field, values, kernel) for field in expression.fields)
    if isinstance(expression, relax.TupleGetItem):
        return _value(expression.tuple_value, values, kernel)[expression.index]
    if isinstance(expression, relax.Call) and isinstance(expression.op, ir.Op):
        if expression.op.name == "relax.call_tir":
            arguments = [_value(field, values, kernel) for field in expression.args[1].fields]
            outputs = [np.zeros(shape, dtype) for dtype, shape in _tensors(expression.ty)]
            results = kernel(expression.args[0].name_hint, [*arguments, *outputs])[len(arguments) :]
            return results[0] if len(results) == 1 else tuple(results)
        if expression.op.name == "relax.reshape":
            return _value(expression.args[0], values, kernel).reshape(_tensors(expression.ty)[0][1])
    raise ExportError(f"the compiled model has a step that only the target itself can run: {str(expression)[:80]}")


def _tensors(kind: Any) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each tensor of a type."""
    from tvm import relax

    if isinstance(kind, relax.TupleType):
        return [tensor for field in kind.fields for tensor in _tensors(field)]
    return [(str(kind.dtype).removeprefix("T."), tuple(int(size) for size in kind.shape))]
