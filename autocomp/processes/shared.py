"""Risky work shared out among several forked children, each of which may crash, hang, or ask for another try."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from autocomp.errors import BoardError, last_line
from autocomp.processes.child import Child, answer_each, reap, receive
from autocomp.processes.outcome import Outcome

T = TypeVar("T")

_TRIES = 2  # of an item whose board was lost or silent: once more, perhaps on another board


@dataclass
class _Worker:
    child: Child
    index: int | None = None
    deadline: float = 0.0  # of the item in hand


def attempt_shared(items: Sequence[T], work: Callable[[T], Any], workers: int, timeout: float) -> list[Outcome[Any]]:
    """Return ``(result, failure)`` of ``work(item)`` for each item, with up to ``workers`` children at work.

    Each child keeps what ``work`` opens (a session) from item to item. An exception becomes its last line in ``failure``. A
    `BoardError`, a crash, and a silence of ``timeout`` seconds cost the item one of its two tries.
    """
    reap()
    waiting, tries = deque(range(len(items))), [0] * len(items)
    done: dict[int, Outcome[Any]] = {}
    crew: list[_Worker] = []

    def settle(index: int, result: Any, failure: str, lost: bool) -> None:
        tries[index] += 1
        if lost and tries[index] < _TRIES:
            waiting.appendleft(index)
        else:
            done[index] = Outcome(result, failure)

    try:
        while len(done) < len(items):
            while waiting:
                worker = next((one for one in crew if one.index is None), None)
                if worker is None and len(crew) < workers:
                    crew.append(worker := _Worker(Child.start(partial(_labour, items, work))))
                if worker is None:
                    break
                worker.index, worker.deadline = waiting.popleft(), time.monotonic() + timeout
                worker.child.ask(worker.index)
            busy = [one for one in crew if one.index is not None]
            patience = max(min(one.deadline for one in busy) - time.monotonic(), 0.0)
            ready, _, _ = select.select([one.child.answers for one in busy], [], [], patience)
            for worker in busy:
                late = time.monotonic() >= worker.deadline
                if worker.child.answers not in ready and not late:
                    continue
                index, worker.index = worker.index, None
                assert index is not None
                message = receive(worker.child.answers, timeout) if worker.child.answers in ready else None
                if message is None:
                    crew.remove(worker)
                    settle(index, None, worker.child.end(), True)
                else:
                    settle(index, *message)
        return [done[index] for index in range(len(items))]
    finally:
        for worker in crew:
            # Killed in the midst of asking for a board, it would leave that board taken until its server notices, after 6 to 8 seconds.
            worker.child.leave(worker.deadline if worker.index is not None else None)


def _labour(items: Sequence[T], work: Callable[[T], Any], commands: int, answers: int) -> None:
    """The child: work on each item that it is asked for."""

    def answer(index: int) -> tuple[Any, str, bool]:
        try:
            return work(items[index]), "", False
        except Exception as error:
            return None, last_line(error), isinstance(error, BoardError)

    answer_each(commands, answers, answer)
