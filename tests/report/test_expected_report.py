"""The report's section of what was expected of a run and what came of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_run import PROFILE, make_run, write_fake_run

from autocomp.errors import CorruptError
from autocomp.records.expected import Expected, ExpectedPoint
from autocomp.records.run import read_run, speedup, write_front
from autocomp.report.build import build_report, render
from autocomp.report.expected import expected_and_found


def test_found_is_the_fastest_measured_that_diverges_no_more() -> None:
    run, told = make_run()
    shown = expected_and_found(run, told)
    assert shown is not None
    assert run.expected is not None
    dense = run.dense.evaluation
    for point, row in zip(run.expected.points, shown["points"], strict=True):
        near = [
            speedup(e, dense, PROFILE)
            for e in told
            if e.state == "measured" and e.source != "dense" and e.kl is not None and e.kl <= point.divergence
        ]
        cell = row["profiles"][0]
        assert cell["found"] == f"{max([1.0, *near]):.2f}×"
        assert cell["expected"] == f"{point.speedup[PROFILE]:.2f}×"
    assert len({row["profiles"][0]["found"] for row in shown["points"]}) > 2, "or this says little"


@pytest.mark.parametrize(("factor", "error"), [(1.0, "0 %"), (2.0, "100 %")])
def test_predictions_are_held_against_what_was_measured(factor: float, error: str) -> None:
    run, told = make_run()
    dense = run.dense.evaluation
    measured = [e for e in told if e.state == "measured" and e.source != "dense"]
    known = {
        e.candidate.id: ExpectedPoint({PROFILE: factor * speedup(e, dense, PROFILE)}, 1, factor * (e.kl or 0.0))
        for e in measured
    }
    kept = Expected((), {}, 300, 24, {PROFILE: None}, {}, known)
    shown = expected_and_found(replace(run, expected=kept), told)
    assert shown is not None
    for row in shown["agreement"]:
        assert (row["spearman"], row["error"], row["count"]) == ("1.00", error, str(len(measured)))
    # what was not known, or not kept, is a dash and no zero
    assert [part["expected"] for part in shown["parts"]] == ["–", "–", "–"]
    assert [part["spent"] for part in shown["parts"]] == ["–", "–", "–"]


def test_seconds_stand_with_what_was_asked_and_done() -> None:
    run, told = make_run()
    shown = expected_and_found(run, told)
    assert shown is not None
    searched = sum(e.state == "measured" and e.source not in ("dense", "uniform") for e in told)
    assert [tuple(row.values()) for row in shown["parts"]] == [
        ("until the first trial", "–", "99 s", ""),  # over when anything was expected: no guess
        ("300 trials", "60 s", "75 s", f"{run.summary.told} told"),
        ("24 measurements", "40 s", "48 s", f"{searched} measured"),
    ]


def test_the_page_has_the_section_where_something_was_kept() -> None:
    run, told = make_run(profiles=("x86-host", "x86-64-v3"))
    page = render(run, told)
    assert "Expected and found" in page
    assert "expected on x86-64-v3" in page
    assert "off by 11 %" in page
    assert "Expected and found" not in render(replace(run, expected=None), told)


def test_a_record_that_is_no_record_is_named(tmp_path: Path) -> None:
    run, _ = make_run()
    path = write_front(tmp_path, run)
    assert read_run(tmp_path).expected == run.expected
    data = json.loads(path.read_text())
    del data["checksum"]
    data["expected"] = {"points": 3}
    path.write_text(json.dumps(data))
    with pytest.raises(CorruptError, match=r"front\.json has format_version 1 but not its content"):
        read_run(tmp_path)


def test_settings_that_were_chosen_say_so(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path)
    config = folder / "config.yaml"
    config.write_text(config.read_text() + "auto:\n  trials: 97 parameters\n")
    page = build_report(folder).read_text(encoding="utf-8")
    assert "<dt>trials</dt><dd>300, chosen automatically: 97 parameters</dd>" in page
    assert "<dt>space</dt><dd>default</dd>" in page
