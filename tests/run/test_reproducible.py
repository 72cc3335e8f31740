"""A deterministic search is a function of its seed, its settings and the kernel times stored when it began."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task

import autocomp
from autocomp.errors import InfeasibleError, UsageError
from autocomp.measurement.measurer import Measurer
from autocomp.records.evaluation import Evaluation
from autocomp.records.table import read_evaluations
from autocomp.run import explore, prepare_task, tell

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_tuning", "without_exports")]


def told(out: Path) -> list[tuple[Any, ...]]:
    """Everything about the trials of a run but what was measured of their time."""
    return [
        (e.trial, e.candidate.id, e.source, e.state, e.error, e.kl, dict(e.metrics), dict(e.predicted), e.bytes)
        for e in read_evaluations(out)
    ]


def test_same_seed_same_trials(tmp_path: Path, spaces: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def search(name: str, cache: str, **options: Any) -> Path:
        monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path / cache))
        out = tmp_path / name
        given = {"space": spaces["wide"], "trials": 20, "measurements": 4, "references": False, "deterministic": True}
        autocomp.search(task=tiny_task.task(), out=out, **given, **options)
        return out

    search("fills", "first")
    for copy in ("second", "third"):
        shutil.copytree(tmp_path / "first", tmp_path / copy)
    one = told(search("one", "second"))
    for module in (explore, prepare_task, tell):
        monkeypatch.setattr(module, "cores", lambda: 1)
    assert told(search("two", "third")) == one
    assert sum(row[3] == "measured" for row in one) > 4
    assert len({row[1] for row in one}) == len(one) == 20


def test_goals_follow_no_clock(tmp_path: Path, spaces: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The uncompressed model is timed in a slow moment of the machine, once: what is tried and measured stays the same."""
    dense = Measurer.measure_dense

    def search(name: str, cache: str, factor: float) -> Path:
        def slow(self: Measurer, evaluation: Evaluation) -> Evaluation:
            found = dense(self, evaluation)
            latency = {p: replace(its, seconds=its.seconds * factor) for p, its in found.latency.items()}
            self.dense_seconds = {p: its.seconds for p, its in latency.items()}
            return replace(found, latency=latency)

        monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path / cache))
        monkeypatch.setattr(Measurer, "measure_dense", slow)
        given = {"space": spaces["wide"], "trials": 24, "measurements": 6, "references": False, "deterministic": True}
        goals = {"max_latency": "1.3x", "max_drop": 0.2, "sampler": "tpe"}
        with suppress(InfeasibleError):
            autocomp.search(task=tiny_task.task(), out=tmp_path / name, **given, **goals)
        return tmp_path / name

    search("fills", "first", 1.0)
    for copy in ("second", "third"):
        shutil.copytree(tmp_path / "first", tmp_path / copy)
    assert told(search("one", "second", 1.0)) == told(search("two", "third", 3.0))


def test_a_clock_and_determinism_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="deterministic"):
        autocomp.search(task=tiny_task.task(), out=tmp_path / "run", deterministic=True, minutes=1.0)
    assert not (tmp_path / "run").exists()
