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
from dataclasses import dataclass
from typing import Any

_HEADER = struct.Struct("<Q")
_PART = 1 << 20  # bytes read at a time


@dataclass(eq=False)
class Child:
    """A child process: the end of a pipe that takes what it is asked, and that of one that gives its answers."""

    pid: int
    commands: int
    answers: int
    gone: bool = False

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
        return _end(self.pid)

    def leave(self, deadline: float | None = None) -> None:
        """Let it end and wait for it no longer; `reap` kills it where it has not ended a second after ``deadline`` (monotonic; None: now)."""
        if not self.gone:
            self._close()
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


def last_line(error: Exception) -> str:
    """The line of an error that says what was wrong; TVM's are preceded by pages of trace."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def send(writer: int, message: Any) -> None:
    """Pickle one message and write it whole: a pipe takes a large one (the outputs of a model) in parts."""
    data = pickle.dumps(message)
    left = memoryview(_HEADER.pack(len(data)) + data)
    while left:
        left = left[os.write(writer, left) :]


def receive(reader: int, timeout: float | None = None) -> Any:
    """One message, unpickled; None if the other side is gone, or silent for ``timeout`` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout
    header = _read(reader, _HEADER.size, deadline)
    data = _read(reader, _HEADER.unpack(header)[0], deadline) if header else None
    if data is None:
        return None
    return pickle.loads(data)


def _read(reader: int, count: int, deadline: float | None) -> bytes | None:
    data = b""
    while len(data) < count:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        ready, _, _ = select.select([reader], [], [], left)
        part = os.read(reader, min(count - len(data), _PART)) if ready else b""
        if not part:
            return None
        data += part
    return data


def _end(child: int) -> str:
    """Give the child a moment to end by itself, then kill it; say how it ended."""
    for _ in range(20):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if os.WIFSIGNALED(status):
                return f"it crashed with {signal.Signals(os.WTERMSIG(status)).name}"
            return f"its process ended with exit code {os.WEXITSTATUS(status)}"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "it did not answer in time"


# Children that were told to end, by when they must. The end of a large process takes 50 ms, which nobody need wait for.
_leaving: dict[int, float] = {}


def reap() -> None:
    """Take note of the children let go that have ended, and end those that are late."""
    for child, deadline in list(_leaving.items()):
        ended, _ = os.waitpid(child, os.WNOHANG)
        if not ended and time.monotonic() > deadline + 1.0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            ended = child
        if ended:
            del _leaving[child]
