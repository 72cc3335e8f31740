"""Run risky work in a forked child, so that a kernel that crashes or hangs costs one trial and not the run."""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import struct
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_HEADER = struct.Struct("<Q")
_PART = 1 << 20  # bytes read at a time


def attempt_each(items: Sequence[T], work: Callable[[T], Any], timeout: float = 60.0) -> Generator[tuple[T, Any, str]]:
    """Yield ``(item, result, failure)`` for ``work(item)`` on each item, run in a child process; closing the iterator ends it.

    An exception becomes its last line in ``failure``; a crash or a silence of ``timeout`` seconds becomes a failure of that item, and
    a new child goes on with the rest.
    """
    position = 0
    while position < len(items):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _serve(items[position:], work, writer)
        os.close(writer)
        cause = ""
        try:
            while position < len(items):
                message = receive(reader, timeout)
                if message is None:
                    break
                yield (items[position], *message)
                position += 1
        except GeneratorExit:  # the caller has seen enough
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            os.close(reader)
            cause = end_child(child)
        if position < len(items):
            yield items[position], None, cause
            position += 1


def _serve(items: Sequence[T], work: Callable[[T], Any], writer: int) -> None:
    """The child: answer for one item after the other, and never return into the parent's code."""
    faulthandler.disable()  # a crash here is data, not news
    try:
        for item in items:
            try:
                answer: tuple[Any, str] = (work(item), "")
            except Exception as error:
                lines = str(error).strip().splitlines()
                answer = (None, lines[-1] if lines else type(error).__name__)
            send(writer, pickle.dumps(answer))
    finally:
        os._exit(0)


def send(writer: int, data: bytes) -> None:
    """Write one answer whole: a pipe takes a large one (the outputs of a model) in parts."""
    left = memoryview(_HEADER.pack(len(data)) + data)
    while left:
        left = left[os.write(writer, left) :]


def receive(reader: int, timeout: float) -> Any:
    """One answer, unpickled; None if the child is gone or silent."""
    deadline = time.monotonic() + timeout
    header = _read(reader, _HEADER.size, deadline)
    data = _read(reader, _HEADER.unpack(header)[0], deadline) if header else None
    if data is None:
        return None
    return pickle.loads(data)


def _read(reader: int, count: int, deadline: float) -> bytes | None:
    data = b""
    while len(data) < count:
        ready, _, _ = select.select([reader], [], [], max(deadline - time.monotonic(), 0.0))
        part = os.read(reader, min(count - len(data), _PART)) if ready else b""
        if not part:
            return None
        data += part
    return data


def end_child(child: int) -> str:
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
