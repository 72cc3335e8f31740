"""A Ctrl-C that Python drops is raised at the next step of a run."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from autocomp.processes import interrupt
from autocomp.progress import Progress


class Stubborn:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def pythons_own_handlers() -> Iterator[None]:
    """As in a program that a shell starts in the foreground; in the background it ignores some of these signals."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupt_dropped_in_a_destructor_comes_at_the_next_step() -> None:
    progress = Progress()
    with interrupt.remembered(), progress.stage("work", 2) as stage:
        thing = Stubborn()
        del thing
        gc.collect()
        with pytest.raises(KeyboardInterrupt):
            stage.advance()
        stage.advance()  # said once
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_that_arrived_is_forgotten_afterwards() -> None:
    with pytest.raises(KeyboardInterrupt), interrupt.remembered():
        signal.raise_signal(signal.SIGINT)
    interrupt.check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_to_stop_say_how_a_shell_knows_them(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(interrupt.Stopped) as caught, interrupt.remembered():
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number
    assert interrupt.is_stop(caught.value)
    assert signal.getsignal(number) == before


def test_what_a_function_raises_by_itself_is_no_signal() -> None:
    with interrupt.remembered():
        assert not interrupt.is_stop(KeyboardInterrupt())
        assert not interrupt.is_stop(SystemExit())
    assert interrupt.is_stop(KeyboardInterrupt()), "nobody can tell whose it is"


def test_a_forked_child_dies_of_the_signal() -> None:
    with interrupt.remembered():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_handlers_of_the_program_are_left_alone() -> None:
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    with interrupt.remembered():
        signal.raise_signal(signal.SIGINT)
        interrupt.check()
    assert came == [signal.SIGINT]


def test_threads_do_not_handle_signals() -> None:
    faults: list[BaseException] = []

    def work() -> None:
        try:
            with interrupt.remembered():
                interrupt.check()
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not faults


def slow(seconds: float) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        time.sleep(0.01)


def test_a_limit_holds_where_what_it_raised_was_caught() -> None:
    with (
        pytest.raises(interrupt.OutOfTime, match=r"not done after 0\.05 s"),
        interrupt.limited(0.05),
        contextlib.suppress(BaseException),
    ):
        slow(5.0)
    with interrupt.limited(5.0):
        slow(0.01)


def test_a_limit_holds_in_another_thread_once_it_is_over() -> None:
    said: list[BaseException] = []

    def work() -> None:
        try:
            with interrupt.limited(0.05):
                slow(0.1)
        except interrupt.OutOfTime as error:
            said.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(said) == 1


def test_the_callers_own_alarm_rings_afterwards() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with interrupt.limited(10.0):
            slow(0.2)
            assert not rung
        slow(0.1)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
