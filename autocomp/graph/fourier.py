"""Fourier transforms of complex and real values: products with cosines and sines, one axis after the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from autocomp.errors import ExportError
from autocomp.graph.labels import operation
from autocomp.graph.layer_calls import Constant
from autocomp.graph.pairs import Pair, Parts, pair

aten = torch.ops.aten
# Transforms of torch.fft: whether it is an inverse, and of what one half alone is (a real signal's spectrum); and by the end of a name the axes.
_TRANSFORMS = {"fft": (False, ""), "ifft": (True, ""), "rfft": (False, "out"), "irfft": (True, "in")}
_AXES: dict[str, Any] = {"": -1, "2": (-2, -1), "n": None}
FFT = {f"fft_{name}{axes}" for name in _TRANSFORMS for axes in _AXES}


class Fourier(Parts):
    """`torch.fft` and `torch.stft`."""

    def _axis(self, value: Any, axis: int, size: int, kept: int, sign: float, scale: float) -> Pair:
        """A transform along one axis of ``size`` values (cut, or filled up with zeros), of which the first ``kept`` frequencies are wanted."""
        angles = _angles(size, kept)
        re, im = (self._last(part, axis, size) for part in pair(value))
        cosines, sines = _constant(angles.cos() * scale), _constant(angles.sin() * scale * sign)
        found = self._product(Pair(re, im), Pair(cosines, sines), self._matmul)
        return Pair(*(None if part is None else self._do(aten.transpose.int, part, axis, -1) for part in found))

    def _matmul(self, a: Any, b: Any) -> Any:
        return self._bilinear(aten.matmul.default)(a, b)

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

    def transform(self, value: Any, s: Any = None, dim: Any = "", norm: Any = None, n: Any = None) -> Any:
        """One of ``torch.fft``, by the name of the operation."""
        name = operation(self.node).removeprefix("fft_")
        axes = name[-1] if name[-1] in _AXES else ""
        inverse, half = _TRANSFORMS[name.removesuffix(axes)]
        return self._transformed(value, n if s is None else s, _AXES[axes] if dim == "" else dim, norm, inverse, half)

    def _transformed(self, value: Any, s: Any, dim: Any, norm: Any, inverse: bool, half: str) -> Any:
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
