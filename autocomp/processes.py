"""Work shared out among forked processes, which inherit what they work on: nothing but items and results is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_function: Callable[[Any], Any] | None = None  # what forked workers call: they inherit it


def map_in_processes(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield ``function`` of each item, in order; in this process where one worker is enough or processes cannot be forked.

    Each process computes on one torch thread. What ``function`` raises is raised here.
    """
    global _function
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    workers = min(workers, len(items))
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(function, items)
        return
    _function = function
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            yield from pool.map(_call, items)
    finally:
        _function = None


def _call(item: Any) -> Any:
    import torch

    torch.set_num_threads(1)
    assert _function is not None
    return _function(item)
