"""How time is taken: the statistics, the turns, and that the process is left as it was found."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest

from autocomp.hardware import timing
from autocomp.hardware.timing import interleaved, median_and_spread, quiet_core, steady
from autocomp.records.latency import Latency


def test_median_and_spread() -> None:
    middle, spread = median_and_spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert middle == 3.0
    assert spread == pytest.approx((4.0 - 2.0) / 3.0)
    assert median_and_spread([5.0]) == (5.0, 0.0)
    assert median_and_spread([0.0, 0.0]) == (0.0, 0.0)


def test_functions_take_turns() -> None:
    calls: list[str] = []

    def called(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    samples = interleaved(
        {"a": lambda: called("a", 1e-3), "b": lambda: called("b", 3e-3)}, repeats=4, seconds=1e-3, warm_up=1
    )
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4}
    assert all(1e-3 <= value < 0.1 for value in samples["a"])
    assert all(3e-3 <= value < 0.1 for value in samples["b"])
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    assert turns == ["a", "b"] * 5, "warm-up of each, then four rounds in turn"


def test_samples_average_over_enough_calls() -> None:
    count = 0

    def quick() -> None:
        nonlocal count
        count += 1

    (values,) = interleaved({"quick": quick}, repeats=2, seconds=2e-3, warm_up=1).values()
    assert count > 1000
    assert all(0 < value < 1e-5 for value in values)


@pytest.mark.parametrize("collecting", [True, False])
def test_quiet_core_restores_what_it_changes(collecting: bool) -> None:
    allowed, enabled = os.sched_getaffinity(0), gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        with quiet_core():
            assert os.sched_getaffinity(0) == {max(allowed)}
            assert not gc.isenabled()
        assert os.sched_getaffinity(0) == allowed
        assert gc.isenabled() == collecting
        with pytest.raises(ZeroDivisionError), quiet_core():
            _ = 1 / 0
        assert os.sched_getaffinity(0) == allowed
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if enabled else gc.disable)()


def test_one_measurement_at_a_time() -> None:
    events: list[str] = []
    inside = threading.Event()

    def other() -> None:
        inside.wait(10)
        with quiet_core(device="test"):
            events.append("second")

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    with quiet_core(device="test"):
        inside.set()
        time.sleep(0.1)
        events.append("first")
    thread.join()
    assert events == ["first", "second"]


def latencies(*spreads: float) -> list[Latency]:
    return [Latency(1.0, spread, "measured", "x86-host") for spread in spreads]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `steady` slept, without sleeping; a host that takes nothing."""
    slept: list[float] = []
    monkeypatch.setattr(timing, "PAUSES", (1.0, 2.0))
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    monkeypatch.setattr(timing, "_ticks", lambda: (0, 100))
    return slept


def test_a_steady_measurement_is_taken_once(pauses: list[float]) -> None:
    assert steady(lambda: latencies(0.01, 0.02)) == latencies(0.01, 0.02)
    assert sum(pauses) == 0


def test_a_disturbed_one_is_repeated_and_the_steadiest_kept(pauses: list[float]) -> None:
    takes = iter([latencies(0.3, 0.02), latencies(0.01, 0.06), latencies(0.08, 0.08)])
    assert steady(lambda: next(takes)) == latencies(0.01, 0.06)
    assert sum(pauses) == 3.0


def test_what_stays_disturbed_is_noisy(pauses: list[float]) -> None:
    assert [latency.noisy for latency in steady(lambda: latencies(0.3, 0.02))] == [True, False]


def test_a_machine_whose_host_takes_its_time_is_noisy(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([(0, 0), (50, 100), (50, 100), (90, 200), (90, 200), (110, 300)])
    monkeypatch.setattr(timing, "_ticks", lambda: next(ticks))
    assert [latency.noisy for latency in steady(lambda: latencies(0.01, 0.01))] == [True, True]


def test_ticks_of_this_machine_grow() -> None:
    stolen, passed = timing._ticks()
    assert 0 <= stolen <= passed
    assert timing._stolen((0, 0), (0, 0)) == 0.0
