"""Processes side by side: failures stay with their item, what is timed is alone, and kernels are tuned once, by the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from autocomp.errors import MismatchError
from autocomp.hardware.profile import Profile, load_profile
from autocomp.measurement.side_by_side import side_by_side
from autocomp.processes import child as children
from autocomp.processes.child import Child, reap
from autocomp.records.latency import How
from autocomp.tuning.store import KernelStore
from autocomp.tuning.timers import Job
from autocomp.tuning.tune import Tuner

Alone = Callable[[], None]


def nothing() -> None:
    """What the parent does meanwhile, here."""


def misbehave(item: str, alone: Alone) -> str:
    if item == "mismatch":
        raise MismatchError("layer 'a' differs")
    if item == "mistake":
        raise KeyError("b")
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    alone()
    if item == "crash alone":
        os.kill(os.getpid(), signal.SIGKILL)
    return item.upper()


def test_failures_stay_with_their_item() -> None:
    items = ["mismatch", "good", "crash", "crash alone", "mistake", "fine"]
    assert side_by_side(items, misbehave, {}, nothing) == [
        (None, "layer 'a' differs"),
        ("GOOD", ""),
        (None, "it crashed with SIGSEGV"),
        (None, "it crashed with SIGKILL"),
        (None, "KeyError: 'b'"),
        ("FINE", ""),
    ]


def test_a_result_that_cannot_be_sent_is_a_failure() -> None:
    ((result, why),) = side_by_side([1], lambda *_: lambda: None, {}, nothing)
    assert result is None
    assert why.startswith("its result cannot be sent: ")


def test_a_process_waits_for_no_children_of_its_parent() -> None:
    """What is let go here is not the forked process's to wait for, though it inherits the list."""
    slow, kept = (Child.start(lambda *_: time.sleep(0.5)) for _ in range(2))
    slow.leave(time.monotonic() + 60)

    def work(_item: int, _alone: Alone) -> str:
        reap()
        return kept.end()

    try:
        assert side_by_side([1], work, {}, nothing) == [("it is another process's child", "")]
    finally:
        kept.leave(time.monotonic() + 60)
        while slow.pid in children._leaving:
            time.sleep(0.01)
            reap()


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: os.waitpid(-1, os.WNOHANG)], ids=["ignored", "taken"])
def test_children_whose_end_another_noticed_first(handler: Any) -> None:
    """Where SIGCHLD is ignored, or a library waits for whatever ends, nothing is left to wait for."""
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        assert side_by_side([1, 2], lambda item, _: item, {}, nothing) == [(1, ""), (2, "")]
        child = Child.start(lambda *_: None)
        end = time.monotonic() + 30
        while _exists(child.pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert child.end() == "its process ended, nobody knows how"
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_who_asked_to_be_alone_is_alone() -> None:
    all_here = multiprocessing.get_context("fork").Barrier(3, timeout=60)

    def work(item: int, alone: Alone) -> tuple[float, float, float]:
        all_here.wait()  # which it would never pass if they ran one after the other
        time.sleep(0.05 * item)
        before = time.monotonic()
        alone()
        start = time.monotonic()
        time.sleep(0.05)
        return before, start, time.monotonic()

    found = [times for times, _ in side_by_side([1, 2, 3], work, {}, nothing) if times is not None]
    assert len(found) == 3
    together, starts, ends = zip(*found, strict=True)
    assert max(together) <= min(starts)
    assert all(end <= start for (_, end), (start, _) in pairwise(sorted(zip(starts, ends, strict=True))))


def test_what_a_meanwhile_raises_ends_the_processes() -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side([30.0], lambda seconds, _: time.sleep(seconds), {}, fail)


class CountingTimer:
    """Says that every schedule takes a millisecond; refuses kernels of ``refused`` columns."""

    how: How = "measured"

    def __init__(self, refused: int | None = None) -> None:
        self.refused = refused
        self.processes: set[int] = set()
        self.columns: list[int] = []

    def attempt(self, jobs: Sequence[Job]) -> list[tuple[float | None, str]]:
        self.processes.add(os.getpid())
        found: list[tuple[float | None, str]] = []
        for job in jobs:
            columns = int(job.function.params[-1].ty.shape[-1])
            self.columns.append(columns)
            found.append((None, "too wide") if columns == self.refused else (1e-3, ""))
        return found


def product(columns: int, profile: Profile) -> object:
    from tvm import te

    from autocomp.kernels import compute

    lanes = profile.lanes
    data = te.placeholder((4, 8), "float32", name="data")
    weight = te.placeholder((columns // lanes, 8, lanes), "float32", name="weight")
    return te.create_prim_func(
        [data, weight, compute.dense(data, weight, compute.DenseSpec.of((4, 8), columns, lanes))]
    )


@pytest.fixture
def profile() -> Profile:
    return load_profile("x86-64-v3")


def tune_of(columns: Sequence[int], tuner: Tuner, profile: Profile) -> list[tuple[float, int]]:
    return [(tuned.record.seconds, tuned.trials) for tuned in tuner.tune_all([product(c, profile) for c in columns])]


def test_kernels_are_tuned_once_by_the_parent(tmp_path: Path, profile: Profile) -> None:
    timer = CountingTimer()
    tuner = Tuner(profile, KernelStore.open(profile, tmp_path), timer, budget=1)
    tuner.peak("dense")
    timer.columns.clear()
    found = side_by_side(
        [(8, 16), (16, 24), (8,)], lambda item, _: tune_of(item, tuner, profile), {"here": tuner}, nothing
    )
    assert found == [([(1e-3, 0)] * 2, ""), ([(1e-3, 0)] * 2, ""), ([(1e-3, 0)], "")]
    assert sorted(timer.columns) == [8, 16, 24]
    assert timer.processes == {os.getpid()}
    assert tuner.tuned == 3


def test_a_kernel_that_cannot_be_tuned_fails_its_item_alone(tmp_path: Path, profile: Profile) -> None:
    tuner = Tuner(profile, KernelStore.open(profile, tmp_path), CountingTimer(refused=16), budget=1)
    (good, nobody), (bad, why) = side_by_side(
        [(8, 24), (8, 16)], lambda item, _: tune_of(item, tuner, profile), {"here": tuner}, nothing
    )
    assert good == [(1e-3, 0)] * 2
    assert not nobody
    assert bad is None
    assert "too wide" in why
