"""Work in forked processes: results in order, and what goes wrong there is raised here."""

from __future__ import annotations

import os

import pytest

from autocomp.errors import AutocompError
from autocomp.processes.pool import map_in_processes


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers):
    offset = 10  # inherited, not sent
    assert list(map_in_processes(lambda item: item + offset, [3, 1, 2], workers)) == [13, 11, 12]


def test_one_worker_needs_no_process():
    assert list(map_in_processes(lambda _: os.getpid(), [0, 1], 1)) == [os.getpid()] * 2
    assert os.getpid() not in list(map_in_processes(lambda _: os.getpid(), [0, 1], 2))


def test_an_error_in_a_process_is_raised_here():
    def fail(item: int) -> int:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 1"):
        list(map_in_processes(fail, [1, 2], 2))


class Particular(Exception):
    """As libraries have them: what it is made from is not what it keeps, so that it cannot be unpickled."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")


def test_an_error_that_cannot_be_sent_arrives_as_its_text():
    def fail(item: int) -> int:
        raise Particular(item, "no luck")

    with pytest.raises(AutocompError, match=r"Particular: no luck \(1\)"):
        list(map_in_processes(fail, [1, 2], 2))


def test_nothing_to_do():
    assert list(map_in_processes(str, [], 2)) == []
