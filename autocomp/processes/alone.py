"""Run risky work in a forked child, so that a kernel that crashes or hangs costs one trial and not the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from autocomp.errors import last_line
from autocomp.processes.child import Child, answer_each, reap, receive, send
from autocomp.processes.outcome import Outcome

T = TypeVar("T")
P = TypeVar("P")


def attempt_alone(
    items: Sequence[T],
    prepare: Callable[[T], P],
    measure: Callable[[T, P], Any],
    workers: int = 1,
    timeout: float = 60.0,
) -> list[Outcome[Any]]:
    """Return ``(result, failure)`` of each item: ``measure(item, prepare(item))``, in forked children.

    All that is prepared is prepared first, by so many children at once; then one item after the other is measured, with nothing else
    at work. An exception becomes its last line in ``failure``; a crash or a silence of ``timeout`` seconds becomes a failure of that item,
    and new children do what the lost one had left.
    """
    reap()
    results: dict[int, Outcome[Any]] = {}
    while left := [index for index in range(len(items)) if index not in results]:
        shares = [left[k::workers] for k in range(min(workers, len(left)))]
        children: list[Child] = []
        try:
            children += (Child.start(partial(_serve, items, share, prepare, measure)) for share in shares)
            ready = {
                index: child
                for child, share in zip(children, shares, strict=True)
                for index in _prepared(child, share, results, timeout)
            }
            for index in sorted(ready):
                child = ready[index]
                if child.gone:
                    continue
                child.ask(index)
                answer = receive(child.answers, timeout)
                results[index] = Outcome(None, child.end()) if answer is None else answer
        finally:
            for child in children:
                child.leave()
    return [results[index] for index in range(len(items))]


def _prepared(child: Child, share: list[int], results: dict[int, Outcome[Any]], timeout: float) -> list[int]:
    """Wait until a child has prepared its share; note what failed, return what can be measured."""
    ready = []
    for index in share:
        failure = receive(child.answers, timeout)
        if failure is None:
            results[index] = Outcome(None, child.end())
            return []
        if failure:
            results[index] = Outcome(None, failure)
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
    """The child: prepare its share, then measure what it is told to."""
    prepared: dict[int, P] = {}
    for index in share:
        failure = ""
        try:
            prepared[index] = prepare(items[index])
        except Exception as error:
            failure = last_line(error)
        send(answers, failure)

    def answer(index: int) -> Outcome[Any]:
        try:
            return Outcome(measure(items[index], prepared.pop(index)))
        except Exception as error:
            return Outcome(None, last_line(error))

    answer_each(commands, answers, answer)
