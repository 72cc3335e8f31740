"""Work in forked children: results come back, crashes and hangs cost one item each, and what is measured is alone."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from autocomp.processes import child as child_module
from autocomp.processes.alone import attempt_alone
from autocomp.processes.child import reap, receive, send


def misbehave(item: str) -> str:
    if item == "raise":
        raise ValueError("first line\nthe reason")
    if item == "crash":
        ctypes.string_at(0)
    if item == "exit":
        os._exit(3)
    if item == "hang":
        time.sleep(60)
    return item.upper()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("where", ["prepare", "measure"])
def test_results_errors_crashes_and_hangs_are_one_item_each(where: str, workers: int) -> None:
    items = ["a", "raise", "crash", "b", "exit", "hang", "c"]
    if where == "prepare":
        found = attempt_alone(items, misbehave, lambda _, prepared: prepared, workers, timeout=1.0)
    else:
        found = attempt_alone(items, lambda item: item, lambda item, _: misbehave(item), workers, timeout=1.0)
    assert [result for result, _ in found] == ["A", None, None, "B", None, None, "C"]
    assert [failure for _, failure in found] == [
        "", "the reason", "it crashed with SIGSEGV", "", "its process ended with exit code 3", "it did not answer in time", "",
    ]  # fmt: skip


def test_all_is_prepared_side_by_side_before_anything_is_measured_alone() -> None:
    def prepare(_: int) -> tuple[int, float]:
        time.sleep(0.05)
        return os.getpid(), time.monotonic()

    def measure(_: int, prepared: tuple[int, float]) -> tuple[int, float, float, float]:
        begun = time.monotonic()
        time.sleep(0.02)
        return *prepared, begun, time.monotonic()

    found = [result for result, _ in attempt_alone(range(4), prepare, measure, 2)]
    assert len({child for child, *_ in found}) == 2
    assert os.getpid() not in {child for child, *_ in found}
    assert max(prepared for _, prepared, _, _ in found) <= min(begun for _, _, begun, _ in found)
    spans = sorted((begun, ended) for _, _, begun, ended in found)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_the_children_end_without_being_waited_for() -> None:
    ((child, _),) = attempt_alone([0], lambda _: None, lambda *_: os.getpid())
    end = time.monotonic() + 5
    while alive(child) and time.monotonic() < end:
        reap()
    assert not alive(child)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def heeded() -> Iterator[None]:
    """Python's own handler of Ctrl-C, which it lacks where a shell started it in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_during_a_fork_is_not_lost() -> None:
    """Python ignores what the hooks after a fork raise; a signal that arrives meanwhile, in whichever thread, waits until they are through."""
    hooks, over = [], threading.Event()
    armed = True

    def hook() -> None:
        if armed:
            os.kill(os.getpid(), signal.SIGINT)
            hooks.append("went on")

    os.register_at_fork(after_in_parent=hook)
    other = threading.Thread(target=over.wait)  # which the signal may be delivered to
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            attempt_alone([0], lambda _: None, lambda *_: None)
    finally:
        armed = False
        over.set()
        other.join()
    assert hooks == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_more_files_than_select_can_watch() -> None:
    """A process with more than 1,024 open files, as one that maps a data set has, hears its children all the same."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    high = 2000
    assert hard > high, "this machine allows too few open files to test it"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, high + 1), hard))
    reader, writer = os.pipe()
    try:
        os.dup2(reader, high)
        send(writer, "heard")
        assert receive(high, 5.0) == "heard"
        assert receive(high, 0.01) is None
        os.close(high)
    finally:
        os.close(reader)
        os.close(writer)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_pause_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that was stopped for longer than it may be silent, and its parent with it, answers after all."""
    reader, writer = os.pipe()
    left = child_module._Left(1.5)
    waiting = select.poll()
    waiting.register(reader, select.POLLIN)
    now = [0.0]

    class Paused:
        """Ctrl-Z, and back an hour later; only then the child gets to answer."""

        def poll(self, _milliseconds: float) -> list[Any]:
            if now[0]:
                os.write(writer, b"x")
            now[0] += 3600.0
            return waiting.poll(0)

    monkeypatch.setattr(child_module.time, "monotonic", lambda: now[0])
    assert left.poll(Paused())  # type: ignore[arg-type]
