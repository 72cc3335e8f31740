"""Complex numbers as pairs of real ones: no kernel computes in them, and every operation on them is some on their parts.

So a model that turns (rotary positions by `torch.view_as_complex`), filters or looks at frequencies (`torch.fft`, `torch.stft`) has a canonical
form without any. A Fourier transform is a product with cosines and sines, one axis after the other: exact, and for the lengths that models have
(some hundreds) hardly more work than a fast one, in kernels that are tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from autocomp.errors import ExportError
from autocomp.graph.layer_calls import Constant

aten = torch.ops.aten
SMALLEST = 1e-37  # under a root: its slope at 0 would be infinite


class Pair(NamedTuple):
    """A complex value in the making: real and imaginary part, each a node, a constant or a number; None for nothing but zeros."""

    re: Any
    im: Any


class Builder(Protocol):
    """What is added to the canonical graph, in the place of ``node``."""

    def operation(self, target: Any, args: tuple[Any, ...], node: fx.Node) -> fx.Node: ...


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
    name = str(node.target).removeprefix("aten.").split(".")[0].removesuffix("_")
    name = "getitem" if "getitem" in name else name
    rules = _Rules(builder, node)
    rule = getattr(rules, name, None) if name in _RULES else None
    if rule is not None:
        return rule(*given, **named)
    if name in _PART_BY_PART:
        return rules.part_by_part(given, named)
    raise ExportError(
        f"{node.target} has no form in real numbers here: write it with the real and the imaginary part (torch.view_as_real)"
    )


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


class _Rules:
    """The operations by name; each is given the arguments of the one it stands for, with pairs for what is complex."""

    def __init__(self, builder: Builder, node: fx.Node) -> None:
        self.builder, self.node = builder, node

    # --- arithmetic of parts: None is zero ------------------------------------------------------------------------------

    def _do(self, target: Any, *args: Any) -> Any:
        return self.builder.operation(target, args, self.node)

    def _plus(self, a: Any, b: Any) -> Any:
        if a is None or b is None:
            return b if a is None else a
        return a + b if _both_numbers(a, b) else self._ordered(aten.add.Tensor, a, b)

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
        return a * b if _both_numbers(a, b) else self._ordered(aten.mul.Tensor, a, b)

    def _ordered(self, target: Any, a: Any, b: Any) -> Any:
        return self._do(target, b, a) if isinstance(a, int | float) else self._do(target, a, b)

    def _there(self, a: Any, like: Any) -> Any:
        """A part as a tensor."""
        if a is None:
            return self._do(aten.zeros_like.default, like)
        return self._do(aten.full_like.default, like, a) if isinstance(a, int | float) else a

    def _whole(self, value: Any) -> Pair:
        """Both parts as tensors."""
        re, im = _pair(value)
        like = im if re is None or isinstance(re, int | float) else re
        return Pair(self._there(re, like), self._there(im, like))

    def _product(self, a: Any, b: Any, times: Callable[[Any, Any], Any]) -> Pair:
        (a_re, a_im), (b_re, b_im) = _pair(a), _pair(b)
        return Pair(self._minus(times(a_re, b_re), times(a_im, b_im)), self._plus(times(a_re, b_im), times(a_im, b_re)))

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
        return Pair(_pair(value).re, self._negative(_pair(value).im))

    conj = conj_physical = _conj

    def _size(self, value: Any) -> Any:
        """The squared absolute value."""
        re, im = _pair(value)
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
        (a_re, a_im), (b_re, b_im) = _pair(a), _pair(b)
        if alpha != 1:
            b_re, b_im = self._times(b_re, alpha), self._times(b_im, alpha)
        return Pair(self._plus(a_re, b_re), self._plus(a_im, b_im))

    def sub(self, a: Any, b: Any, alpha: Any = 1) -> Pair:
        return self.add(a, b, alpha=-alpha)

    def rsub(self, a: Any, b: Any, alpha: Any = 1) -> Pair:
        return self.sub(b, a, alpha)

    def neg(self, value: Any) -> Pair:
        return Pair(*map(self._negative, _pair(value)))

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
        if _both_numbers(a, b):
            return a / b
        if isinstance(a, int | float):
            return self._times(self._do(aten.reciprocal.default, b), a)
        return self._do(aten.div.Tensor, a, b)

    def div(self, a: Any, b: Any) -> Pair:
        if isinstance(b, Pair):
            return self.mul(a, self.reciprocal(b))
        return Pair(*(None if part is None else self._quotient(part, b) for part in _pair(a)))

    def exp(self, value: Any) -> Pair:
        re, im = _pair(value)
        turned = self.polar(1.0, self._there(im, re))
        return turned if re is None else self.mul(self._do(aten.exp.default, re), turned)

    def matmul(self, a: Any, b: Any) -> Pair:
        return self._product(a, b, lambda x, y: None if x is None or y is None else self._do(aten.matmul.default, x, y))

    bmm = mm = mv = matmul

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Pair:
        found = self._product(
            x, weight, lambda a, b: None if a is None or b is None else self._do(aten.linear.default, a, b)
        )
        return found if bias is None else self.add(found, bias)

    def einsum(self, equation: str, operands: Sequence[Any], **_how: Any) -> Pair:
        if len(operands) > 2:
            raise ExportError("torch.einsum of complex numbers is compiled for two operands at most")

        def product(*parts: Any) -> Any:
            return None if any(part is None for part in parts) else self._do(aten.einsum.default, equation, list(parts))

        if len(operands) == 1:
            return Pair(*map(product, _pair(operands[0])))
        return self._product(operands[0], operands[1], product)

    def part_by_part(self, args: list[Any], kwargs: dict[str, Any]) -> Pair:
        """The same operation on both parts; what is real beside them is added to the real one."""
        name = str(self.node.target).removeprefix("aten.").split(".")[0]
        places, fills = _PLACES.get(name, ()), _FILLS.get(name, ())
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

    # --- Fourier transforms ---------------------------------------------------------------------------------------------

    def _axis(self, value: Any, axis: int, size: int, kept: int, sign: float, scale: float) -> Pair:
        """A transform along one axis of ``size`` values (cut, or filled up with zeros), of which the first ``kept`` frequencies are wanted."""
        angles = _angles(size, kept)
        re, im = (self._last(part, axis, size) for part in _pair(value))
        cosines, sines = _constant(angles.cos() * scale), _constant(angles.sin() * scale * sign)
        found = self._product(Pair(re, im), Pair(cosines, sines), self._matmul)
        return Pair(*(None if part is None else self._do(aten.transpose.int, part, axis, -1) for part in found))

    def _matmul(self, a: Any, b: Any) -> Any:
        return None if a is None or b is None else self._do(aten.matmul.default, a, b)

    def _last(self, part: Any, axis: int, size: int) -> Any:
        """A part with the axis as its last, so long."""
        if part is None:
            return None
        part = self._do(aten.transpose.int, part, axis, -1)
        there = self._length(axis)
        if there > size:
            return self._do(aten.slice.Tensor, part, -1, 0, size)
        return self._do(aten.constant_pad_nd.default, part, [0, size - there], 0.0) if there < size else part

    def _length(self, axis: int) -> int:
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        size = source.meta["val"].shape[axis]
        if not isinstance(size, int):
            raise ExportError(
                f"{self.node.target} is along an axis of free length, which its matrix of cosines cannot be"
            )
        return size

    def _transformed(self, value: Any, s: Any, dim: Any, norm: Any, inverse: bool, half: str = "") -> Any:
        """``half``: ``in`` of a spectrum of which one half is given, ``out`` where one half is wanted, of a real signal's."""
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        rank = source.meta["val"].dim()
        if dim is None:
            dim = range(rank) if s is None else range(rank - len(s), rank)
        axes = [axis % rank for axis in ([dim] if isinstance(dim, int) else dim)]
        sizes = [None] * len(axes) if s is None else [s] if isinstance(s, int) else list(s)
        sizes = [None if size == -1 else size for size in sizes]
        lengths = [self._length(axis) if size is None else size for axis, size in zip(axes, sizes, strict=True)]
        if half == "in" and sizes[-1] is None:
            lengths[-1] = 2 * (lengths[-1] - 1)
        order = list(zip(axes, lengths, strict=True))
        sign = 1.0 if inverse else -1.0
        last, rest = order[-1], order[:-1]
        value = value if isinstance(value, Pair) else Pair(value, None)
        if half == "out":
            value = self._axis(value, *last, last[1] // 2 + 1, sign, _scale(last[1], norm, inverse))
        else:
            rest = rest if half == "in" else order
        for axis, size in rest:
            value = self._axis(value, axis, size, size, sign, _scale(size, norm, inverse))
        return value if half != "in" else self._real_again(value, *last, _scale(last[1], norm, inverse))

    def _real_again(self, value: Pair, axis: int, size: int, scale: float) -> Any:
        """A real signal from one half of its spectrum: the other half is its mirror image."""
        kept = size // 2 + 1
        angles = _angles(size, kept).T
        twice = torch.full((kept, 1), 2.0, dtype=torch.float64)
        twice[0] = 1.0
        if size % 2 == 0:
            twice[-1] = 1.0
        re, im = (self._last(part, axis, kept) for part in value)
        found = self._minus(
            self._matmul(re, _constant(angles.cos() * twice * scale)),
            self._matmul(im, _constant(angles.sin() * twice * scale)),
        )
        return self._do(aten.transpose.int, found, axis, -1)

    def fft_fft(self, x: Any, n: Any = None, dim: Any = -1, norm: Any = None) -> Any:
        return self._transformed(x, n, dim, norm, False)

    def fft_ifft(self, x: Any, n: Any = None, dim: Any = -1, norm: Any = None) -> Any:
        return self._transformed(x, n, dim, norm, True)

    def fft_rfft(self, x: Any, n: Any = None, dim: Any = -1, norm: Any = None) -> Any:
        return self._transformed(x, n, dim, norm, False, "out")

    def fft_irfft(self, x: Any, n: Any = None, dim: Any = -1, norm: Any = None) -> Any:
        return self._transformed(x, n, dim, norm, True, "in")

    def fft_fft2(self, x: Any, s: Any = None, dim: Any = (-2, -1), norm: Any = None) -> Any:
        return self._transformed(x, s, dim, norm, False)

    def fft_ifft2(self, x: Any, s: Any = None, dim: Any = (-2, -1), norm: Any = None) -> Any:
        return self._transformed(x, s, dim, norm, True)

    def fft_rfft2(self, x: Any, s: Any = None, dim: Any = (-2, -1), norm: Any = None) -> Any:
        return self._transformed(x, s, dim, norm, False, "out")

    def fft_irfft2(self, x: Any, s: Any = None, dim: Any = (-2, -1), norm: Any = None) -> Any:
        return self._transformed(x, s, dim, norm, True, "in")

    def fft_fftn(self, x: Any, s: Any = None, dim: Any = None, norm: Any = None) -> Any:
        return self._transformed(x, s, dim, norm, False)

    def fft_ifftn(self, x: Any, s: Any = None, dim: Any = None, norm: Any = None) -> Any:
        return self._transformed(x, s, dim, norm, True)

    def fft_rfftn(self, x: Any, s: Any = None, dim: Any = None, norm: Any = None) -> Any:
        return self._transformed(x, s, dim, norm, False, "out")

    def fft_irfftn(self, x: Any, s: Any = None, dim: Any = None, norm: Any = None) -> Any:
        return self._transformed(x, s, dim, norm, True, "in")

    def stft(
        self, x: Any, n_fft: int, hop_length: Any = None, win_length: Any = None, window: Any = None, normalized: bool = False,
        onesided: Any = None, return_complex: Any = None, align_to_window: Any = None,
    ) -> Pair:  # fmt: skip
        """Frames ``[..., frames, n_fft]``, windowed and transformed, as ``[..., frequencies, frames]``."""
        length, hop = win_length or n_fft, hop_length or n_fft // 4
        if window is None:
            window = _constant(torch.ones(length, dtype=torch.float64))
        if not isinstance(window, Constant) or isinstance(x, Pair):
            raise ExportError(
                "torch.stft is compiled for a real signal and a window that does not depend on the inputs"
            )
        kept = n_fft // 2 + 1 if onesided in (None, True) else n_fft
        left = (n_fft - length) // 2
        taps = torch.nn.functional.pad(window.value.detach().double(), (left, n_fft - length - left))
        scale = n_fft**-0.5 if normalized else 1.0
        angles = _angles(n_fft, kept)
        frames = self._do(aten.unfold.default, x, -1, n_fft, hop)
        parts = (angles.cos() * taps[:, None] * scale, -angles.sin() * taps[:, None] * scale)
        return Pair(*(self._do(aten.transpose.int, self._matmul(frames, _constant(part)), -1, -2) for part in parts))


_RULES = frozenset(name for name in vars(_Rules) if not name.startswith("_") and name != "part_by_part") | {
    "_conj",
    "_to_copy",
}

IN_COMPLEX_NUMBERS = frozenset(
    name for name in _RULES | _PART_BY_PART if not name.startswith("_") and name != "getitem"
)


def _pair(value: Any) -> Pair:
    return value if isinstance(value, Pair) else Pair(value, None)


def _both_numbers(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float)


def _constant(value: Tensor) -> Constant:
    return Constant(value.float(), "", 0)


def _angles(size: int, kept: int) -> Tensor:
    """2 pi t k / size, ``[size, kept]``: exact, since only the remainder of t k counts."""
    products = torch.arange(size)[:, None] * torch.arange(kept)[None, :]
    return (products % size).double() * (2 * math.pi / size)


def _scale(size: int, norm: str | None, inverse: bool) -> float:
    """What a transform along one axis is multiplied by."""
    if norm == "ortho":
        return 1 / math.sqrt(size)
    return 1 / size if inverse == (norm in (None, "backward")) else 1.0
