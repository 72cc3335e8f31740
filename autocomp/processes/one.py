"""One thread at a time: torch, TVM, their settings and the standard streams belong to the whole process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from autocomp.errors import UsageError

_lock = threading.RLock()
_long = [False]  # whether what the thread that holds the lock does is


@contextmanager
def at_work(long: bool = False) -> Iterator[None]:
    """Hold the process for what is done meanwhile; a thread may enter again. Another one's work is waited for, but refused with a UsageError
    where it is ``long``, or this is."""
    lock = _lock
    if not lock.acquire(blocking=False):
        if long or _long[0]:
            raise UsageError(
                "autocomp is at work in another thread of this process: torch, TVM and their settings belong to the whole process. Do one after "
                "the other, or in processes of their own"
            )
        lock.acquire()
    before = _long[0]
    _long[0] = before or long
    try:
        yield
    finally:
        _long[0] = before
        lock.release()


@contextmanager
def alone(limit: float | None = None) -> Iterator[None]:
    """Hold the process for something long. UsageError as `at_work`, and where a ``limit`` on a user's function cannot be kept: off the main
    thread (`interrupt.limited`)."""
    if limit is not None and threading.current_thread() is not threading.main_thread():
        raise UsageError(
            "evaluate_timeout works in the main thread alone: work there, or in a process of its own, or leave it out"
        )
    with at_work(long=True):
        yield


def is_at_work() -> bool:
    """Whether this thread holds the process for something long already."""
    lock = _lock
    if not lock.acquire(blocking=False):
        return False
    try:
        return _long[0]
    finally:
        lock.release()


def _anew() -> None:
    """A forked child holds nothing: the thread that did is not in it, or, where it is, does something else there."""
    global _lock
    _lock, _long[0] = threading.RLock(), False


os.register_at_fork(after_in_child=_anew)
