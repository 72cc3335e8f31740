"""Work that compiles much and times little, side by side: one process for each item, and quiet for each that is timed.

A process asks its parent for two things: to have kernels tuned, and to be alone. Both are granted when every process waits for something, so
nothing is ever timed beside another's work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from autocomp.errors import AutocompError, last_line
from autocomp.processes.child import Child, receive, send
from autocomp.processes.outcome import Outcome
from autocomp.tuning.tune import Tuner

Item = TypeVar("Item")
Result = TypeVar("Result")

_PATIENCE = 900.0  # seconds within which a process asks for something, or is done


def side_by_side(
    items: Sequence[Item],
    work: Callable[[Item, Callable[[], None]], Result],
    tuners: Mapping[str, Tuner],
    meanwhile: Callable[[], object],
) -> list[Outcome[Result]]:
    """Call ``work(item, alone)`` in a forked process for each item; return its result and "", or None and why there is none.

    Once ``work`` has called ``alone`` it has the machine for itself until it returns. What ``tuners`` must tune is tuned by those of this
    process, for all items at once. ``meanwhile`` is called here while the others start.
    """
    children = [Child.start(partial(_serve, item, work, tuners)) for item in items]
    results: dict[int, Outcome[Result]] = {}
    waiting: dict[int, tuple[str, Sequence[Any]]] = {}  # the tuner's name and functions to tune; "" asks to be alone
    try:
        meanwhile()
        while len(results) < len(items):
            for index, child in enumerate(children):
                if index not in results and index not in waiting:
                    said = receive(child.answers, _PATIENCE)
                    if said is None:
                        results[index] = Outcome(None, child.end())
                    elif "asked" in said:
                        waiting[index] = said["asked"]
                    else:
                        results[index] = said["done"]
                        child.end()  # the end of a large process is work, too
            served = [index for index, (tuner, _) in waiting.items() if tuner] or list(waiting)[:1]
            _tune([waiting[index] for index in served], tuners)
            for index in served:
                del waiting[index]
                children[index].ask("go on")
        return [results[index] for index in range(len(items))]
    finally:
        for child in children:
            child.leave()


def _tune(wanted: Sequence[tuple[str, Sequence[Any]]], tuners: Mapping[str, Tuner]) -> None:
    """Tune what several ask for, together; a kernel that cannot be tuned is reported by the process that needs it."""
    for name, tuner in tuners.items():
        asked = [functions for whose, functions in wanted if whose == name]
        try:
            tuner.fill([function for functions in asked for function in functions])
        except Exception:
            for functions in asked:
                with suppress(Exception):
                    tuner.fill(functions)


def _serve(
    item: Item,
    work: Callable[[Item, Callable[[], None]], Result],
    tuners: Mapping[str, Tuner],
    commands: int,
    answers: int,
) -> None:
    """The child: do the work, asking for what disturbs others."""
    import torch

    torch.set_num_threads(1)

    def ask(tuner: str = "", functions: Sequence[Any] = ()) -> None:
        send(answers, {"asked": (tuner, functions)})
        if receive(commands) is None:
            os._exit(1)  # nobody is there any more

    for name, tuner in tuners.items():
        tuner.elsewhere = partial(ask, name)
    try:
        done: Outcome[Result] = Outcome(work(item, ask))
    except AutocompError as error:
        done = Outcome(None, str(error))
    except Exception as error:
        done = Outcome(None, f"{type(error).__name__}: {last_line(error)}")
    try:
        send(answers, {"done": done})
    except Exception as error:
        send(answers, {"done": Outcome(None, f"its result cannot be sent: {last_line(error)}")})
