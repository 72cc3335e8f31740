"""Energy by the processor's counters, from a tree as Linux shows them, and what a search makes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch

import autocomp
from autocomp.errors import UsageError
from autocomp.hardware import energy
from autocomp.hardware.energy import Counters, energies, power

IDLE, BUSY = 5.0, 20.0  # watts: of the machine left alone, and what a second of work on a core adds
MOST = 10**12  # microjoules


def package(root: Path, number: int = 0, drawn: int = 0, most: int = MOST) -> Path:
    place = root / f"intel-rapl:{number}"
    place.mkdir(parents=True)
    (place / "name").write_text(f"package-{number}\n")
    (place / "energy_uj").write_text(f"{drawn}\n")
    (place / "max_energy_range_uj").write_text(f"{most}\n")
    part = root / f"intel-rapl:{number}:0"
    part.mkdir()
    (part / "name").write_text("core\n")
    (part / "energy_uj").write_text("123456789\n")
    (part / "max_energy_range_uj").write_text(f"{most}\n")
    return place


class Machine:
    """A clock, and a package's counter that goes by it: stands for the module ``time``, and writes the tree."""

    def __init__(self, root: Path) -> None:
        self.place, self.now, self.drawn = package(root), 0.0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float, watts: float = IDLE) -> None:
        self.now += seconds
        self.drawn += watts * seconds
        (self.place / "energy_uj").write_text(f"{round(1e6 * self.drawn)}\n")

    def work(self, seconds: float) -> None:
        self.sleep(seconds, IDLE + BUSY)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path / "powercap")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    monkeypatch.setattr(energy, "time", machine)
    return machine


def counters(root: Path | None = None) -> Counters:
    found = Counters.open(root)
    assert found is not None
    return found


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    first, second = package(tmp_path, 0, 1_000_000), package(tmp_path, 1, 5_000_000)
    (tmp_path / "intel-rapl").mkdir()
    found = counters(tmp_path)
    assert found.joules() == 0.0
    (first / "energy_uj").write_text("3500000\n")
    (second / "energy_uj").write_text("6000000\n")
    assert found.joules() == pytest.approx(3.5)
    assert found.joules() == pytest.approx(3.5)


def test_a_counter_that_runs_over_goes_on(tmp_path: Path) -> None:
    place = package(tmp_path, drawn=9_000_000, most=10_000_000)
    found = counters(tmp_path)
    (place / "energy_uj").write_text("500000\n")
    assert found.joules() == pytest.approx(1.5)


@pytest.mark.parametrize("spoil", ["energy_uj", "max_energy_range_uj", "name"])
def test_what_cannot_be_read_is_not_there(spoil: str, tmp_path: Path) -> None:
    (package(tmp_path) / spoil).unlink()
    assert Counters.open(tmp_path) is None
    assert Counters.open(tmp_path / "none") is None


def test_other_domains_are_no_packages(tmp_path: Path) -> None:
    (package(tmp_path) / "name").write_text("psys\n")
    assert Counters.open(tmp_path) is None


def test_what_one_call_draws_is_told_above_the_idle_machine(machine: Machine) -> None:
    calls = [partial(machine.work, 0.01), partial(machine.sleep, 0.01), partial(machine.work, 5.0)]
    found = energies(calls, counters())
    assert [one.joules for one in found] == pytest.approx([0.01 * BUSY, 0.0, 5.0 * BUSY], abs=1e-5)
    assert all(one.spread < 1e-3 for one in (found[0], found[2]))


def test_power_is_told_as_a_profile_states_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "mm", lambda *_: machine.work(0.001))
    assert power(counters(), cores=2) == pytest.approx({"idle": IDLE, "load": IDLE + BUSY, "cores": 2})


@pytest.mark.slow
@pytest.mark.usefixtures("short_tuning")
def test_a_search_counts_what_its_front_draws(
    tmp_path: Path, spaces: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    monkeypatch.setattr(energy, "SECONDS", 0.5)
    options: dict[str, Any] = {"trials": 8, "measurements": 2, "references": False, "max_energy": 1.0}
    with drawing(package(tmp_path / "powercap")):
        found = autocomp.search(task=tiny_task.task(), out=tmp_path / "run", space=spaces["full"], **options)
    for point in (found.dense, *found.front):
        latency = point.record.evaluation.latency["x86-host"]
        assert latency.watts is not None
        assert latency.joules is not None
        assert latency.watts > 0
        assert latency.energy == latency.joules
    report = (tmp_path / "run/report.html").read_text()
    assert "energy of one inference on x86-host, counted" in report
    assert "Energy of an inference: " in report


@contextmanager
def drawing(place: Path) -> Iterator[None]:
    """Keep a package's counter at what a machine would have drawn on which this process alone works."""
    done = threading.Event()

    def write() -> None:
        part = place / "part"
        while not done.wait(0.002):
            part.write_text(f"{int(1e6 * (IDLE * time.perf_counter() + BUSY * time.process_time()))}\n")
            part.replace(place / "energy_uj")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_energy_is_no_goal_where_nothing_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    with pytest.raises(UsageError, match="let its counters be read"):
        autocomp.search(task=tiny_task.task(), out=tmp_path / "run", max_energy="2x")
    assert not (tmp_path / "run").exists()
