"""What the page says of trainings, from records alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fake_run

from autocomp.records.evaluation import untrained
from autocomp.records.recovery import Entrant, Recovery, RecoverySummary
from autocomp.records.run import Run, read_run, write_front
from autocomp.report.build import build_report
from autocomp.report.recovery import arrows, curves, rows


def trained(folder: Path) -> Run:
    """A finished run of which one point was trained."""
    fake_run.write_fake_run(folder)
    run = read_run(folder)
    name = run.task.objective
    point = next(p for p in run.front if p.evaluation.candidate != run.dense.evaluation.candidate)
    now = point.evaluation
    done = Recovery(
        before={**now.metrics, name: now.metrics[name] - 0.05}, recipe="default", learning_rate=1e-3, steps=30, seconds=4.0,
        weights="recovery/x.pt", losses=((0, 2.0), (15, 1.0)), readings=((0.0, now.metrics[name] - 0.05), (4.0, now.metrics[name])),
        frozen=("rnn.hidden",),
    )  # fmt: skip
    front = [replace(p, evaluation=replace(now, recovered=done)) if p is point else p for p in run.front]
    entrants = (
        Entrant(now.candidate.id, 0.3, (0.04, 0.01)),
        Entrant("0123456789", 0.9, (None,), "the loss was not finite"),
    )
    summary = RecoverySummary("default", "1.0e-03 (of 5)", 12.0, entrants, ("distil: 100%",), ("a note",))
    run = replace(run, front=tuple(front), recovery=summary)
    write_front(folder, run)
    return run


def test_records_of_a_training_read_back(tmp_path: Path) -> None:
    run = trained(tmp_path)
    assert read_run(tmp_path) == run


def test_an_arrow_leads_from_before_to_after(tmp_path: Path) -> None:
    run = trained(tmp_path)
    (point,) = [p.evaluation for p in run.front if p.evaluation.recovered]
    profile = next(iter(run.profiles))
    (before,), (arrow,) = arrows(run, [], profile)
    scale = 100.0 if run.task.unit == "%" else 1.0
    assert arrow["x"] == arrow["ax"]
    assert arrow["y"] == point.metrics[run.task.objective] * scale
    assert arrow["ay"] == untrained(point).metrics[run.task.objective] * scale
    assert point.candidate.id in before["customdata"]
    assert arrows(replace(run, front=(run.dense,)), [], profile) == ([], [])


def test_the_page_has_the_curves_and_who_was_trained(tmp_path: Path) -> None:
    run = trained(tmp_path)
    assert set(curves(run)) == {"recovery-loss", "recovery-metric"}
    first, second = rows(run)
    assert (first["front"], first["steps"], first["frozen"]) == (True, 30, "rnn.hidden")
    assert (second["front"], second["failure"], second["drops"]) == (False, "the loss was not finite", ["", ""])
    page = build_report(tmp_path).read_text()
    for words in ("What training regained", "the loss was not finite", "1.0e-03 (of 5)", "a note", ">trained<"):
        assert words in page


def test_a_run_without_trainings_says_nothing_of_them(tmp_path: Path) -> None:
    fake_run.write_fake_run(tmp_path)
    assert "What training regained" not in build_report(tmp_path).read_text()
