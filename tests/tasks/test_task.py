"""Tasks: what a user may bring, and how what cannot work is refused."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from torch import nn

from autocomp.errors import UsageError
from autocomp.tasks.task import Task, evaluate_task, load_task, objective_of
from autocomp.tasks.untouched import in_float32


def parts(**changes: Any) -> dict[str, Any]:
    fields = {
        "model": nn.Linear(3, 2),
        "example_inputs": (torch.ones(1, 3),),
        "calibration": [(torch.ones(4, 3),)],
        "evaluate": lambda model: {"accuracy": 1.0},
    }
    return {**fields, **changes}


def poisoned() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    return model


def bad_buffer() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].running_var[0] = float("inf")
    return model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "resnet"}, ["Task.model must be a torch.nn.Module", "str"]),
        ({"model": poisoned()}, ["parameter '1.weight'", "1 value(s)", "NaN", "of 6"]),
        ({"model": bad_buffer()}, ["buffer '1.running_var'"]),
        ({"example_inputs": torch.ones(1, 3)}, ["Task.example_inputs", "write (tensor,)"]),
        ({"example_inputs": ()}, ["Task.example_inputs must be a non-empty tuple"]),
        ({"example_inputs": (3,)}, ["Task.example_inputs[0] must be a tensor", "int"]),
        ({"example_inputs": (torch.ones(0, 3),)}, ["must hold samples", "(0, 3)"]),
        ({"calibration": []}, ["Task.calibration is empty"]),
        ({"calibration": iter([])}, ["Task.calibration must be a sequence", "list(loader)"]),
        ({"calibration": [torch.ones(4, 3)]}, ["Task.calibration[0]", "write (tensor,)"]),
        (
            {"calibration": [(torch.ones(4, 3),), (torch.ones(4, 3),) * 2]},
            ["Task.calibration[1] must have 1 tensor(s)"],
        ),
        ({"calibration": [(torch.ones(4, 3).long(),)]}, ["Task.calibration[0][0]", "int64"]),
        ({"calibration": [(torch.full((4, 3), float("inf")),)]}, ["Task.calibration[0][0] holds 12 value(s)"]),
        ({"evaluate": None}, ["Task.evaluate must be a function", "None"]),
        ({"test": 3}, ["Task.test must be a function"]),
        ({"train": 3}, ["Task.train must be an iterable"]),
        ({"name": ""}, ["Task.name"]),
    ],
)
def test_parts_that_cannot_work(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Task(**parts(**changes))
    for word in words:
        assert word in str(caught.value)


def test_lists_become_tuples() -> None:
    task = Task(**parts(example_inputs=[torch.ones(1, 3)], calibration=([torch.ones(4, 3)],)))
    assert isinstance(task.example_inputs, tuple)
    assert isinstance(task.calibration[0], tuple)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ({"accuracy": float("nan")}, "'accuracy' is nan"),
        ({"accuracy": 0.5, "wer": float("inf")}, "'wer' is inf"),
        ({}, "with an entry, got an empty dict"),
        (0.5, "must return a mapping"),
        ({"accuracy": "high"}, "'accuracy' is a value of type str"),
        ({"accuracy": torch.ones(2, 2)}, "'accuracy' is a value of type Tensor"),
        ({3: 0.5}, "the key 3"),
    ],
)
def test_metrics_that_cannot_work(returned: Any, words: str) -> None:
    task = Task(**parts(evaluate=lambda model: returned))
    with pytest.raises(UsageError, match=r"Task\.evaluate must") as caught:
        evaluate_task(task, task.model)
    assert words in str(caught.value)


def test_objective_comes_first() -> None:
    task = Task(**parts(evaluate=lambda model: {"wer": torch.tensor(0.25), "loss": 1}, objective="loss"))
    metrics = evaluate_task(task, task.model)
    assert list(metrics.items()) == [("loss", 1.0), ("wer", 0.25)]
    assert objective_of(Task(**parts()), {"a": 1.0, "b": 2.0}) == "a"
    with pytest.raises(UsageError, match="Did you mean 'loss'"):
        objective_of(Task(**parts(objective="lose")), metrics)


def test_test_split_is_its_own() -> None:
    task = Task(**parts(test=lambda model: {"accuracy": 0.5}))
    assert evaluate_task(task, task.model, "test") == {"accuracy": 0.5}
    with pytest.raises(UsageError, match=r"Task\.test is None"):
        evaluate_task(Task(**parts()), task.model, "test")


MODULE = """
import torch
from torch import nn
import autocomp

def make():
    return autocomp.Task(model=nn.Linear(3, 2), example_inputs=(torch.ones(1, 3),), calibration=[(torch.ones(4, 3),)],
                         evaluate=lambda model: {"accuracy": 1.0})

def empty():
    return autocomp.Task(model=nn.Linear(3, 2), example_inputs=(torch.ones(1, 3),), calibration=[],
                         evaluate=lambda model: {"accuracy": 1.0})

def number():
    return 3

def broken():
    raise ValueError("no such data")

value = 3
"""


@pytest.fixture
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_own.py").write_text(MODULE)
    (tmp_path / "users_bad.py").write_text("import users_missing_dependency")
    (tmp_path / "users_typo.py").write_text("def make(:")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_module")
def test_own_task_loads_and_takes_the_functions_name() -> None:
    task = load_task("users_own:make")
    assert task.name == "make"


@pytest.mark.usefixtures("_module")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("digit", ["unknown task 'digit'", "Did you mean 'digits'?", "package.module:function"]),
        ("users_own:mak", ["'users_own' has no 'mak'", "Did you mean 'make'?"]),
        ("users_own:value", ["'value' must be a function"]),
        ("users_own:number", ["must return an autocomp.Task", "int"]),
        ("users_own:broken", ["raised ValueError: no such data"]),
        ("users_own:empty", ["users_own:empty", "Task.calibration is empty"]),
        ("users_nowhere:make", ["there is no module 'users_nowhere'", "looked for"]),
        ("users_bad:make", ["there is no module 'users_missing_dependency'", "install it"]),
        ("users_typo:make", ["raised SyntaxError"]),
        ("users_own:", ["package.module:function"]),
        ("../users_own:make", ["package.module:function"]),
    ],
)
def test_specs_that_cannot_work(spec: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_task(spec)
    for word in words:
        assert word in str(caught.value)


def test_working_folder_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "users_here.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    assert load_task("users_here:make").name == "make"


def meddling() -> dict[str, Callable[[nn.Module], object]]:
    """What a judge may do beside judging."""

    def forget(model: nn.Module) -> None:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.zero_()

    return {
        "weights": forget,
        "hooks": lambda model: model.register_forward_hook(lambda _m, _i, output: output * 0),
        "mode": lambda model: model.train(),
        "gradients": lambda _: torch.set_grad_enabled(False),
        "dtype": lambda _: torch.set_default_dtype(torch.float64),
        "threads": lambda _: torch.set_num_threads(3),
        "folder": lambda _: os.chdir("/"),
        "streams": lambda _: setattr(sys, "stdout", None),
    }


@pytest.mark.parametrize("what", meddling())
def test_a_judge_leaves_nothing_behind(what: str) -> None:
    task = tiny_task.task()
    judge, meddle = task.evaluate, meddling()[what]

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        found = judge(model)
        meddle(model)
        return found

    def state() -> tuple[object, ...]:
        modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
        return *modes, os.getcwd(), sys.stdout, task.model.training

    before = state()
    task.evaluate = evaluate
    first = evaluate_task(task, task.model)
    assert state() == before
    assert evaluate_task(task, task.model) == first


@pytest.mark.parametrize("name", ["Task.example_inputs[0]", "Task.calibration[0][0]"])
def test_a_judge_that_writes_to_the_data_is_refused(name: str) -> None:
    task = tiny_task.task()
    task.example_inputs = tuple(tensor.clone() for tensor in task.example_inputs)
    task.calibration = [tuple(tensor.clone() for tensor in batch) for batch in task.calibration]
    written = task.example_inputs[0] if "example" in name else task.calibration[0][0]
    task.evaluate = lambda _: {"accuracy": float(written.mul_(0.5).sum())}
    with pytest.raises(UsageError, match=re.escape(f"Task.evaluate changed {name} in place")):
        evaluate_task(task, task.model)


@pytest.mark.parametrize("write", ["numpy", "data"])
def test_data_written_behind_torchs_back_are_seen(write: str) -> None:
    """Neither counts as a version of the tensor: a search once went on with calibration data of zeros, and said nothing."""
    task = Task(**parts())

    def evaluate(model: nn.Module) -> dict[str, float]:
        batch = task.calibration[0][0]
        if write == "numpy":
            batch.numpy()[:] = 0
        else:
            batch.data.zero_()
        return {"accuracy": 1.0}

    task.evaluate = evaluate
    with pytest.raises(UsageError, match=re.escape("changed Task.calibration[0][0] in place")):
        evaluate_task(task, task.model)


def test_device_and_autocast_are_put_back() -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        torch.set_default_device("meta")
        torch.set_autocast_enabled("cpu", True)
        return {"accuracy": 1.0}

    try:
        evaluate_task(Task(**parts(evaluate=evaluate)), nn.Linear(3, 2))
        assert torch.ones(1).device.type == "cpu"
        assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_default_device(None)
        torch.set_autocast_enabled("cpu", False)


def test_no_two_models_are_judged_at_one_address() -> None:
    seen: list[int] = []

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        seen.append(id(model))
        return {"accuracy": 1.0}

    task = Task(**parts(evaluate=evaluate))
    for _ in range(20):
        evaluate_task(task, task.model)
    assert len(set(seen)) == 20


def test_a_model_that_its_judge_keeps_stays_whole() -> None:
    kept: list[nn.Module] = []

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        kept.append(model)
        return {"accuracy": 1.0}

    task = Task(**parts(evaluate=evaluate))
    evaluate_task(task, task.model)
    assert torch.equal(kept[0](torch.ones(1, 3)), task.model(torch.ones(1, 3)))


def test_a_mean_and_its_error_are_no_samples() -> None:
    task = Task(**parts(evaluate=lambda model: {"accuracy": (0.97, 0.003)}))
    with pytest.raises(UsageError, match=r"a list, an array or a tensor.*tuple"):
        evaluate_task(task, task.model)


def test_the_callers_modes_change_nothing() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        with in_float32():
            assert layer(x).dtype == torch.float32
            assert layer(x).requires_grad
            assert torch.zeros(1).device.type == "cpu"
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.zeros(1).is_meta


def test_a_model_in_training_mode_is_judged_in_evaluation_mode() -> None:
    seen: list[bool] = []

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        seen.append(any(module.training for module in model.modules()))
        return {"accuracy": 1.0}

    task, model = Task(**parts(evaluate=evaluate)), nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    evaluate_task(task, model.train())
    assert seen == [False]
    assert model.training
