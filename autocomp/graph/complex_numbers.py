"""Complex numbers as pairs of real ones: no kernel computes in them, and every operation on them is some on their parts.

So a model that turns (rotary positions by `torch.view_as_complex`), filters or looks at frequencies (`torch.fft`, `torch.stft`) has a canonical
form without any. A Fourier transform is a product with cosines and sines, one axis after the other: exact, and for the lengths that models have
(some hundreds) hardly more work than a fast one, in kernels that are tuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from autocomp.errors import ExportError
from autocomp.graph.fourier import FFT, Fourier
from autocomp.graph.labels import operation
from autocomp.graph.layer_calls import Constant
from autocomp.graph.pairs import Pair, both_numbers, pair
from autocomp.graph.recurrent_calls import Builder

aten = torch.ops.aten
SMALLEST = 1e-37  # under a root: its slope at 0 would be infinite


def expanded(builder: Builder, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What stands for an operation with complex operands or results: a `Pair`, or a real value. None where nothing of it is complex.

    ExportError for an operation that has no such form here.
    """
    given: list[Any] = _in_pairs(list(args))
    named: dict[str, Any] = _in_pairs(dict(kwargs))
    result = node.meta.get("val")
    makes = isinstance(result, Tensor) and result.is_complex()
    if not makes and not any(isinstance(leaf, Pair) for leaf in _pytree.tree_leaves((given, named), _is_pair)):
        return None
    name, rules = _name(node), _Rules(builder, node)
    rule = rules.transform if name in FFT else getattr(rules, name) if name in _RULES else None
    if rule is not None:
        return rule(*given, **named)
    if name in _PART_BY_PART:
        return rules.part_by_part(given, named)
    raise ExportError(
        f"{node.target} has no form in real numbers here: write it with the real and the imaginary part (torch.view_as_real)"
    )


def _name(node: fx.Node) -> str:
    name = operation(node).removesuffix("_")
    return "getitem" if "getitem" in name else name


def _is_pair(value: Any) -> bool:
    return isinstance(value, Pair)


def _in_pairs(value: Any) -> Any:
    """Arguments in which nothing is complex but pairs."""
    if isinstance(value, Pair):
        return value
    if isinstance(value, Constant) and isinstance(value.value, Tensor) and value.value.is_complex():
        whole = value.value.detach().to(torch.complex64).resolve_conj()
        return Pair(*(Constant(part.clone(), "", value.made_of) for part in (whole.real, whole.imag)))
    if isinstance(value, complex):
        return Pair(value.real or None, value.imag or None)
    if isinstance(value, list | tuple):
        return [_in_pairs(item) for item in value]
    if isinstance(value, dict):
        return {key: _in_pairs(item) for key, item in value.items()}
    return value


# What is done to real and imaginary part alike.
_PART_BY_PART = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "unsqueeze", "squeeze",
    "slice", "select", "expand", "expand_as", "view_as", "flatten", "unflatten", "clone", "contiguous", "alias", "detach", "roll", "flip",
    "index_select", "index", "narrow", "repeat", "repeat_interleave", "tile", "unbind", "split", "split_with_sizes", "chunk", "tensor_split",
    "diagonal", "constant_pad_nd", "pad", "sum", "mean", "cumsum", "cat", "stack", "concat", "concatenate", "where", "numpy_T", "mT",
    "getitem", "resolve_conj", "resolve_neg", "lift_fresh_copy", "tril", "triu", "gather", "take_along_dim",
}  # fmt: skip
# arguments that are no values, but say where
_PLACES = {
    "where": (0,),
    "index": (1,),
    "gather": (2,),
    "index_select": (2,),
    "take_along_dim": (1,),
    "repeat_interleave": (1,),
}
_FILLS = {
    "where": (1, 2),
    "constant_pad_nd": (2,),
    "pad": (3,),
}  # arguments that are real values where they are numbers


class _Rules(Fourier):
    """The operations by name; each is given the arguments of the one it stands for, with pairs for what is complex."""

    # --- what is complex by nature --------------------------------------------------------------------------------------

    def real(self, value: Any) -> Any:
        return self._whole(value).re

    def imag(self, value: Any) -> Any:
        return self._whole(value).im

    def view_as_real(self, value: Any) -> Any:
        return self._do(aten.stack.default, list(self._whole(value)), -1)

    def view_as_complex(self, value: Any) -> Pair:
        return Pair(*(self._do(aten.select.int, value, -1, part) for part in (0, 1)))

    def complex(self, re: Any, im: Any) -> Pair:
        return Pair(re, im)

    def polar(self, size: Any, angle: Any) -> Pair:
        return Pair(
            *(self._times(size, self._do(function, angle)) for function in (aten.cos.default, aten.sin.default))
        )

    def _conj(self, value: Any) -> Pair:
        return Pair(pair(value).re, self._negative(pair(value).im))

    conj = conj_physical = _conj

    def _size(self, value: Any) -> Any:
        """The squared absolute value."""
        re, im = pair(value)
        return self._plus(self._times(re, re), self._times(im, im))

    def abs(self, value: Any) -> Any:
        size = self._do(aten.clamp_min.default, self._size(self._whole(value)), SMALLEST)
        return self._do(aten.sqrt.default, size)

    def angle(self, value: Any) -> Any:
        whole = self._whole(value)
        return self._do(aten.atan2.default, whole.im, whole.re)

    def _to(self, value: Any, *_args: Any, **_how: Any) -> Any:
        if not isinstance(self.node.meta["val"], Tensor) or self.node.meta["val"].is_complex():
            return value if isinstance(value, Pair) else Pair(self._do(aten.to.dtype, value, torch.float32), None)
        return self._do(aten.to.dtype, self._whole(value).re, self.node.meta["val"].dtype)

    to = type_as = _to_copy = type = cfloat = _to

    # --- arithmetic -----------------------------------------------------------------------------------------------------

    def add(self, a: Any, b: Any, alpha: Any = 1) -> Pair:
        (a_re, a_im), (b_re, b_im) = pair(a), pair(b)
        if alpha != 1:
            b_re, b_im = self._times(b_re, alpha), self._times(b_im, alpha)
        return Pair(self._plus(a_re, b_re), self._plus(a_im, b_im))

    def sub(self, a: Any, b: Any, alpha: Any = 1) -> Pair:
        return self.add(a, b, alpha=-alpha)

    def rsub(self, a: Any, b: Any, alpha: Any = 1) -> Pair:
        return self.sub(b, a, alpha)

    def neg(self, value: Any) -> Pair:
        return Pair(*map(self._negative, pair(value)))

    def mul(self, a: Any, b: Any) -> Pair:
        return self._product(a, b, self._times)

    def square(self, value: Any) -> Pair:
        return self.mul(value, value)

    def pow(self, value: Any, power: Any) -> Pair:
        if not isinstance(value, Pair) or type(power) is not int or power < 1:
            raise ExportError("complex powers are compiled where they are whole numbers")
        result = value
        for _ in range(power - 1):
            result = self.mul(result, value)
        return result

    def reciprocal(self, value: Any) -> Pair:
        size = self._size(value)
        re, im = self._conj(value)
        return Pair(*(None if part is None else self._quotient(part, size) for part in (re, im)))

    def _quotient(self, a: Any, b: Any) -> Any:
        if both_numbers(a, b):
            return a / b
        if isinstance(a, int | float):
            return self._times(self._do(aten.reciprocal.default, b), a)
        return self._do(aten.div.Tensor, a, b)

    def div(self, a: Any, b: Any) -> Pair:
        if isinstance(b, Pair):
            return self.mul(a, self.reciprocal(b))
        return Pair(*(None if part is None else self._quotient(part, b) for part in pair(a)))

    def exp(self, value: Any) -> Pair:
        re, im = pair(value)
        turned = self.polar(1.0, self._there(im, re))
        return turned if re is None else self.mul(self._do(aten.exp.default, re), turned)

    def matmul(self, a: Any, b: Any) -> Pair:
        return self._product(a, b, self._matmul)

    bmm = mm = mv = matmul

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Pair:
        found = self._product(x, weight, self._bilinear(aten.linear.default))
        return found if bias is None else self.add(found, bias)

    def einsum(self, equation: str, operands: Sequence[Any], **_how: Any) -> Pair:
        if len(operands) > 2:
            raise ExportError("torch.einsum of complex numbers is compiled for two operands at most")

        def product(*parts: Any) -> Any:
            return None if any(part is None for part in parts) else self._do(aten.einsum.default, equation, list(parts))

        if len(operands) == 1:
            return Pair(*map(product, pair(operands[0])))
        return self._product(operands[0], operands[1], product)

    def part_by_part(self, args: list[Any], kwargs: dict[str, Any]) -> Pair:
        """The same operation on both parts; what is real beside them is added to the real one."""
        places, fills = _PLACES.get(_name(self.node), ()), _FILLS.get(_name(self.node), ())
        kwargs = {
            key: value for key, value in kwargs.items() if not (isinstance(value, torch.dtype) and value.is_complex)
        }

        def of(part: str) -> Any:
            def taken(value: Any, index: int = -1) -> Any:
                if isinstance(value, Pair):
                    return getattr(self._whole(value), part)
                if isinstance(value, list):
                    return [taken(item) for item in value]
                if part == "im" and index in fills and isinstance(value, int | float):
                    return 0.0
                if part == "im" and isinstance(value, fx.Node | Constant):
                    return self._do(aten.zeros_like.default, value)
                return value

            made = self._do(
                self.node.target,
                *(value if index in places else taken(value, index) for index, value in enumerate(args)),
            )
            made.kwargs = kwargs
            return made

        return Pair(of("re"), of("im"))


_RULES = frozenset(
    name for name in dir(_Rules) if not name.startswith("_") and name not in ("part_by_part", "transform")
) | {
    "_conj",
    "_to_copy",
}

IN_COMPLEX_NUMBERS = frozenset(
    name for name in _RULES | _PART_BY_PART | FFT if not name.startswith("_") and name != "getitem"
)
