"""Coarse to fine: which widths come to be offered, and that a search which is stopped and resumed goes on with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import yaml
from hypothesis import given
from hypothesis import strategies as st

import autocomp
from autocomp.records.table import read_evaluations
from autocomp.run import finer
from autocomp.run.finer import between
from autocomp.run.folder import STUDY
from autocomp.run.found import OFFERED
from autocomp.study.storage import JOURNAL, read_study

pytestmark = pytest.mark.slow
EVERY = tuple(range(64, 0, -4))


def test_halfway_to_the_next_on_either_side() -> None:
    offered = (64, 48, 32, 16)
    assert between(offered, EVERY, {32}) == (64, 48, 40, 32, 24, 16)
    assert between(offered, EVERY, {64}) == (64, 56, 48, 32, 16)
    assert between(offered, EVERY, {16}) == (64, 48, 32, 24, 16)
    assert between(offered, EVERY, set()) == offered
    assert between((*offered, 0), (*EVERY, 0), {0, 16}) == (64, 48, 32, 24, 16, 0), (
        "a branch left out is no width between"
    )


@given(st.sets(st.sampled_from(EVERY), min_size=2), st.data())
def test_every_width_comes_in_the_end(offered: set[int], data: st.DataObject) -> None:
    offered |= {64}
    used = data.draw(st.sets(st.sampled_from(sorted(offered))))
    once = between(sorted(offered, reverse=True), EVERY, used)
    assert set(once) >= offered
    assert list(once) == sorted(once, reverse=True)
    now = once
    for _ in EVERY:
        now = between(now, EVERY, set(now))
    assert now == tuple(width for width in EVERY if width >= min(offered))


def _space(folder: Path, refine: bool) -> str:
    path = folder / "space.yaml"
    rule = {"layers": "*", "keep": [1.0, 0.5], "ranks": [0.5, 0.25], "precisions": ["fp32", "w8a8"]}
    path.write_text(yaml.safe_dump({"format_version": 1, "rules": [rule], "refine": refine, "step": 2}))
    return str(path)


def recorded(out: Path) -> Mapping[str, Any]:
    """What the study of a run says of itself."""
    found = read_study(f"{JOURNAL}{out / STUDY}", "autocomp")
    assert found is not None
    return found.attrs


def _search(out: Path, space: str, **options: Any) -> autocomp.api.SearchResult:
    given = {"trials": 24, "measurements": 2, "references": False, "deterministic": True, **options}
    return autocomp.search(task=tiny_task.task(), out=out, space=space, **given)


@pytest.mark.usefixtures("short_tuning")
def test_a_search_comes_to_widths_between_and_goes_on_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finer, "FILES", 4.0)
    space = _space(tmp_path, refine=True)
    out = _search(tmp_path / "run", space).folder
    told = read_evaluations(out)
    study = recorded(out)
    offered, every = study[OFFERED]["widths"], study["space"]
    first = {name: {widths[0], *(w for w in widths if 2 * w == widths[0])} for name, widths in offered.items()}
    later = [e for e in told if any(w not in first[name] for name, w in e.candidate.widths.items())]
    assert later
    assert min(e.trial for e in later) >= 24 // 4, "the first pass is coarse"
    for e in told:
        assert all(w in offered[name] for name, w in e.candidate.widths.items())
        assert all(str(m) in every["methods"][name] for name, m in e.candidate.methods.items())
    assert all(set(offered[name]) <= set(every["widths"][name]) for name in offered)

    result = _search(out, space, resume=True, trials=30)
    again = read_evaluations(out)
    assert [e.candidate.id for e in again[: len(told)]] == [e.candidate.id for e in told]
    assert len(again) == 30
    for point in result.front:
        assert point.load() is not None


@pytest.mark.usefixtures("short_tuning", "without_exports")
def test_a_run_that_began_without_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finer, "FILES", 4.0)
    out = _search(tmp_path / "run", _space(tmp_path, refine=False), trials=12).folder
    _search(out, _space(tmp_path, refine=True), resume=True, trials=20)
    study = recorded(out)
    assert OFFERED not in study
    assert all(set(e.candidate.widths.values()) <= {4, 5, 8, 16, 32, 64} for e in read_evaluations(out)), "as at first"


@pytest.mark.usefixtures("short_tuning", "without_exports")
def test_another_sampler_has_the_widths_of_the_file(tmp_path: Path) -> None:
    out = _search(tmp_path / "run", _space(tmp_path, refine=True), sampler="random", trials=12).folder
    study = recorded(out)
    assert OFFERED not in study
    assert all(len(widths) <= 2 for widths in study["space"]["widths"].values())
