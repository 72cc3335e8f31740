"""A run that has paid is never lost: what fails, fails at the start with one message, or alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_task
from studies import told
from torch import Tensor, nn

import autocomp
from autocomp.api import SearchResult
from autocomp.compiler.build import CompiledModel
from autocomp.errors import UsageError
from autocomp.export import files as export
from autocomp.hardware import link
from autocomp.layers.w8a8 import QuantConv2d
from autocomp.progress import Progress
from autocomp.records.candidate import Candidate
from autocomp.report import build
from autocomp.run import finish, start

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_tuning")]


def _quantised(net: nn.Module) -> bool:
    return any(isinstance(module, QuantConv2d) for module in net.modules())


def refuse(*_: object, **__: object) -> Any:
    raise TypeError("not today")


# --- at the start -----------------------------------------------------------------------------------------------------


class Drawn(tiny_task.TinyNet):
    """A network whose dropout never ends."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, training=True)


def metric_raises(task: autocomp.Task, _patch: pytest.MonkeyPatch) -> None:
    task.evaluate = refuse


def metric_is_nan(task: autocomp.Task, _patch: pytest.MonkeyPatch) -> None:
    task.evaluate = lambda _: {"accuracy": float("nan")}


def metric_exits(task: autocomp.Task, _patch: pytest.MonkeyPatch) -> None:
    def leave(_: nn.Module) -> dict[str, float]:
        raise SystemExit(3)

    task.evaluate = leave


def model_is_random(task: autocomp.Task, _patch: pytest.MonkeyPatch) -> None:
    task.model = Drawn().eval()


def linker_is_missing(_task: autocomp.Task, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(link, "find_linker", lambda _architecture: None)


def page_fails(_task: autocomp.Task, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(build, "render", refuse)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (metric_raises, "Task.evaluate raised TypeError: not today"),
        (metric_is_nan, "must return finite metrics, but 'accuracy' is nan"),
        (metric_exits, "Task.evaluate raised SystemExit: 3"),
        (model_is_random, "random"),
        (linker_is_missing, r"cannot be handed over \(so\), so no search is begun: no linker"),
        (page_fails, "the report cannot be made here: TypeError: not today"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_would_fail_at_the_end_is_refused_at_the_start(
    spoil: Callable[[autocomp.Task, pytest.MonkeyPatch], None],
    words: str,
    small: Callable[..., SearchResult],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    task = tiny_task.task()
    spoil(task, monkeypatch)
    with pytest.raises(UsageError, match=words):
        small(task)
    assert not (tmp_path / "run" / "layers").exists(), "nothing dear was begun"


# --- on the way, and at the end ---------------------------------------------------------------------------------------


def test_whatever_fails_on_the_way_the_run_ends_with_its_report(
    spaces: dict[str, str], small: Callable[..., SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny_task.task()
    honest = task.evaluate
    faults = iter(["raise", "exit", "nan", "names", "none"])

    def evaluate(net: nn.Module) -> Any:
        fault = (
            next(faults, "") if len(seen) > 2 else ""
        )  # before anything is searched: the exported form twice, the model as given
        seen.append(fault)
        if fault == "raise":
            raise ValueError("first line\nno such label: 7")
        if fault == "exit":
            raise SystemExit("enough")
        if fault == "nan":
            return {**honest(net), "accuracy/upright": float("nan")}
        if fault == "names":
            return {"accuracy": 1.0}
        return None if fault == "none" else honest(net)

    seen: list[str] = []
    task.evaluate, task.test = evaluate, refuse
    task.model.shortcut = lambda x: x  # type: ignore[assignment]  # what no pickle takes
    monkeypatch.setattr(export, "export_onnx", refuse)
    monkeypatch.setattr("autocomp.measurement.references.export_onnx", refuse)
    result = small(task, space=spaces["wide"], measurements=3, trials=10, references=True)
    rows = pd.read_csv(result.folder / "evaluations.csv")
    failed = set(rows.loc[rows["state"] == "failed", "failure"])
    expected = [
        "Task.evaluate raised ValueError: no such label: 7",
        "Task.evaluate raised SystemExit: enough",
        "Task.evaluate must return finite metrics, but 'accuracy/upright' is nan",
        "Task.evaluate must return the metrics of the uncompressed model (accuracy, accuracy/upright), got accuracy",
        "Task.evaluate must return a mapping {metric: value} with an entry, got None",
    ]
    assert failed == set(expected)
    assert result.run.summary.failed == len(expected)
    assert result.front
    for point in result.front:
        checks = point.record.verified
        assert checks["so"].ok
        assert (checks["onnx"].ok, checks["onnx"].note) == (False, "TypeError: not today")
        assert set(point.record.files) == {"so", "manifest"} | ({"weights"} if "weights" not in checks else set())
        assert point.test_metrics == {}
    said = result.run.warnings
    assert any("has no test metrics: Task.test raised TypeError: not today" in text for text in said)
    assert any("no model of this run will have its onnx file" in text for text in said)
    assert any("ONNX Runtime fp32 could not be measured as a reference: TypeError" in text for text in said)
    names = {reference.name for reference in result.run.references}
    assert any(name.startswith("dense, tuned") for name in names), "the other references were measured"
    assert "no test metrics" in (result.folder / "report.html").read_text()
    assert "no such label: 7" in (result.folder / "log.txt").read_text(), "where it was raised stands in the log"


def test_a_point_whose_file_computes_something_else_is_not_on_the_front(
    small: Callable[..., SearchResult], spaces: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = CompiledModel.reload

    def spoilt(self: CompiledModel, path: Path) -> CompiledModel:
        """Reading back the library of a model that was compressed gives other numbers."""
        loaded, folder = honest(self, path), Path(path).parent
        sources = {Candidate.from_json(e["candidate"]).id: e["source"] for e in told(folder.parents[1]).values()}
        if sources.get(folder.name, "dense") != "dense":
            run = loaded.run
            loaded.run = lambda *inputs: run(*inputs) * 1.5  # type: ignore[method-assign]
        return loaded

    monkeypatch.setattr(CompiledModel, "reload", spoilt)
    result = small(space=spaces["wide"], measurements=2, trials=6)
    rows = pd.read_csv(result.folder / "evaluations.csv")
    failed = rows[rows["state"] == "failed"]
    assert not failed.empty
    assert failed["failure"].str.contains(r"model\.so differs from torch by").all()
    assert [point.candidate for point in result.front] == [result.dense.candidate]
    assert {path.name for path in (result.folder / "models").iterdir()} == {result.dense.candidate.id}
    assert all(check.ok for check in result.front[0].record.verified.values())


def test_only_the_timed_module_decides() -> None:
    assert finish._decides("so")
    assert finish._decides("so:cortex-a76")
    assert not finish._decides("onnx")


def test_a_page_that_fails_at_the_end_costs_nobody_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    monkeypatch.setattr(start, "build_report", refuse)
    start._report(tmp_path, progress)
    assert "report.html was not written (TypeError: not today)" in progress.warnings[0]
    assert f"autocomp report {tmp_path}" in progress.warnings[0]
