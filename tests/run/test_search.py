"""The main job end to end on real parts: a search of a tiny task, its run folder, and what may go wrong on the way."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_task
import torch
from studies import told
from torch import nn

import autocomp
from autocomp.api import SearchResult
from autocomp.cli.main import main
from autocomp.compiler.verify import check_outputs
from autocomp.config.settings import read_settings
from autocomp.devices import local
from autocomp.errors import InfeasibleError, UsageError
from autocomp.export.files import MANIFEST
from autocomp.export.onnx import onnx_session, run_session
from autocomp.front.goals import undisturbed
from autocomp.hardware.profile import load_profile
from autocomp.layers.w8a8 import QuantConv2d
from autocomp.records.run import Run, speedup
from autocomp.records.table import read_evaluations
from autocomp.run import finish
from autocomp.tuning.store import KernelStore

TRIALS, MEASURE = 12, 2
TASK = "tiny_task:task"
pytestmark = pytest.mark.usefixtures("short_tuning")


@dataclass(frozen=True)
class Finished:
    """A run that ended well, and who read which split while it ran (``finish`` marks where searching ended)."""

    result: SearchResult
    calls: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.result.folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, spaces: dict[str, str]) -> Finished:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    tiny_task.CALLS.clear()
    with pytest.MonkeyPatch.context() as patch:
        _mark_finish(patch)
        result = autocomp.search(
            task=TASK, trials=TRIALS, measurements=MEASURE, out=out, space=spaces["wide"], goals={"max_drop": 1.0}
        )
    return Finished(result, tuple(tiny_task.CALLS))


@pytest.fixture
def another(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run, to be resumed or spoilt."""
    return Path(shutil.copytree(finished.folder, tmp_path / "another"))


def _mark_finish(patch: pytest.MonkeyPatch) -> None:
    real = finish.finish

    def marked(prepared: Any, found: Any) -> Run:
        tiny_task.CALLS.append("finish")
        return real(prepared, found)

    patch.setattr(finish, "finish", marked)


# --- a run that ends well ---------------------------------------------------------------------------------------------


def test_run_folder_is_complete(finished: Finished) -> None:
    present = {path.name for path in finished.folder.iterdir()}
    files = {
        "config.yaml",
        "provenance.json",
        "study.journal",
        "evaluations.csv",
        "front.json",
        "report.html",
        "log.txt",
    }
    assert files <= present
    assert {"layers", "models"} <= present
    assert list((finished.folder / "layers").glob("*.bin"))
    for point in finished.result.front:
        folder = finished.folder / "models" / point.candidate.id
        assert {path.name for path in folder.iterdir()} == {
            "model.so",
            "model.onnx",
            "manifest.json",
            "model.safetensors",
        }
        manifest = json.loads((folder / MANIFEST).read_text())
        assert manifest["candidate"] == point.candidate.to_json()
        assert set(manifest["sha256"]) == {"model.so", "model.onnx", "model.safetensors"}
    provenance = json.loads((finished.folder / "provenance.json").read_text())
    assert {"torch", "apache-tvm", "onnxruntime"} <= set(provenance["packages"])
    assert provenance["seed"] == 0
    settings = read_settings(finished.folder / "config.yaml")
    assert (settings.task, settings.trials, settings.measurements) == (TASK, TRIALS, MEASURE)
    assert (finished.folder / "report.html").stat().st_size > 1e6, "plotly is in the page"


def test_counts_add_up(finished: Finished) -> None:
    run = finished.result.run
    assert run.summary.told == len(told(finished.folder)) == len(run.hypervolume) == TRIALS
    rows = pd.read_csv(finished.folder / "evaluations.csv")
    assert len(rows) == TRIALS
    assert rows["trial"].is_unique
    assert (rows["state"] == "measured").sum() == run.summary.measured == 1 + len(run.baselines) + MEASURE
    assert run.summary.failed == 0
    assert all(0 <= value <= 1 for value in run.hypervolume)


def test_what_was_expected_is_kept_with_what_came_of_it(finished: Finished) -> None:
    run = finished.result.run
    expected = run.expected
    assert expected is not None
    speedups = [point.speedup["x86-host"] for point in expected.points]
    assert speedups == sorted(speedups)
    assert speedups[0] == pytest.approx(1.0)
    assert speedups[-1] > 1.2
    assert [point.divergence for point in expected.points] == sorted(point.divergence for point in expected.points)
    assert (expected.trials, expected.measurements) == (TRIALS, MEASURE)
    measured = {e.candidate.id for e in read_evaluations(finished.folder) if e.state == "measured"}
    assert set(expected.candidates) == measured
    dense = expected.candidates[run.dense.evaluation.candidate.id]
    assert dense.speedup["x86-host"] == pytest.approx(1.0)
    assert dense.divergence == 0
    assert set(expected.spent) == {"until the first trial", "trials", "measuring"}
    assert "trials" not in expected.seconds, "too few candidates were looked at beforehand to say"
    assert expected.seconds["measuring"] > 0
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert "Expected and found" in page


def test_front_is_verified_and_measured(finished: Finished) -> None:
    points = finished.result.front
    assert points
    latencies = [finished.result.dense.latency["x86-host"]]
    for point in points:
        assert set(point.record.verified) == {"so", "onnx"}
        assert all(check.ok for check in point.record.verified.values()), point.record.verified
        latencies.append(point.latency["x86-host"])
    latencies += [baseline.latency["x86-host"] for baseline in finished.result.run.baselines]
    latencies += [reference.latency for reference in finished.result.run.references]
    assert {latency.how for latency in latencies} == {"measured"}
    assert all(latency.seconds > 0 and len(latency.samples) >= 5 for latency in latencies)
    seconds = [point.latency["x86-host"].seconds for point in points]
    assert seconds == sorted(seconds)
    accuracy = [point.metrics["accuracy"] for point in points]
    assert accuracy == sorted(accuracy), "on a front, slower is better"


def test_speed_ups_are_of_times_taken_in_turn(finished: Finished) -> None:
    """What is on the front was timed again beside dense; baselines are held against dense as it was timed with them."""
    dense = finished.result.dense.record.evaluation
    for evaluation in (dense, *(point.record.evaluation for point in finished.result.front)):
        before, now = evaluation.earlier["x86-host"], evaluation.latency["x86-host"]
        assert before.samples != now.samples
        assert before.kernels == now.kernels
        assert len(now.samples) == len(before.samples)
    for baseline in finished.result.run.baselines:
        yardstick = dense.latency if baseline.earlier else dense.earlier
        expected = yardstick["x86-host"].seconds / baseline.latency["x86-host"].seconds
        assert speedup(baseline, dense, "x86-host") == expected


def test_baselines_and_references_stand_beside_the_front(finished: Finished) -> None:
    run = finished.result.run
    assert run.dense.evaluation.source == "dense"
    assert run.dense.evaluation.metrics["accuracy"] > 0.8, "the task is learnt, so that accuracy means something"
    assert {baseline.source for baseline in run.baselines} == {"uniform"}
    assert len(run.baselines) == 3  # two widths by two precisions, without dense
    assert {reference.name for reference in run.references} >= {"ONNX Runtime fp32", "ONNX Runtime int8"}
    assert {reference.name.partition(",")[0] for reference in run.references if reference.kind == "classic"} >= {
        "uniform L1"
    }
    fp32 = next(reference for reference in run.references if reference.name == "ONNX Runtime fp32")
    assert fp32.metrics == pytest.approx(run.dense.evaluation.metrics)


def test_splits_are_read_as_promised(finished: Finished) -> None:
    searching = finished.calls[: finished.calls.index("finish")]
    after = finished.calls[finished.calls.index("finish") :]
    assert set(searching) == {"validation"}
    ids = {point.candidate.id for point in finished.result.front} | {finished.result.dense.candidate.id}
    assert after.count("test") == len(ids), "the test split is read once for each point that is reported"


def test_loaded_model_equals_its_exports(finished: Finished) -> None:
    inputs = [(x[None],) for x in tiny_task.data(9, seed=9)[0]]
    profile = load_profile("x86-host")
    for point in finished.result.front:
        folder = finished.folder / "models" / point.candidate.id
        model = point.load()
        assert not model.training
        library, session = (
            local.CompiledModel.load(folder / "model.so", profile),
            onnx_session(folder / "model.onnx", exact=True),
        )
        check_outputs(model, library.run, inputs, "the library")
        check_outputs(model, partial(run_session, session), inputs, "the ONNX file")
        size = sum(tensor.numel() for tensor in model.state_dict().values())
        if point.candidate != finished.result.dense.candidate:
            assert size != sum(tensor.numel() for tensor in tiny_task.model().state_dict().values())
        torch.set_num_threads(1)
        assert tiny_task.task().evaluate(model) == pytest.approx(dict(point.metrics))


def test_frame_has_a_row_for_each_point(finished: Finished) -> None:
    frame = finished.result.to_frame()
    assert list(frame["id"]) == [point.candidate.id for point in finished.result]
    assert set(frame["how:x86-host"]) == {"measured"}
    dense = finished.result.dense
    assert list(frame["drop"]) == pytest.approx([dense.metrics["accuracy"] - a for a in frame["accuracy"]])
    assert (frame["seconds:x86-host"] * frame["speedup:x86-host"]).to_numpy() == pytest.approx(
        dense.latency["x86-host"].seconds
    )


def test_best_meets_its_limits(finished: Finished) -> None:
    result = finished.result
    fastest = undisturbed([point.record.evaluation for point in result.front])[0]
    assert result.best(max_drop=1.0).candidate == fastest.candidate
    careful = result.best(max_drop=0.05)
    assert result.dense.metrics["accuracy"] - careful.metrics["accuracy"] <= 0.05
    fast = fastest.latency["x86-host"].seconds
    assert result.best(max_latency=fast * 1.001).latency["x86-host"].seconds == fast
    with pytest.raises(InfeasibleError):
        result.best(max_size=1)


def test_limits_on_what_a_run_does_not_have_are_refused(finished: Finished) -> None:
    result = finished.result
    for ask in (result.best, partial(result.family, "2x")):
        with pytest.raises(UsageError, match=r"accuracy/uprigth.*Did you mean 'accuracy/upright'"):
            ask(max_drop={"accuracy/uprigth": 0.1})


def test_limits_on_a_metric_beside_the_objective_are_refused(finished: Finished) -> None:
    """Whether more of it is better is not known: a limit on a loss was met by what is worst."""
    result = SearchResult(finished.folder)
    result.run = replace(result.run, task=replace(result.run.task, objective="accuracy/upright"))
    for ask in (result.best, partial(result.family, "2x")):
        with pytest.raises(UsageError, match="whether higher is better"):
            ask(max_drop={"accuracy": 0.1})


def test_report_is_built_again_from_the_files(another: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (another / "report.html").read_text()
    (another / "report.html").unlink()
    (another / "study.journal").unlink()
    shutil.rmtree(another / "layers")
    assert main(["report", str(another)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (another / "report.html").read_text() == before


# --- goals, budgets ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("without_exports")
def test_goals_nobody_meets(
    spaces: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCOMP_REFERENCES", "no")
    arguments = ["--out", str(tmp_path), "--space", spaces["full"], "--trials", "3", "--measurements", "1"]
    assert main(["search", TASK, *arguments, "--max-size", "1KB"]) == 3
    said = capsys.readouterr()
    assert "no delivered candidate meets the goals (max_size 1000)" in said.err
    assert "Traceback" not in said.err
    assert (tmp_path / "report.html").exists(), "the report is written all the same"
    assert SearchResult(tmp_path).front


@pytest.mark.usefixtures("without_exports")
def test_goals_that_are_met(another: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_settings(another / "config.yaml").goals.max_drop == 1.0
    before = told(another)
    assert main(["search", "--resume", "--out", str(another)]) == 0, (
        "a finished run, resumed, has nothing left to search"
    )
    assert "report:" in capsys.readouterr().out
    assert told(another) == before


@pytest.mark.slow
@pytest.mark.usefixtures("without_exports")
def test_minutes_end_a_search_with_a_front(small: Callable[..., SearchResult]) -> None:
    result = small(trials=500, measurements=50, minutes=1e-3)
    assert result.front
    assert result.report.exists()
    assert 2 <= result.run.summary.told < 500
    rows = pd.read_csv(result.folder / "evaluations.csv")
    searched = rows[~rows["source"].isin(["dense", "uniform"])]
    assert (searched["state"] == "measured").any(), "the least that is searched is something"
    assert any("--minutes 0.001" in text for text in result.run.warnings), "and it is said that it was the least"


# --- candidates that fail ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_exports")
def test_mismatch_is_recorded_with_its_layer(
    small: Callable[..., SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = local.build

    def faulty(model: nn.Module, *rest: Any) -> Any:
        """Compiles another model than it is given, wherever the second convolution of the block is quantised."""
        wrong = copy.deepcopy(model)
        for name, module in wrong.named_modules():
            if name.endswith("conv2") and isinstance(module, QuantConv2d):
                module.scale.mul_(2)
        return real(wrong, *rest)

    monkeypatch.setattr(local, "build", faulty)
    result = small(trials=3)
    rows = pd.read_csv(result.folder / "evaluations.csv")
    failed = rows[rows["state"] == "failed"]
    assert len(rows) == 3
    assert not failed.empty
    assert failed["failure"].str.contains("differs from torch by .* the first layer that differs is 'conv2'").all()
    assert result.run.summary.failed == len(failed)
    assert any("differs from torch" in warning for warning in result.run.warnings)
    ids = {point.candidate.id for point in result.front}
    assert ids
    assert not ids & set(failed["id"])


@pytest.mark.slow
@pytest.mark.usefixtures("without_exports")
def test_metric_that_is_no_number_fails_its_candidate(small: Callable[..., SearchResult]) -> None:
    task = tiny_task.task()
    honest = task.evaluate
    task.evaluate = lambda net: (
        {"accuracy": float("nan")} if any(isinstance(m, QuantConv2d) for m in net.modules()) else honest(net)
    )
    rows = pd.read_csv(small(task).folder / "evaluations.csv")
    failed = rows[rows["state"] == "failed"]
    assert not failed.empty
    assert failed["failure"].str.contains("must return finite metrics, but 'accuracy' is nan").all()


def test_metric_of_dense_must_be_a_number(
    spaces: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "run"), "--space", spaces["full"], "--trials", "4"]
    assert main(["search", "tiny_task:broken", *arguments]) == 2
    assert "Task.evaluate must return finite metrics, but 'accuracy' is nan" in capsys.readouterr().err


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_exports")
def test_damaged_files_are_rebuilt_and_said_so(
    another: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = shutil.copytree(os.environ["AUTOCOMP_CACHE"], tmp_path / "cache")
    monkeypatch.setenv("AUTOCOMP_CACHE", str(cache))
    store = KernelStore.open(load_profile("x86-host")).folder / "kernels.jsonl"
    lines = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(b"".join([*lines[:-2], lines[-2].replace(b'"seconds"', b'"sEconds"'), lines[-1][:30]]))
    damaged = sorted((another / "layers").glob("layer-*.bin"))[0]
    sound = damaged.read_bytes()
    damaged.write_bytes(sound[:-100] + bytes(100))
    assert main(["search", "--resume", "--out", str(another), "--trials", str(TRIALS + 1)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "2 damaged records of the kernel store" in said
    assert f"{damaged.name} is damaged, or another's content; it was rebuilt" in said
    result = SearchResult(another)
    assert sum("damaged" in warning for warning in result.run.warnings) == 2
    assert result.run.summary.told == TRIALS + 1
    assert len(damaged.read_bytes()) == len(sound)


def test_resume_with_other_settings_is_refused(another: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (another / "config.yaml").read_text()
    assert main(["search", TASK, "--resume", "--out", str(another), "--seed", "5", "--space", "prune-only"]) == 2
    said = capsys.readouterr().err
    assert "seed: 0 -> 5" in said
    assert "-> prune-only" in said
    assert (another / "config.yaml").read_text() == before


def test_study_that_cannot_grow_keeps_what_was_told(
    another: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from autocomp.study.journal import StudyFile

    real, room = StudyFile.append_logs, iter(range(20))

    def full_after_a_while(self: StudyFile, logs: list[dict[str, Any]]) -> None:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        real(self, logs)

    before = told(another)
    more = ["search", "--resume", "--out", str(another), "--trials", str(TRIALS + 20)]
    monkeypatch.setattr(StudyFile, "append_logs", full_after_a_while)
    assert main(more) == 2
    monkeypatch.undo()
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot be written: the disk is full; what was told before is kept" in said
    assert {number: evaluation for number, evaluation in told(another).items() if number in before} == before


# --- the other commands -----------------------------------------------------------------------------------------------


def test_check_says_why_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", TASK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {layer["layer"] for layer in found["layers"]} == {"stem", "conv1", "conv2", "head"}
    reasons = {(refusal["subject"], refusal["reason"]) for refusal in found["refused"]}
    assert ("head", "its channels are the model's output") in reasons
    assert any(subject == "stem" and "rank" in reason for subject, reason in reasons)
    assert main(["check", TASK]) == 0
    assert "not offered for" in capsys.readouterr().out


def test_measure_reads_an_exported_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(tiny_task.model(), (tiny_task.data(1, seed=2)[0],)), path)
    assert main(["measure", str(path)]) == 0
    out = capsys.readouterr().out
    assert "ms ±" in out
    assert "conv2d" in out  # the first layer, of three channels, is computed directly whatever the machine
    assert main(["measure", str(path), "--json"]) == 0
    latency = json.loads(capsys.readouterr().out)["x86-host"]
    assert latency["how"] == "measured"
    assert latency["seconds"] > 0
    assert sum(kernel["operator"] in ("conv2d", "winograd") for kernel in latency["kernels"]) == 3
