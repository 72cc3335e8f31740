"""A complex number in the making, as a pair of real parts, and arithmetic on such parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from autocomp.graph.recurrent_calls import Builder

aten = torch.ops.aten


class Pair(NamedTuple):
    """A complex value in the making: real and imaginary part, each a node, a constant or a number; None for nothing but zeros."""

    re: Any
    im: Any


class Parts:
    """Adds operations on parts, nodes or numbers, in the place of ``node``; a part that is None is zero."""

    def __init__(self, builder: Builder, node: fx.Node) -> None:
        self.builder, self.node = builder, node

    def _do(self, target: Any, *args: Any) -> Any:
        return self.builder.operation(target, args, self.node)

    def _plus(self, a: Any, b: Any) -> Any:
        if a is None or b is None:
            return b if a is None else a
        return a + b if both_numbers(a, b) else self._ordered(aten.add.Tensor, a, b)

    def _negative(self, a: Any) -> Any:
        return None if a is None else -a if isinstance(a, int | float) else self._do(aten.neg.default, a)

    def _minus(self, a: Any, b: Any) -> Any:
        if b is None:
            return a
        if a is None or isinstance(a, int | float):
            return self._plus(self._negative(b), a)
        return self._do(aten.sub.Tensor, a, b)

    def _times(self, a: Any, b: Any) -> Any:
        if a is None or b is None:
            return None
        return a * b if both_numbers(a, b) else self._ordered(aten.mul.Tensor, a, b)

    def _bilinear(self, target: Any) -> Callable[[Any, Any], Any]:
        """A product of two tensors as `_product` takes it."""
        return lambda a, b: None if a is None or b is None else self._do(target, a, b)

    def _ordered(self, target: Any, a: Any, b: Any) -> Any:
        return self._do(target, b, a) if isinstance(a, int | float) else self._do(target, a, b)

    def _there(self, a: Any, like: Any) -> Any:
        """A part as a tensor."""
        if a is None:
            return self._do(aten.zeros_like.default, like)
        return self._do(aten.full_like.default, like, a) if isinstance(a, int | float) else a

    def _whole(self, value: Any) -> Pair:
        """Both parts as tensors."""
        re, im = pair(value)
        like = im if re is None or isinstance(re, int | float) else re
        return Pair(self._there(re, like), self._there(im, like))

    def _product(self, a: Any, b: Any, times: Callable[[Any, Any], Any]) -> Pair:
        (a_re, a_im), (b_re, b_im) = pair(a), pair(b)
        return Pair(self._minus(times(a_re, b_re), times(a_im, b_im)), self._plus(times(a_re, b_im), times(a_im, b_re)))


def pair(value: Any) -> Pair:
    return value if isinstance(value, Pair) else Pair(value, None)


def both_numbers(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float)
