"""A deterministic search is a function of its seed, its settings and the kernel times stored when it began."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_task

import autocomp
from autocomp.errors import UsageError
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


def test_a_clock_and_determinism_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="deterministic"):
        autocomp.search(task=tiny_task.task(), out=tmp_path / "run", deterministic=True, minutes=1.0)
    assert not (tmp_path / "run").exists()
