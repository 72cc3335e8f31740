"""Reshaped results of convolutions: what follows elementwise is computed before the reshape, where it fuses into the convolution.

A one-dimensional convolution runs over a picture one row high, so its result is reshaped, and a reshape between a convolution and
its bias would make the bias a pass of its own over memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autocomp.compiler.expressions import array_of, is_constant, shape_of


class Views:
    """The reshaped values of one function, each with the value it was made of."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self._sources: dict[Any, Any] = {}

    def reshaped(self, source: Any, shape: Sequence[int]) -> Any:
        """``source`` as ``shape``, whose last axis it shares; remembered."""
        from tvm import relax

        if tuple(shape) == shape_of(source):
            return source
        view = self.builder.emit(relax.op.reshape(source, list(shape)))
        self._sources[view] = source
        return view

    def elementwise(self, call: Any, arguments: Sequence[Any]) -> Any:
        """Emit an elementwise operation on ``arguments``: before the reshape, if one of them is a view and the others can follow."""
        from tvm import relax

        shape = next((shape_of(argument) for argument in arguments if self._is_view(argument)), None)
        if shape is not None:
            target = next(self._sources[argument] for argument in arguments if self._is_view(argument))
            moved = [self._moved(argument, shape, shape_of(target) or ()) for argument in arguments]
            if not any(operand is None for operand in moved):
                return self.reshaped(self.builder.emit(relax.Call(call.op, moved, call.attrs, call.ty_args)), shape)
        return self.builder.emit(relax.Call(call.op, list(arguments), call.attrs, call.ty_args))

    def _is_view(self, argument: Any) -> bool:
        from tvm import relax

        return isinstance(argument, relax.Var) and argument in self._sources

    def _moved(self, argument: Any, shape: tuple[int, ...], target: tuple[int, ...]) -> Any:
        """An operand of a view's shape as one of its source's; None if that would take more than a reshape."""
        from tvm import relax

        own = shape_of(argument)
        if not own:  # a scalar, or no tensor at all
            return argument
        if self._is_view(argument) and shape_of(self._sources[argument]) == target:
            return self._sources[argument]
        if own == shape:
            return self.builder.emit(relax.op.reshape(argument, list(target)))
        if is_constant(argument) and all(size == 1 for size in own[:-1]):
            return relax.const(np.ascontiguousarray(array_of(argument).reshape([1] * (len(target) - 1) + [own[-1]])))
        return None
