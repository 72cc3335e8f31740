"""Searches that are killed, interrupted or run out of room lose nothing that was told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from places import TESTS
from studies import told

from autocomp.api import SearchResult
from autocomp.cli.main import main
from autocomp.errors import UsageError

TASK = "tiny_task:task"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_tuning")]


def _take_signals() -> None:
    """A shell lets processes in the background ignore SIGINT, and nohup SIGHUP, and their children after them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def process(spaces: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start ``autocomp search`` in a process of its own and wait until it has told some trials."""
    running: list[subprocess.Popen[str]] = []

    def start(trials: int, at_least: int, **environment: str) -> tuple[subprocess.Popen[str], Path]:
        out = tmp_path / "run"
        command = [
            sys.executable,
            "-m",
            "autocomp.cli.main",
            "search",
            TASK,
            "--space",
            spaces["full"],
            "--out",
            str(out),
        ]
        child = subprocess.Popen(
            [*command, "--trials", str(trials), "--measurements", "2"],
            cwd=TESTS,
            env={**os.environ, "PYTHONPATH": str(TESTS.parent), "AUTOCOMP_REFERENCES": "no", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_take_signals,
        )
        running.append(child)
        end = time.monotonic() + 120
        while len(told(out)) < at_least:
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < end, "the search told nothing in two minutes"
            time.sleep(0.005)
        return child, out

    yield start
    for child in running:
        child.kill()
        child.communicate()


@pytest.mark.usefixtures("without_exports")
def test_kill_and_resume_lose_and_double_nothing(
    process: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trials = 30  # more than are told while two other searches are refused, and nearly all that there are
    child, out = process(trials, at_least=4, TINY_SLEEP="0.3")  # slow metrics: the kill meets a search still at work
    config = (out / "config.yaml").read_text()
    assert main(["search", TASK, "--out", str(out)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["search", "--resume", "--out", str(out), "--trials", "99"]) == 2
    assert f"another search or training is running in {out}" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == config, "the refused search left the running one's settings alone"
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    before = told(out)
    assert 4 <= len(before) < trials, "killed in mid-search"
    assert not (out / "front.json").exists()
    assert main(["search", "--resume", "--out", str(out)]) == 0
    after = told(out)
    assert len(after) == trials
    assert {number: after[number] for number in before} == before
    candidates = [json.dumps(evaluation["candidate"], sort_keys=True) for evaluation in after.values()]
    assert len(set(candidates)) == trials
    result = SearchResult(out)
    assert result.run.summary.told == trials
    assert len(pd.read_csv(out / "evaluations.csv")) == trials


@pytest.mark.usefixtures("without_exports")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupt_is_one_line_and_can_be_resumed(number: int, code: int, process: Callable[..., Any]) -> None:
    trials = 30  # more than are told by the time the signal arrives
    child, out = process(trials, at_least=1, TINY_SLEEP="0.3")
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert line == f"error: stopped; every finished trial is kept: continue with --resume --out {out}"
    before = told(out)
    assert 1 <= len(before) < trials
    if number != signal.SIGINT:
        return
    assert main(["search", "--resume", "--out", str(out)]) == 0
    after = told(out)
    assert len(after) == trials
    assert {trial: after[trial] for trial in before} == before


@pytest.fixture
def little_room(mounted: Callable[..., Path]) -> Path:
    """A file system with little more room than a search asks for."""
    return mounted("size=1200k")


def test_disk_that_fills_up_ends_in_one_line(little_room: Path, small: Callable[..., SearchResult]) -> None:
    with pytest.raises(UsageError, match="disk is full"):
        small(out=little_room / "run", trials=2)
    assert not (little_room / "run/report.html").exists()
