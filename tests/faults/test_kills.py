"""A run that is killed wherever it writes, again and again, and goes on each time: nothing told is lost, doubled or half written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_task
from studies import told

from autocomp.api import SearchResult
from autocomp.records.run import read_run
from autocomp.records.table import read_evaluations

pytestmark = pytest.mark.slow
TESTS = Path(tiny_task.__file__).parent
# What every process of a run does first: die when it is about to put its n-th file in place. Its children count for themselves.
KILLED = """
import os, signal, sys
from autocomp.tuning.tune import Tuner
Tuner.__init__.__kwdefaults__["budget"] = 1
put, left = os.replace, [int(sys.argv[1])]
def replace(*args, **options):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return put(*args, **options)
os.replace = replace
from autocomp.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def start(spaces: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start or resume the run in ``tmp_path/run``; it dies at its n-th file (0: it does not)."""
    out = tmp_path / "run"

    def run(nth: int, *more: str, limit: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
        given = ["--resume"] if (out / "config.yaml").exists() else []
        options = ["--space", spaces["full"], "--trials", "6", "--measurements", "2", "--out", str(out), *given, *more]
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(nth), "search", "tiny_task:task", *options],
            cwd=TESTS, env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "AUTOCOMP_REFERENCES": "no"},
            capture_output=True, text=True, check=False, preexec_fn=limit,
        )  # fmt: skip

    return run


def test_killed_wherever_it_writes(start: Callable[..., Any], tmp_path: Path) -> None:
    out, before, kills = tmp_path / "run", {}, 0
    for nth in (2, 6):
        done = start(nth)
        if done.returncode == 0:
            break
        if done.returncode != -signal.SIGKILL:  # a process that it had forked died first
            assert done.returncode == 1, done.stderr
            assert "a worker process ended by itself" in done.stderr
        kills += 1
        now = told(out) if (out / "study.journal").exists() else {}
        assert {number: now[number] for number in before} == before, "what was told stays"
        before = now
        for path in out.rglob("*.json"):
            json.loads(path.read_text())  # the old content or the new
    assert kills == 2
    assert start(0).returncode == 0
    assert len(told(out)) == 6
    run = read_run(out)
    assert len(read_evaluations(out)) == run.summary.told == 6
    assert not [path for path in out.rglob(".*.*") if not path.name.endswith(".lock")], "what was half written is swept"
    for point in run.front:
        for file in point.files.values():
            assert (out / file).stat().st_size > 0
    assert len(SearchResult(out)) == len(run.front)


def test_memory_that_runs_out_is_one_message(start: Callable[..., Any], tmp_path: Path) -> None:
    """Too little for the run, enough to say so; and it goes on once there is more."""
    little = 2_600_000_000  # bytes of addresses: torch and TVM map two thirds of them before anything is done

    done = start(0, limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (little, little)))
    if done.returncode != 0:
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        assert [line for line in done.stderr.splitlines() if line.startswith("error:")], done.stderr[-3000:]
        assert start(0).returncode == 0
    assert len(told(tmp_path / "run")) == 6
