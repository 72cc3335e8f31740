"""Risky work shared out among several forked children, each of which may crash, hang, or ask for another try."""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from autocomp.errors import BoardError
from autocomp.kernels.isolated import end_child, last_line, let_go, reap, receive, send

T = TypeVar("T")

_INDEX = struct.Struct("<q")
_TRIES = 2  # of an item whose board was lost or silent: once more, perhaps on another board


@dataclass
class _Worker:
    child: int
    tasks: int  # where the indices of its items are written
    answers: int
    index: int | None = None
    deadline: float = 0.0  # of the item in hand


def attempt_shared(items: Sequence[T], work: Callable[[T], Any], workers: int, timeout: float) -> list[tuple[Any, str]]:
    """Return ``(result, failure)`` of ``work(item)`` for each item, with up to ``workers`` children at work.

    Each child keeps what ``work`` opens (a session) from item to item. An exception becomes its last line in ``failure``. A
    `BoardError`, a crash, and a silence of ``timeout`` seconds cost the item one of its two tries.
    """
    reap()
    waiting, tries = deque(range(len(items))), [0] * len(items)
    done: dict[int, tuple[Any, str]] = {}
    crew: list[_Worker] = []

    def settle(index: int, result: Any, failure: str, lost: bool) -> None:
        tries[index] += 1
        if lost and tries[index] < _TRIES:
            waiting.appendleft(index)
        else:
            done[index] = (result, failure)

    try:
        while len(done) < len(items):
            while waiting:
                worker = next((one for one in crew if one.index is None), None)
                if worker is None and len(crew) < workers:
                    crew.append(worker := _hire(items, work))
                if worker is None:
                    break
                worker.index, worker.deadline = waiting.popleft(), time.monotonic() + timeout
                os.write(worker.tasks, _INDEX.pack(worker.index))
            busy = [one for one in crew if one.index is not None]
            patience = max(min(one.deadline for one in busy) - time.monotonic(), 0.0)
            ready, _, _ = select.select([one.answers for one in busy], [], [], patience)
            for worker in busy:
                late = time.monotonic() >= worker.deadline
                if worker.answers not in ready and not late:
                    continue
                index, worker.index = worker.index, None
                assert index is not None
                message = receive(worker.answers, timeout) if worker.answers in ready else None
                if message is None:
                    crew.remove(worker)
                    settle(index, None, _dismiss(worker), True)
                else:
                    settle(index, *message)
        return [done[index] for index in range(len(items))]
    finally:
        for worker in crew:
            os.close(worker.tasks)
            os.close(worker.answers)
            # Killed in the midst of asking for a board, it would leave that board taken until its server notices, after 6 to 8 seconds.
            let_go(worker.child, worker.deadline if worker.index is not None else time.monotonic())


def _hire(items: Sequence[T], work: Callable[[T], Any]) -> _Worker:
    tasks, parents_tasks = os.pipe()
    parents_answers, answers = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(parents_tasks)
        os.close(parents_answers)
        _labour(items, work, tasks, answers)
    os.close(tasks)
    os.close(answers)
    return _Worker(child, parents_tasks, parents_answers)


def _dismiss(worker: _Worker) -> str:
    os.close(worker.tasks)
    os.close(worker.answers)
    return end_child(worker.child)


def _labour(items: Sequence[T], work: Callable[[T], Any], tasks: int, answers: int) -> None:
    """The child: answer for each index that comes, and never return into the parent's code."""
    faulthandler.disable()  # a crash here is data, not news
    try:
        while len(data := os.read(tasks, _INDEX.size)) == _INDEX.size:
            (index,) = _INDEX.unpack(data)
            try:
                answer: tuple[Any, str, bool] = (work(items[index]), "", False)
            except Exception as error:
                answer = (None, last_line(error), isinstance(error, BoardError))
            send(answers, pickle.dumps(answer))
    finally:
        os._exit(0)
