"""What a task's own functions, data and model do wrong: named at the start with one message, or with the candidate it concerns."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from torch import Tensor, nn

import autocomp
from autocomp.api import SearchResult
from autocomp.errors import AutocompError, UsageError
from autocomp.layers.w8a8 import QuantConv2d
from autocomp.processes import interrupt
from autocomp.records.table import read_evaluations
from autocomp.tasks.task import load_task

pytestmark = pytest.mark.usefixtures("short_tuning", "without_exports")


class Own(BaseException):
    """No Exception, as some test runners and event loops raise."""


def hang(_: object) -> dict[str, float]:
    while True:
        try:
            time.sleep(0.1)
        except Exception:  # what hangs often swallows what would end it
            continue


def raising(error: BaseException) -> Callable[[object], dict[str, float]]:
    def judge(_: object) -> dict[str, float]:
        raise error

    return judge


JUDGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "SystemExit": (raising(SystemExit(3)), "raised SystemExit: 3"),
    "KeyboardInterrupt": (raising(KeyboardInterrupt("mine")), "raised KeyboardInterrupt: mine"),
    "BaseException": (raising(Own("lost")), "raised Own: lost"),
    "GeneratorExit": (raising(GeneratorExit()), "raised GeneratorExit"),
    "RecursionError": (raising(RecursionError("deep")), "raised RecursionError: deep"),
    "MemoryError": (raising(MemoryError()), "raised MemoryError"),
    "a message of pages": (raising(ValueError("x" * 100_000)), "raised ValueError"),
    "hangs": (hang, "raised OutOfTime: not done after 1 s"),
    "None": (lambda _: None, "must return a mapping"),
    "a list": (lambda _: [1.0], "must return a mapping"),
    "nothing in it": (lambda _: {}, "must return a mapping"),
    "a tensor of two axes": (lambda _: {"a": torch.ones(2, 2)}, "must return numbers"),
    "names that are numbers": (lambda _: {1: 2.0}, "must name its metrics by text"),
    "beyond a float": (lambda _: {"a": 10**400}, "must return numbers"),
    "beyond floats": (lambda _: {"a": [10**400, 1]}, "must return numbers"),
    "infinite": (lambda _: {"a": float("inf")}, "must return finite metrics"),
    "complex": (lambda _: {"a": 1j}, "must return numbers"),
}


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_that_never_works_is_refused_at_the_start(
    name: str, small: Callable[..., SearchResult], tmp_path: Path
) -> None:
    judge, words = JUDGES[name]
    with pytest.raises(UsageError) as caught:
        small(replace(tiny_task.task(), evaluate=judge), evaluate_timeout=1.0)
    assert f"Task.evaluate {words}" in str(caught.value)
    assert len(str(caught.value)) < 3000
    assert not (tmp_path / "run/config.yaml").exists(), "a corrected retry works"


@pytest.mark.slow
def test_a_judge_that_fails_on_some_costs_these(small: Callable[..., SearchResult], tmp_path: Path) -> None:
    """One that hangs, one that leaves, one that answers otherwise: failed trials with their reasons; the search goes on."""
    task, ends = tiny_task.task(), iter([hang, raising(Own("lost")), lambda _: {"other": 1.0}])
    judge = task.evaluate

    def sometimes(model: nn.Module) -> Any:
        if any(isinstance(module, QuantConv2d) for module in model.modules()) and (end := next(ends, None)):
            return end(model)
        return judge(model)

    result = small(replace(task, evaluate=sometimes), trials=12, measurements=6, evaluate_timeout=2.0)
    reasons = [e.failure or "" for e in read_evaluations(tmp_path / "run") if e.state == "failed"]
    for words in (
        "raised OutOfTime: not done after 2 s",
        "raised Own: lost",
        "must return the metrics of the uncompressed model",
    ):
        assert sum(words in reason for reason in reasons) == 1, reasons
    assert len(result.front) > 0


@pytest.mark.slow
def test_a_judge_that_fails_when_all_is_done_costs_nothing(
    small: Callable[..., SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise UsageError("Task.evaluate raised OSError: gone")

    monkeypatch.setattr("autocomp.run.found.evaluate_task", gone)
    result = small(tiny_task.task(), trials=6, measurements=2)
    assert len(result.front) > 0
    assert any("failed when it was read again" in text and "gone" in text for text in result.run.warnings)


MODULE = """
import torch, sys, time
from torch import nn
import autocomp

{body}
"""
MODULES: dict[str, tuple[str, str]] = {
    "leaves when imported": ("sys.exit(2)", "importing 'mine' raised SystemExit: 2"),
    "leaves when called": ("def task():\n    sys.exit('no data')", "the function raised SystemExit: no data"),
    "interrupts": ("def task():\n    raise KeyboardInterrupt", "the function raised KeyboardInterrupt"),
    "recurses": ("def task():\n    return task()", "the function raised RecursionError"),
    "returns nothing": ("def task():\n    pass", "must return an autocomp.Task"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_task_function_that_fails_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, words = MODULES[name]
    (tmp_path / "mine.py").write_text(MODULE.format(body=body))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    with pytest.raises(UsageError) as caught, interrupt.remembered():  # as every command has it
        load_task("mine:task")
    assert words in str(caught.value)


class Forward(tiny_task.TinyNet):
    """The network, with something done to its output."""

    def __init__(self, do: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.do = do

    def forward(self, x: Tensor) -> Any:
        return self.do(super().forward(x))


def leave(_: Tensor) -> Tensor:
    raise SystemExit(4)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "returns None": (lambda: Forward(lambda _: None), "output"),
    "returns no tensor": (lambda: Forward(lambda _: "text"), "output"),
    "leaves": (lambda: Forward(leave), "SystemExit"),
    "interrupts": (lambda: Forward(raising(KeyboardInterrupt("mine"))), "KeyboardInterrupt"),
    "complex": (lambda: Forward(lambda y: torch.view_as_complex(y.reshape(-1, 2, 2)).sum(-1)), "complex"),
    "outputs of no size": (lambda: Forward(lambda y: y[:, :0]), "output"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_used_is_refused(name: str, small: Callable[..., SearchResult], tmp_path: Path) -> None:
    make, words = MODELS[name]
    with pytest.raises(AutocompError) as caught, interrupt.remembered():
        small(replace(tiny_task.task(), model=make().eval()))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 10
    assert not (tmp_path / "run/config.yaml").exists()


def scaled(factor: float) -> list[tuple[Tensor, ...]]:
    return [(tiny_task.data(64, seed=1)[0] * factor,)]


def one_bad_sample() -> list[tuple[Tensor, ...]]:
    inputs = tiny_task.data(64, seed=1)[0]
    inputs[3] = 1e30
    return [(inputs,)]


CALIBRATIONS: dict[str, Callable[[], list[tuple[Tensor, ...]]]] = {
    "zeros": lambda: scaled(0.0),
    "one sample": lambda: [(tiny_task.data(1, seed=1)[0],)],
    "tiny": lambda: scaled(1e-30),
}
OUT_OF_RANGE: dict[str, Callable[[], list[tuple[Tensor, ...]]]] = {"all": lambda: scaled(1e30), "one": one_bad_sample}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALIBRATIONS)
def test_odd_calibration_data_end_in_a_front(name: str, small: Callable[..., SearchResult]) -> None:
    result = small(replace(tiny_task.task(), calibration=CALIBRATIONS[name]()))
    assert len(result.front) > 0
    assert all(point.record.evaluation.kl is not None for point in result)


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_calibration_data_out_of_range_are_said(name: str, small: Callable[..., SearchResult]) -> None:
    with pytest.raises(UsageError, match="calibration"):
        small(replace(tiny_task.task(), calibration=OUT_OF_RANGE[name]()))


def test_calibration_of_another_width_is_refused(small: Callable[..., SearchResult]) -> None:
    task = tiny_task.task()
    with pytest.raises(UsageError, match="calibration"):
        small(replace(task, calibration=[(torch.randn(8, 3, 8, 8),)]))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch, of the layer that this is about
def test_a_layer_of_no_outputs_is_no_obstacle(small: Callable[..., SearchResult]) -> None:
    class Empty(tiny_task.TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.none = nn.Linear(tiny_task.CLASSES, 0)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.cat([y, self.none(y)], 1)

    net = Empty()
    net.load_state_dict(tiny_task.weights(), strict=False)
    assert len(small(replace(tiny_task.task(), model=net.eval())).front) > 0


def test_check_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("def task():\n    while True:\n        pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("autocomp.run.checked.CHECK_SECONDS", 1.0)
    from autocomp.config.settings import load_settings

    with pytest.raises(UsageError, match="not done after 1 s"):
        autocomp.api.check(load_settings(None, {"task": "endless:task"}))


def test_streams_that_a_judge_closes_are_opened_again() -> None:
    code = """
import os, sys
from autocomp.tasks.untouched import process_kept
for _ in range(2):
    with process_kept():
        sys.stdout.close()
        sys.stderr.close()
        os.close(1)
    print("said", flush=True)
    print("complained", file=sys.stderr, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr.split()) == (["said"] * 2, ["complained"] * 2)
