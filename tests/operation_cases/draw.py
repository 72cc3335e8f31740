"""What cases are made of: a name, a function (or module), and what its inputs are drawn from."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Case = tuple[Callable[..., Any], tuple[Any, ...]]
CASES: dict[str, Case] = {}


class Draw:
    """What an input is drawn from: ``floats(2, 3)`` and the like, made when the case is used."""

    def __init__(self, make: Callable[[torch.Generator], Tensor]) -> None:
        self.make = make


def floats(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Draw:
    return Draw(lambda g: torch.randn(shape, generator=g) * scale + shift)


def positive(*shape: int) -> Draw:
    return Draw(lambda g: torch.rand(shape, generator=g) * 3 + 0.1)


def unit(*shape: int) -> Draw:
    return Draw(lambda g: torch.rand(shape, generator=g) * 1.8 - 0.9)


def integers(*shape: int, low: int = -5, high: int = 6, dtype: torch.dtype = torch.int64) -> Draw:
    return Draw(lambda g: torch.randint(low, high, shape, generator=g).to(dtype))


def bools(*shape: int) -> Draw:
    return Draw(lambda g: torch.rand(shape, generator=g) > 0.5)


def case(name: str, function: Callable[..., Any], *inputs: Draw) -> None:
    assert name not in CASES, name
    CASES[name] = (function, inputs)


def inputs_of(name: str) -> tuple[Tensor, ...]:
    """The tensors of a case."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return tuple(draw.make(generator) for draw in CASES[name][1])


def module(name: str, make: Callable[[], torch.nn.Module], *inputs: Draw) -> None:
    torch.manual_seed(0)
    built = make().eval()
    CASES[name] = (built, inputs)


X = floats(2, 3, 4)
Y = floats(2, 3, 4)
I = integers(2, 3, 4)  # noqa: E741
B = bools(2, 3, 4)
MAP = floats(2, 4, 7, 9)
SEQ = floats(2, 4, 11)
VOL = floats(1, 2, 5, 6, 7)
