"""Hooks of modules that are taken away again, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take hooks away when this is left."""
    placed = list(handles)
    try:
        yield
    finally:
        for handle in placed:
            handle.remove()
