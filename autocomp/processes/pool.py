"""Work shared out among forked processes, which inherit what they work on: nothing but items and results is sent."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from itertools import islice
from typing import Any, Generic, TypeVar

from autocomp.errors import AutocompError, last_line
from autocomp.processes.child import uninterrupted

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Generic[Item, Result]):
    """Processes that compute ``function`` of items, on one torch thread each; forked at the first call and kept until ``close``.

    They know what ``function`` refers to as it was when they were forked. With one worker, or where processes cannot be forked, everything
    happens in this process.
    """

    def __init__(self, function: Callable[[Item], Result], workers: int, ahead: int | None = None) -> None:
        import multiprocessing

        self.function = function
        self.count = workers if "fork" in multiprocessing.get_all_start_methods() else 1
        self.ahead = ahead or (2 * self.count if self.count > 1 else 1)
        self._pool: ProcessPoolExecutor | None = None
        if self.count > 1:
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(self.count, context, initializer=_begin, initargs=(function, os.getpid()))

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result of each item, in order. What ``function`` raises is raised here; AutocompError if a process is killed.

        Items are drawn when they are needed, ``ahead`` before their results: each may depend on the results before those.
        """
        if self._pool is None:
            waiting: deque[Item] = deque()
            source = iter(items)
            while True:
                waiting.extend(islice(source, self.ahead - len(waiting)))
                if not waiting:
                    return
                yield self.function(waiting.popleft())
        drawn, begun = iter(items), deque[Future[Result]]()
        try:
            while True:
                for item in islice(drawn, self.ahead - len(begun)):
                    with uninterrupted():  # the first one forks
                        begun.append(self._pool.submit(_call, item))
                if not begun:
                    return
                yield begun.popleft().result()
        except BrokenProcessPool as error:
            raise AutocompError(
                "a worker process ended by itself, which is what happens when memory runs out; what was found is kept. "
                "Free some memory and go on with --resume"
            ) from error

    def close(self) -> None:
        """End the processes; what they have not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def map_in_processes(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield ``function`` of each item, in order, from up to ``workers`` processes that are ended afterwards; see `Workers`."""
    with closing(Workers(function, min(workers, len(items)))) as crew:
        yield from crew.map(items)


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_function: Callable[[Any], Any] | None = None  # of a worker process


def _begin(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    import torch

    _function = function
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of them; the parent says what happens
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A parent that was killed closes nothing, and a worker would wait for its next item for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None
    try:
        return _function(item)
    except Exception as error:
        if _travels(error):
            raise
        # it would end the pool, or hang it: what is left of it is its text
        raise AutocompError(f"{type(error).__name__}: {last_line(error)}") from None


def _travels(error: Exception) -> bool:
    """Whether an error arrives in the parent as what it is: many are built from other arguments than they keep."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False
