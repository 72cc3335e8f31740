"""Run risky work in a forked child, so that a kernel that crashes or hangs costs one trial and not the run."""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
P = TypeVar("P")

_HEADER = struct.Struct("<Q")
_INDEX = struct.Struct("<q")
_PART = 1 << 20  # bytes read at a time


def attempt_alone(
    items: Sequence[T],
    prepare: Callable[[T], P],
    measure: Callable[[T, P], Any],
    workers: int = 1,
    timeout: float = 60.0,
) -> list[tuple[Any, str]]:
    """Return ``(result, failure)`` of each item: ``measure(item, prepare(item))``, in forked children.

    All that is prepared is prepared first, by so many children at once; then one item after the other is measured, with nothing else
    at work. An exception becomes its last line in ``failure``; a crash or a silence of ``timeout`` seconds becomes a failure of that item,
    and new children do what the lost one had left.
    """
    reap()
    results: dict[int, tuple[Any, str]] = {}
    while left := [index for index in range(len(items)) if index not in results]:
        shares = [left[k::workers] for k in range(min(workers, len(left)))]
        children: list[_Child] = []
        try:
            children += (_start(items, share, prepare, measure) for share in shares)
            ready = {index: child for child in children for index in _prepared(child, results, timeout)}
            for index in sorted(ready):
                child = ready[index]
                if child.gone:
                    continue
                os.write(child.commands, _INDEX.pack(index))
                answer = receive(child.answers, timeout)
                results[index] = (None, child.end()) if answer is None else answer
        finally:
            for child in children:
                child.leave()
    return [results[index] for index in range(len(items))]


@dataclass
class _Child:
    pid: int
    share: list[int]
    commands: int  # where indices to measure are written
    answers: int
    gone: bool = False

    def end(self) -> str:
        """Let it end, or end it; say how it ended."""
        self._close()
        return end_child(self.pid)

    def leave(self) -> None:
        """Let it end when it will, if it has not ended yet."""
        if not self.gone:
            self._close()
            let_go(self.pid, time.monotonic())

    def _close(self) -> None:
        self.gone = True
        os.close(self.commands)
        os.close(self.answers)


def _start(items: Sequence[T], share: list[int], prepare: Callable[[T], P], measure: Callable[[T, P], Any]) -> _Child:
    commands, parents_commands = os.pipe()
    parents_answers, answers = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(parents_commands)
        os.close(parents_answers)
        _serve(items, share, prepare, measure, commands, answers)
    os.close(commands)
    os.close(answers)
    return _Child(pid, share, parents_commands, parents_answers)


def _prepared(child: _Child, results: dict[int, tuple[Any, str]], timeout: float) -> list[int]:
    """Wait until a child has prepared its share; note what failed, return what can be measured."""
    ready = []
    for index in child.share:
        failure = receive(child.answers, timeout)
        if failure is None:
            results[index] = (None, child.end())
            return []
        if failure:
            results[index] = (None, failure)
        else:
            ready.append(index)
    return ready


def _serve(
    items: Sequence[T],
    share: list[int],
    prepare: Callable[[T], P],
    measure: Callable[[T, P], Any],
    commands: int,
    answers: int,
) -> None:
    """The child: prepare its share, then measure what it is told to, and never return into the parent's code."""
    faulthandler.disable()  # a crash here is data, not news
    try:
        prepared: dict[int, P] = {}
        for index in share:
            failure = ""
            try:
                prepared[index] = prepare(items[index])
            except Exception as error:
                failure = last_line(error)
            send(answers, pickle.dumps(failure))
        while len(data := os.read(commands, _INDEX.size)) == _INDEX.size:
            (index,) = _INDEX.unpack(data)
            try:
                answer: tuple[Any, str] = (measure(items[index], prepared.pop(index)), "")
            except Exception as error:
                answer = (None, last_line(error))
            send(answers, pickle.dumps(answer))
    finally:
        os._exit(0)


def last_line(error: Exception) -> str:
    """The line of an error that says what was wrong; TVM's are preceded by pages of trace."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


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


# Children that were told to end, by when they must. The end of a large process takes 50 ms, which nobody need wait for.
_leaving: dict[int, float] = {}


def let_go(child: int, deadline: float) -> None:
    """Wait no longer for a child that was told to end; `reap` kills it where it has not ended a second after ``deadline`` (monotonic)."""
    _leaving[child] = deadline
    reap()


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
