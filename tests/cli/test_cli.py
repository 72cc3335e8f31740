"""The command line: what it prints where, its exit codes, and what it says to bad input.

The pipeline behind it is replaced here by functions that return or raise what a test needs; it has tests of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import autocomp
from autocomp.cli.main import main
from autocomp.config.settings import Settings, dump_settings
from autocomp.errors import InfeasibleError, Interrupted, MismatchError, UsageError
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation, Sensitivity
from autocomp.records.latency import KernelTime, Latency
from autocomp.records.run import FrontPoint, TaskInfo, write_front
from autocomp.records.run import Run as FrontRun

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for `autocomp.api`."""
    module = ModuleType("autocomp.api")
    monkeypatch.setitem(sys.modules, "autocomp.api", module)
    monkeypatch.setattr(autocomp, "api", module, raising=False)
    return module


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Run a command in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def point(accuracy: float, seconds: float, size: int, width: int) -> FrontPoint:
    latency = Latency(seconds, 0.012, "measured", "x86-host")
    return FrontPoint(
        Evaluation(
            trial=width,
            candidate=Candidate({"stem.0": width}, {}),
            source="solver",
            state="measured",
            error=0.0,
            bytes=size,
            metrics={"accuracy": accuracy},
            latency={"x86-host": latency},
        )
    )


DENSE = point(0.98, 0.0004, 1_600_000, 32)
ENDED = FrontRun(
    task=TaskInfo("digits", "", "accuracy", True, 400_000, 1_600_000, "%"),
    profiles={"x86-host": "this machine"},
    dense=DENSE,
    front=(DENSE, point(0.97, 0.0001, 400_000, 16)),
)


def search_that_ends_well(settings: Settings, **others: Any) -> SimpleNamespace:
    folder = Path(settings.out)
    folder.mkdir(parents=True)
    write_front(folder, ENDED)
    return SimpleNamespace(run=ENDED, folder=Path("here"))


def test_search_passes_settings_and_shows_the_front(run: Run, api: ModuleType) -> None:
    seen: dict[str, Any] = {}

    def search(**arguments: Any) -> SimpleNamespace:
        seen.update(arguments)
        return search_that_ends_well(**arguments)

    api.search = search
    code, out, err = run(
        *(
            "search",
            "digits",
            "--profile",
            "x86-host",
            "--profile",
            "x86-64-v3",
            "--trials",
            "7",
            "--measurements",
            "3",
        ),
        *("--minutes", "2", "--seed", "5", "--out", "there", "--max-drop", "0.01", "--max-latency", "300us"),
        *("--max-size", "500KB", "--space", "prune-only"),
    )
    assert (code, err) == (0, "")
    settings = seen["settings"]
    assert settings.task == "digits"
    assert settings.profiles == ["x86-host", "x86-64-v3"]
    assert (settings.trials, settings.measurements, settings.minutes, settings.seed) == (7, 3, 2.0, 5)
    assert (settings.out, settings.space) == ("there", "prune-only")
    assert settings.goals.model_dump() == {
        "max_drop": 0.01,
        "max_latency": 0.0003,
        "max_size": 500_000,
        "max_memory": None,
        "max_energy": None,
    }
    assert seen["resume"] is False
    dense, best, *_ = out.splitlines()[1:]
    assert dense.split() == ["dense", "0.9800", "0.4", "ms", "±", "0.6%", "1.00x", "1.6", "MB"]
    name = Candidate({"stem.0": 16}, {}).id
    assert best.split() == [name, "0.9700", "+0.0100", "0.1", "ms", "±", "0.6%", "4.00x", "400", "kB"]
    assert out.splitlines()[-1] == "report: there/report.html"


def test_search_as_json_prints_json_alone(run: Run, api: ModuleType) -> None:
    api.search = search_that_ends_well
    code, out, _ = run("search", "digits", "--json")
    assert code == 0
    assert json.loads(out)["front"][1]["evaluation"]["metrics"] == {"accuracy": 0.97}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("calibration is empty"), 2, "error: calibration is empty"),
        (InfeasibleError("no candidate is fast enough"), 3, "error: no candidate is fast enough"),
        (MismatchError("layer differs"), 1, "error: layer differs"),
        (Interrupted("stopped; continue with --resume"), 130, "error: stopped; continue with --resume"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero (run again with --debug"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "a/b cannot be written: the disk is full"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), 1, "FileNotFoundError"),
    ],
)
def test_exit_codes(run: Run, api: ModuleType, error: BaseException, code: int, words: str) -> None:
    def search(**arguments: Any) -> None:
        raise error

    api.search = search
    found, out, err = run("search", "digits")
    assert found == code
    assert out == ""
    assert words in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(run: Run, api: ModuleType) -> None:
    def search(**arguments: Any) -> None:
        raise ZeroDivisionError("division by zero")

    api.search = search
    code, _, err = run("search", "digits", "--debug")
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serch"], "there is no command 'serch'. Did you mean 'search'?"),
        (["search"], "no task is given"),
        (["search", "digits", "--trails", "3"], "--trials"),
        (["search", "digits", "--trials", "0"], "trials: must be greater than or equal to 1, got 0"),
        (["search", "digits", "--trials", "many"], "'many' is not a valid integer"),
        (["search", "digits", "--minutes", "nan"], "minutes: must be a finite number"),
        (["search", "digits", "--max-latency", "0.5"], "must be a duration with its unit"),
        (["search", "digits", "--max-size", "5 pages"], "must be a size with its unit"),
        (["search", "digits", "--task", "other"], "two tasks are given"),
        (["search", "digits", "--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["search", "digits", "--resume"], "there is no run to resume in runs/digits"),
        (["search", "--resume", "--out", "nowhere"], "there is no run to resume in nowhere"),
        (["search", "digits", "--out", "file/run"], "the output folder file/run cannot be written"),
        (["search", "digits", "--out", "file"], "the output folder file cannot be written: it is a file"),
        (["report", "nowhere"], "there is no run folder nowhere"),
        (["measure", "digit"], "unknown task 'digit'. Did you mean 'digits'?"),
        (["measure", "digits", "--profile", "x86-hots"], "Did you mean 'x86-host'?"),
        (["measure", "nowhere.pt2"], "there is no file nowhere.pt2"),
        (["measure", "broken.pt2"], "broken.pt2 is not a torch.export file"),
        (["schema", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_refused_before_any_work(run: Run, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.pt2").write_bytes(b"not a zip file")
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.pt2", "file"]


def test_full_disk_is_told_before_any_work(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fsync(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("autocomp.run.folder.os.fsync", fsync)
    code, _, err = run("search", "digits", "--out", "a/b")
    assert code == 2
    assert "a/b cannot be written: the disk is full" in err
    assert list(tmp_path.iterdir()) == []


def started(folder: Path, **settings: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_settings(Settings(**{"task": "digits", "out": str(folder), **settings})))


def test_a_run_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    started(tmp_path / "runs/digits")
    code, _, err = run("search", "digits")
    assert code == 2
    assert "runs/digits holds a run already: continue it with --resume" in err


def test_resume_with_other_settings_shows_what_differs(run: Run, tmp_path: Path) -> None:
    started(tmp_path / "runs/digits", seed=1, space="prune-only", trials=5)
    code, _, err = run("search", "digits", "--resume", "--seed", "2")
    assert code == 2
    assert "seed: 1 -> 2" in err
    assert "space: prune-only -> default" in err
    assert "trials:" not in err


def test_resume_needs_no_more_than_the_folder(run: Run, api: ModuleType, tmp_path: Path) -> None:
    started(tmp_path / "here", seed=1, trials=5)
    seen: dict[str, Any] = {}

    def search(**arguments: Any) -> SimpleNamespace:
        seen.update(arguments)
        return SimpleNamespace(run=ENDED, folder=Path("here"))

    api.search = search
    code, _, err = run("search", "--resume", "--out", "here", "--trials", "50")
    assert (code, err) == (0, "")
    assert seen["resume"] is True
    assert (seen["settings"].task, seen["settings"].seed, seen["settings"].trials) == ("digits", 1, 50)


def test_config_file_and_module_beside_it(run: Run, api: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "beside_config.py").write_text("def make():\n    return 3\n")
    (folder / "c.yaml").write_text("task: beside_config:make\nseed: 3\n")

    def search(settings: Settings, **others: Any) -> None:
        from autocomp.tasks.task import load_task

        load_task(settings.task or "")

    api.search = search
    code, _, err = run("search", "--config", str(folder / "c.yaml"))
    assert code == 2
    assert "must return an autocomp.Task" in err  # so it was found


def test_measure_prints_milliseconds_and_kernels(run: Run, api: ModuleType, tmp_path: Path) -> None:
    import torch
    from torch import nn

    program = torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),))
    torch.export.save(program, tmp_path / "model.pt2")
    kernel = KernelTime("fused_dense", "key", "dense", 0.0001, 12_000, peak_fraction=0.5)
    shapes = []

    def measured(model: nn.Module, example_inputs: tuple[Any, ...], profile: str) -> Latency:
        shapes.append(tuple(model(*example_inputs).shape))
        return Latency(0.00025, 0.02, "measured", profile, device="znver5", kernels=(kernel,))

    api.measure = measured
    code, out, _ = run("measure", "model.pt2", "--profile", "x86-64-v3")
    assert code == 0
    assert out.startswith("x86-64-v3: 0.25 ms ± 1.0%, measured on znver5")
    assert "fused_dense" in out
    assert "50%" in out
    code, out, _ = run("measure", "model.pt2", "--json")
    assert json.loads(out)["x86-host"]["seconds"] == 0.00025
    assert shapes == [(1, 2), (1, 2)]


def test_report_says_where_it_lies(run: Run, api: ModuleType, tmp_path: Path) -> None:
    api.rebuild_report = lambda folder: folder / "report.html"
    (tmp_path / "there").mkdir()
    assert run("report", "there") == (0, "report: there/report.html\n", "")
    assert json.loads(run("report", "there", "--json")[1]) == {"report": "there/report.html"}


CHECKED = {
    "converted": ["Task.model: bfloat16 taken as float32, on a copy"],
    "task": "digits",
    "profiles": ["x86-host"],
    "candidates": 10**400,
    "outputs": [
        {"output": "logits", "shape": [16, 10], "samples": 0, "compared": "classes@1", "why": "scores"},
    ],
    "groups": [
        {
            "group": "stem.0",
            "width": 32,
            "offered": [32, 16],
            "finer": [24],
            "layers": ["stem.0", "block.conv2"],
            "approximate": "",
        },
        {
            "group": "norm",
            "width": 8,
            "offered": [8, 4],
            "finer": [],
            "layers": ["norm"],
            "approximate": "layer_norm in norm",
        },
    ],
    "layers": [{"layer": "stem.0", "kind": "conv2d", "macs": 73_728, "methods": ["fp32", "w8a8"]}],
    "branches": [{"group": "norm", "offered": True, "layers": ["stem.0"]}],
    "refused": [{"subject": "classifier", "option": "rank 64", "reason": "above break-even [32]"}],
}


def test_check_says_what_is_offered_and_what_not(run: Run, api: ModuleType) -> None:
    api.check = lambda settings, progress: CHECKED
    code, out, _ = run("check", "digits")
    assert code == 0
    for words in (
        "32, 16+",
        "+: widths between these are offered later",
        "bfloat16 taken as float32",
        "stem.0, block.conv2",
        "0.0737",
        "fp32, w8a8",
        "above break-even [32]",
        "1.0e+400 candidates",
        "classes@1",
        "16x10",
        "* approximate: layer_norm in norm is computed over the channels of norm that are left",
        "0: the branch that ends there is left out whole",
    ):
        assert words in out
    assert json.loads(run("check", "digits", "--json")[1]) == CHECKED


def test_sensitivity_prints_a_table_and_names_its_page(run: Run, api: ModuleType) -> None:
    asked = {}

    def sensitivity(settings, out, progress, masked):
        asked["task"], asked["out"], asked["masked"] = settings.task, out, masked
        return "digits", [Sensitivity("stem", "width", "16", 0.25, 0.5), Sensitivity("stem", "width", "8", 0.5, 0.25)]

    api.sensitivity = sensitivity
    code, out, _ = run("sensitivity", "digits")
    assert code == 0
    assert asked == {"task": "digits", "out": Path("sensitivity-digits.html"), "masked": False}
    assert "16: 0.25" in out
    assert "sensitivity-digits.html" in out
    found = json.loads(run("sensitivity", "digits", "--out", "there.html", "--masks", "--json")[1])
    assert asked["out"] == Path("there.html")
    assert asked["masked"]
    assert found["rows"][1] == {"subject": "stem", "kind": "width", "option": "8", "error": 0.5, "share": 0.25}
    assert run("sensitivity")[0] == 2  # no task


def test_lists_and_schemas(run: Run) -> None:
    code, out, _ = run("profiles")
    assert code == 0
    assert "x86-host" in out
    assert {"x86-host", "x86-64-v3"} <= {profile["name"] for profile in json.loads(run("profiles", "--json")[1])}
    assert "default" in run("spaces")[1]
    assert "default" in {space["name"] for space in json.loads(run("spaces", "--json")[1])}
    for kind in ("config", "profile", "space"):
        assert json.loads(run("schema", kind)[1])["additionalProperties"] is False


def test_help_is_there_for_every_command(run: Run) -> None:
    for command in ("search", "report", "measure", "profiles", "spaces", "check", "schema"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "--json" in out


@pytest.mark.parametrize("closed", ["0<&- >&- 2>&-", "2>&-", ">&-"])
def test_a_process_may_have_no_standard_streams(closed: str, tmp_path: Path) -> None:
    """As daemons start: what is opened next must not become somebody's standard error."""
    code = (
        "import os, sys; from autocomp.cli import main as m; code = m.main(['profiles']); "
        f"open({str(tmp_path / 'x')!r}, 'w').write(f'{{code}} {{[os.fstat(n).st_size for n in range(3)]}}')"
    )
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], capture_output=True, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "x").read_text().startswith("0 ")


def test_a_reader_that_leaves_stops_no_search() -> None:
    from rich.console import Console

    from autocomp.progress import Progress

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        progress = Progress(Console(file=gone))
        with progress.stage("searching", 2) as stage:
            stage.warn("something")
            stage.advance()
        assert progress.warnings == ["something"]
        assert progress.console is None
        with contextlib.suppress(BrokenPipeError):
            gone.close()
