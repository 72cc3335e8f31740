"""The gate: what was delivered is accepted, and every way in which it may have gone bad is told."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_task
import torch
from filelock import FileLock

import autocomp
from autocomp.cli.main import main
from autocomp.errors import UsageError
from autocomp.hardware.profile import Profile
from autocomp.processes.one import at_work
from autocomp.run import verdict as verdict_module
from autocomp.run.folder import LOCK
from autocomp.run.verdict import Gated, Verdict

pytestmark = pytest.mark.usefixtures("short_tuning")
LOOSE = 0.9  # of the speed-up: no test is about how fast something is


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, spaces: dict[str, str], short_tuning: None) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    autocomp.search(task="tiny_task:task", out=out, space=spaces["full"], trials=8, measurements=2, references=False)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def verdicts(found: Gated) -> dict[str, str]:
    return {check.name: check.verdict.value for check in found.checks}


def models(run: Path) -> Path:
    point = autocomp.SearchResult(run).best().candidate.id
    return run / "models" / point


def test_what_was_delivered_is_accepted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["gate", str(run), "--slower", str(LOOSE), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert code == Verdict(said["verdict"]).exit_code
    assert said["verdict"] in ("ACCEPT", "INCONCLUSIVE")
    names = [check["name"] for check in said["checks"]]
    assert names == ["files", "manifest", "task", "size", "metric", "onnx", "so on x86-host", "latency on x86-host"]
    assert [check["verdict"] for check in said["checks"][:7]] == ["ACCEPT"] * 7
    assert said["point"] == models(run).name
    (run / "baseline.json").write_text(json.dumps(said))
    if said["checks"][-1]["verdict"] == "ACCEPT":
        again = autocomp.gate(run, baseline=run / "baseline.json", slower=LOOSE)
        assert again.checks[-1].numbers["baseline"] == said["checks"][-1]["numbers"]["now"]
    said["checks"][-1]["verdict"] = "REGRESSION"
    (run / "baseline.json").write_text(json.dumps(said))
    none = autocomp.gate(run, baseline=run / "baseline.json")
    assert "the baseline has no accepted latency" in none.checks[-1].said


def other_weights(place: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(place / "model.onnx")
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1:
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, place / "model.onnx")


def longer_library(place: Path) -> None:
    path = place / "model.so"
    path.write_bytes(path.read_bytes() + b"more")


def of_another_model(place: Path) -> None:
    other = tiny_task.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    autocomp.compile(other, tiny_task.task().example_inputs).save(place / "model.so")


def says(name: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        manifest = json.loads((place / "manifest.json").read_text())
        change(manifest[name])
        (place / "manifest.json").write_text(json.dumps(manifest))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "check", "verdict"),
    [
        (other_weights, "onnx", "REGRESSION"),
        (of_another_model, "so on x86-host", "REGRESSION"),
        (lambda place: (place / "model.so").unlink(), "so on x86-host", "CANNOT RUN"),
        (lambda place: (place / "model.onnx").write_bytes(b"nothing"), "onnx", "CANNOT RUN"),
        (lambda place: (place / "model.safetensors").write_bytes(b"nothing"), "files", "REGRESSION"),
        (longer_library, "files", "REGRESSION"),
        (says("metrics", lambda metrics: metrics.update(accuracy=1.5)), "manifest", "REGRESSION"),
        (says("latency", lambda latency: latency["x86-host"].update(seconds=1e-9)), "manifest", "REGRESSION"),
        (says("candidate", lambda candidate: candidate["widths"].update(stem=1)), "manifest", "REGRESSION"),
        (says("inputs", lambda inputs: inputs[0].update(dtype="float64")), "manifest", "REGRESSION"),
        (says("onnx_session_options", lambda options: options.update(other="1")), "manifest", "REGRESSION"),
    ],
)
def test_what_went_bad_is_told(spoil: Callable[[Path], object], check: str, verdict: str, run: Path) -> None:
    spoil(models(run))
    found = autocomp.gate(run, slower=LOOSE)
    assert verdicts(found)[check] == verdict
    assert found.verdict is not Verdict.ACCEPT


@pytest.mark.parametrize("part", ["weights", "calibration"])
def test_another_model_or_data_of_the_same_metric_is_told(part: str, run: Path) -> None:
    task = tiny_task.task()
    if part == "weights":
        other = copy.deepcopy(task.model)
        with torch.no_grad():
            next(other.parameters()).mul_(1 + 1e-6)
        task = replace(task, model=other)
    else:
        task = replace(task, calibration=[tuple(x.flip(0) for x in batch) for batch in task.calibration])
    found = autocomp.gate(run, slower=LOOSE, task=task)
    assert verdicts(found)["task"] == "INCONCLUSIVE"
    assert part in next(check.said for check in found.checks if check.name == "task")


@pytest.mark.parametrize(
    ("verdict", "code"), [("ACCEPT", 0), ("REGRESSION", 4), ("INCONCLUSIVE", 5), ("CANNOT RUN", 6)]
)
def test_the_exit_code_is_the_verdict(verdict: str, code: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autocomp import api

    checks = (verdict_module.Check("files", Verdict(verdict), "said", {}),)
    monkeypatch.setattr(api, "gate", lambda *_, **__: Gated("0123456789", checks))
    assert main(["gate", str(run)]) == code
    assert main(["gate", str(run), "--json"]) == code
    assert main(["--help"]) == 0


@pytest.mark.parametrize(("offset", "scale"), [(1000.0, 1.0), (0.0, 1e-9)])
def test_a_metric_is_judged_by_what_it_may_lose_whatever_its_size(offset: float, scale: float, run: Path) -> None:
    """The run's own figures and what is read now, both moved and scaled alike."""
    task = tiny_task.task()

    def told(metrics: dict[str, float], lost: float) -> dict[str, float]:
        return {name: offset + scale * (value - lost) for name, value in metrics.items()}

    data = json.loads((run / "front.json").read_text())
    for point in (data["dense"], *data["front"]):
        point["evaluation"]["metrics"] = told(point["evaluation"]["metrics"], 0.0)
    del data["checksum"]  # as of an earlier version: what is edited is refused
    (run / "front.json").write_text(json.dumps(data))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("max_drop: null", f"max_drop: {0.02 * scale}"))
    point = min(autocomp.SearchResult(run).front, key=lambda p: p.bytes).candidate.id
    same = autocomp.gate(run, point, slower=LOOSE, task=replace(task, evaluate=lambda m: told(task.evaluate(m), 0.0)))
    assert verdicts(same)["metric"] == "ACCEPT"
    worse = autocomp.gate(run, point, slower=LOOSE, task=replace(task, evaluate=lambda m: told(task.evaluate(m), 0.2)))
    assert verdicts(worse)["metric"] != "ACCEPT"


def test_what_sums_in_another_order_make_of_nothing_is_no_loss(run: Path) -> None:
    """A distance from the uncompressed model, of that model itself: 0, or about that; a share of it allows nothing."""
    data = json.loads((run / "front.json").read_text())
    for point in (data["dense"], *data["front"]):
        point["evaluation"]["metrics"] = dict.fromkeys(point["evaluation"]["metrics"], -2e-12)
    del data["checksum"]  # as of an earlier version: what is edited is refused
    (run / "front.json").write_text(json.dumps(data))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("max_drop: null", "max_drop: 5%"))
    point, names = autocomp.SearchResult(run).front[0].candidate.id, list(data["dense"]["evaluation"]["metrics"])
    readings = iter([-2e-12, 0.0])  # of the point, and of the uncompressed model
    task = replace(tiny_task.task(), evaluate=lambda m: dict.fromkeys(names, next(readings)))
    assert verdicts(autocomp.gate(run, point, slower=LOOSE, task=task))["metric"] == "ACCEPT"


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_size_is_counted_from_the_tensors(factor: float, run: Path) -> None:
    point = models(run).name
    for path in (run / "front.json", run / "models" / point / "manifest.json"):  # hand in hand
        data = json.loads(path.read_text())
        for entry in [p["evaluation"] for p in data.get("front", ())] or [data]:
            entry["bytes"] = int(entry["bytes"] * factor)
        data.pop("checksum", None)
        path.write_text(json.dumps(data))
    assert verdicts(autocomp.gate(run, point, slower=LOOSE))["size"] == "REGRESSION"


def test_a_library_that_ends_its_process_does_not_end_the_gate(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autocomp.compiler.build import CompiledModel

    monkeypatch.setattr(CompiledModel, "reload", lambda *_: os.kill(os.getpid(), signal.SIGILL))
    found = autocomp.gate(run, slower=LOOSE)
    assert verdicts(found)["so on x86-host"] == "CANNOT RUN"
    assert "SIGILL" in next(check.said for check in found.checks if check.name == "so on x86-host")


@pytest.mark.slow
def test_an_estimated_target_is_held_to_its_own_estimate(
    tmp_path: Path, spaces: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    autocomp.search(
        task="tiny_task:task",
        out=out,
        space=spaces["full"],
        trials=6,
        measurements=1,
        references=False,
        profiles=["cortex-a76"],
    )
    found = autocomp.gate(out)
    assert {name: verdict for name, verdict in verdicts(found).items() if "cortex" in name} == {
        "so on cortex-a76": "ACCEPT",
        "latency on cortex-a76": "ACCEPT",
    }
    said = next(check for check in found.checks if check.name == "latency on cortex-a76")
    assert said.numbers["now"] == pytest.approx(said.numbers["baseline"], rel=1e-6)
    monkeypatch.setattr(Profile, "fingerprint", "another")
    assert verdicts(autocomp.gate(out))["latency on cortex-a76"] == "INCONCLUSIVE"


def test_other_data_are_told_apart_from_another_model(run: Path) -> None:
    task = tiny_task.task()
    point = min(autocomp.SearchResult(run).front, key=lambda p: p.bytes).candidate.id
    found = autocomp.gate(run, point, slower=LOOSE, task=replace(task, evaluate=lambda m: half(task.evaluate(m))))
    assert verdicts(found)["metric"] == "INCONCLUSIVE", "dense fell as much"
    assert "in the run" in next(c.said for c in found.checks if c.name == "metric")


def test_a_metric_that_fell_is_a_regression(run: Path) -> None:
    task = tiny_task.task()
    given: list[object] = []

    def evaluate(model: object) -> dict[str, float]:
        given.append(model)  # the point first, then the uncompressed model
        return half(task.evaluate(model)) if len(given) == 1 else task.evaluate(model)  # type: ignore[arg-type]

    found = autocomp.gate(run, slower=LOOSE, task=replace(task, evaluate=evaluate))
    assert verdicts(found)["metric"] == "REGRESSION"
    assert found.verdict is Verdict.REGRESSION


def half(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value / 2 for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("times", "spread", "verdict"),
    [(2.0, 0.01, "ACCEPT"), (1.0, 0.01, "REGRESSION"), (1.78, 0.2, "INCONCLUSIVE"), (3.0, 0.2, "ACCEPT")],
)
def test_a_latency_is_held_to_the_baseline_within_its_spread(
    times: float, spread: float, verdict: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autocomp.devices.local import LocalDevice
    from autocomp.records.latency import Latency

    taken = [Latency(times, spread, "measured", "x86-host"), Latency(1.0, spread, "measured", "x86-host")]
    monkeypatch.setattr(LocalDevice, "time_in_turn", lambda *_: taken)
    monkeypatch.setattr(verdict_module, "_speedups", lambda *_: {"x86-host": 2.0})
    assert verdicts(autocomp.gate(run))["latency on x86-host"] == verdict


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no run folder"),
        (["{run}", "--point", "abc"], "has no point 'abc'; its front has"),
        (["{run}", "--baseline", "none.json"], "there is no file"),
        (["{run}", "--baseline", "{run}/front.json"], "is not what `autocomp gate --json` prints"),
        (["{run}", "--slower", "1"], "--slower"),
        (["{run}", "--slower", "nan"], "nan is no number"),
    ],
)
def test_bad_input(arguments: list[str], words: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", *(text.format(run=finished) for text in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_what_a_task_prints_is_not_in_the_json(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "talks.py").write_text(
        "import os, tiny_task\nprint('imported')\n\n\ndef task():\n    made = tiny_task.task()\n    judge = made.evaluate\n\n"
        "    def evaluate(model):\n        print('judging')\n        os.write(1, b'below')\n        return judge(model)\n\n"
        "    made.evaluate = evaluate\n    return made\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("tiny_task:task", "talks:task"))
    main(["gate", str(run), "--slower", str(LOOSE), "--json"])
    said = capfd.readouterr()
    assert {check["name"] for check in json.loads(said.out)["checks"]} >= {"metric"}
    assert "imported" in said.err


def test_two_gates_in_two_threads_are_refused(run: Path) -> None:
    inside, go = threading.Event(), threading.Event()

    def work() -> None:
        with at_work(long=True):
            inside.set()
            go.wait(60)

    other = threading.Thread(target=work)
    other.start()
    inside.wait(60)
    try:
        with pytest.raises(UsageError, match="at work in another thread"):
            autocomp.gate(run)
    finally:
        go.set()
        other.join()


def test_a_time_limit_off_the_main_thread_is_refused(run: Path) -> None:
    config, said = run / "config.yaml", []
    config.write_text(config.read_text().replace("evaluate_timeout: null", "evaluate_timeout: 5.0"))

    def work() -> None:
        for ask in (lambda: autocomp.gate(run), lambda: autocomp.recover(run, tiny_task.task(), length="1steps")):
            try:
                ask()
            except UsageError as error:
                said.append(str(error))

    other = threading.Thread(target=work)
    other.start()
    other.join(60)
    assert len(said) == 2
    assert all("main thread alone" in text for text in said)


def test_a_run_that_is_at_work_is_not_checked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / LOCK).touch()
    with FileLock(run / LOCK):
        assert main(["gate", str(run)]) == 2
    said = capsys.readouterr().err
    assert "a search or training is at work" in said
    assert len(said.splitlines()) <= 3
    with FileLock(run / LOCK, timeout=0):  # let go
        pass
