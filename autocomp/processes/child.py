"""Forked children that are asked things: how they are started, asked, heard and ended."""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

_HEADER = struct.Struct("<Q")
_PART = 1 << 20  # bytes read at a time
_STEP = 1.0  # seconds


@dataclass(eq=False)
class Child:
    """A child process: the end of a pipe that takes what it is asked, and that of one that gives its answers.

    ``parent`` is the process that started it. A copy of the record in a process forked later can close its pipes, and no more.
    """

    pid: int
    commands: int
    answers: int
    gone: bool = False
    parent: int = field(default_factory=os.getpid)

    @classmethod
    def start(cls, serve: Callable[[int, int], None]) -> Child:
        """Fork a child that runs ``serve`` (with its own ends of both pipes), ends, and never returns into the parent's code."""
        commands, parents_commands = os.pipe()
        parents_answers, answers = os.pipe()
        with uninterrupted():
            pid = os.fork()
        if pid == 0:
            faulthandler.disable()  # a crash here is data, not news
            os.close(parents_commands)
            os.close(parents_answers)
            try:
                serve(commands, answers)
            finally:
                os._exit(0)
        os.close(commands)
        os.close(answers)
        return cls(pid, parents_commands, parents_answers)

    def ask(self, question: Any) -> None:
        """Send it something; that it is gone already shows when its answer is read."""
        with suppress(BrokenPipeError):
            send(self.commands, question)

    def end(self) -> str:
        """Let it end, or end it; say how it ended."""
        self._close()
        return _end(self.pid) if self.parent == os.getpid() else "it is another process's child"

    def leave(self, deadline: float | None = None) -> None:
        """Let it end and wait for it no longer; `reap` kills it where it has not ended a second after ``deadline`` (monotonic; None: now)."""
        if not self.gone:
            self._close()
            if self.parent == os.getpid():
                _leaving[self.pid] = time.monotonic() if deadline is None else deadline
            reap()

    def _close(self) -> None:
        self.gone = True
        os.close(self.commands)
        os.close(self.answers)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C waiting while processes are forked: Python ignores what it would raise in the hooks that run after a fork."""
    if threading.current_thread() is not threading.main_thread():  # where no signal is ever handled
        yield
        return
    parent, came = os.getpid(), threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        if came.is_set() and os.getpid() == parent:
            signal.raise_signal(signal.SIGINT)


def answer_each(commands: int, answers: int, answer: Callable[[Any], Any]) -> None:
    """In the child: answer each question that comes, until the parent closes its end."""
    while (question := receive(commands)) is not None:
        send(answers, answer(question))


def send(writer: int, message: Any) -> None:
    """Pickle one message and write it whole: a pipe takes a large one (the outputs of a model) in parts.

    Nothing is written if it cannot be pickled, whose error is raised.
    """
    data = pickle.dumps(message)
    left = memoryview(_HEADER.pack(len(data)) + data)
    while left:
        left = left[os.write(writer, left) :]


def receive(reader: int, timeout: float | None = None) -> Any:
    """One message, unpickled; None if the other side is gone, or silent for ``timeout`` seconds.

    A pause of both (Ctrl-Z, a suspended machine) counts for no more than a step of the waiting.
    """
    left = _Left(timeout)
    header = _read(reader, _HEADER.size, left)
    data = _read(reader, _HEADER.unpack(header)[0], left) if header else None
    if data is None:
        return None
    return pickle.loads(data)


class _Left:
    """Seconds left to wait (None: for ever), spent in steps."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def poll(self, waiting: select.poll) -> bool:
        """Whether there is something to read before the time is up."""
        while self.seconds is None or self.seconds > 0:
            step = _STEP if self.seconds is None else min(_STEP, self.seconds)
            begun = time.monotonic()
            ready = waiting.poll(step * 1e3)
            if self.seconds is not None:
                self.seconds -= min(time.monotonic() - begun, step)
            if ready:
                return True
        return bool(waiting.poll(0))


def _read(reader: int, count: int, left: _Left) -> bytes | None:
    data = b""
    waiting = select.poll()  # `select.select` takes no file descriptor above 1023
    waiting.register(reader, select.POLLIN)
    while len(data) < count:
        part = os.read(reader, min(count - len(data), _PART)) if left.poll(waiting) else b""
        if not part:
            return None
        data += part
    return data


def _end(child: int) -> str:
    """Give the child a moment to end by itself, then kill it; say how it ended."""
    for _ in range(20):
        ended, status = _wait(child, os.WNOHANG)
        if ended:
            if status is None:
                return "its process ended, nobody knows how"
            if os.WIFSIGNALED(status):
                return f"it crashed with {signal.Signals(os.WTERMSIG(status)).name}"
            return f"its process ended with exit code {os.WEXITSTATUS(status)}"
        time.sleep(0.001)
    _kill(child)
    return "it did not answer in time"


def _wait(child: int, options: int = 0) -> tuple[bool, int | None]:
    """Whether a child has ended, and its status: None where another took note of it.

    A handler of SIGCHLD, a signal that is ignored, or a library that waits for whatever ends may have been faster.
    """
    try:
        pid, status = os.waitpid(child, options)
    except ChildProcessError:
        return True, None
    return pid != 0, status


def _kill(child: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _wait(child)


# Children that were told to end, by when they must. The end of a large process takes 50 ms, which nobody need wait for.
_leaving: dict[int, float] = {}
os.register_at_fork(after_in_child=_leaving.clear)  # a forked process has none of its parent's children to wait for


def reap() -> None:
    """Take note of the children let go that have ended, and end those that are late."""
    for child, deadline in list(_leaving.items()):
        ended, _ = _wait(child, os.WNOHANG)
        if not ended and time.monotonic() > deadline + 1.0:
            _kill(child)
            ended = True
        if ended:
            del _leaving[child]
