"""Being told to stop, by Ctrl-C, SIGTERM or SIGHUP: orderly, and never lost.

Python drops an exception that a handler raises in a destructor, a hook after a fork or a callback of a library. What came is remembered
here, and raised at the next step of a run.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_came: list[int] = []  # the signal that came since the last `check`
_process = [0]  # the one that wants to be told


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop; ``exit_code`` is what a shell expects of a process that it ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def remembered() -> Iterator[None]:
    """While inside, a signal to stop raises `Stopped`, and is remembered so that `check` raises what was dropped.

    Only signals that nobody handles but Python or the system, in the main thread: a program's own handler knows better.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _NUMBERS}
        before = {
            n: handler for n, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)
        }
    if before:
        _process[0] = os.getpid()
    for number in before:
        signal.signal(number, _remember)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            _came.clear()


def check() -> None:
    """Raise `Stopped` for a signal that came since the last time, if one did."""
    if _came:
        raise Stopped(_came.pop())


class OutOfTime(BaseException):
    """Something took longer than it may. No Exception: a function that hangs may well catch those."""


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` in what takes longer, once a second until it ends, and at its end in any case: it may have caught that, or returned
    half of its work. None: as long as it takes.

    In the main thread, where Python runs: a library's own loop is not ended before it returns, and in another thread nothing is.
    """
    if seconds is None:
        yield
        return
    begun, late = time.monotonic(), OutOfTime(f"not done after {seconds:g} s")
    with _alarm(seconds, late) if threading.current_thread() is threading.main_thread() else nullcontext():
        yield
    if time.monotonic() - begun > seconds:
        raise late


@contextmanager
def _alarm(seconds: float, late: OutOfTime) -> Iterator[None]:
    """Raise once a second, from so many on; an alarm that the caller had set rings afterwards."""

    def over(_number: int, _frame: FrameType | None) -> None:
        raise late

    begun = time.monotonic()
    before = signal.signal(signal.SIGALRM, over)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1e-3), every)


def is_stop(error: BaseException) -> bool:
    """Whether an exception is a signal's, and not one that a user's function raised by itself."""
    if isinstance(error, Stopped):
        return True
    return isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) not in (_remember, signal.SIG_IGN)


def _remember(number: int, _frame: FrameType | None) -> None:
    if os.getpid() != _process[0]:  # a forked child ends as if nobody had asked to be told
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _came[:] = [number]
    raise Stopped(number)
