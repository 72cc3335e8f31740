"""How a file describes a module: by its kind, plain settings and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn


class Form(NamedTuple):
    """A kind of module: ``settings`` are attributes that its constructor takes by name, ``tensors`` the buffers that it takes too.

    Where there are no ``tensors``, it makes its own, empty, and the file's take their place; ``bias`` then says whether there is one.
    ``others`` are arguments whose values do not matter, since a module of the file takes the place of what is made of them.
    """

    kind: type[nn.Module]
    settings: tuple[str, ...]
    tensors: tuple[str, ...] = ()
    bias: bool = False
    others: Mapping[str, Any] = {}
