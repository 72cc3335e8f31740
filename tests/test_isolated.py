"""Work in a forked child: results come back, crashes and hangs cost one item each."""

from __future__ import annotations

import ctypes
import os
import time

from autocomp.kernels.isolated import attempt_each


def test_results_errors_crashes_and_hangs_are_one_item_each() -> None:
    def work(item: str) -> str:
        if item == "raise":
            raise ValueError("first line\nthe reason")
        if item == "crash":
            ctypes.string_at(0)
        if item == "exit":
            os._exit(3)
        if item == "hang":
            time.sleep(60)
        return item.upper()

    found = list(attempt_each(["a", "raise", "crash", "b", "exit", "hang", "c"], work, timeout=1.0))
    assert [item for item, _, _ in found] == ["a", "raise", "crash", "b", "exit", "hang", "c"]
    assert [result for _, result, _ in found] == ["A", None, None, "B", None, None, "C"]
    assert [failure for _, _, failure in found] == [
        "", "the reason", "it crashed with SIGSEGV", "", "its process ended with exit code 3", "it did not answer in time", "",
    ]  # fmt: skip


def test_closing_early_ends_the_child() -> None:
    answers = attempt_each([1, 2, 3], lambda item: (os.getpid(), item))
    _, (child, _), _ = next(answers)
    assert child != os.getpid()
    answers.close()
    try:
        os.kill(child, 0)
        alive = True
    except ProcessLookupError:
        alive = False
    assert not alive
