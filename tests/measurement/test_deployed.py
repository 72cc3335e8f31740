"""A compiled module is judged by the task's own metric: called as the model it was made of, whatever batches the metric asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from points import EVALUATION
from torch import Tensor, nn

import autocomp
from autocomp.graph.canonical import canonical
from autocomp.graph.program import CanonicalModel
from autocomp.measurement.deployed import DeployedModel, read_deployed
from autocomp.records.run import Deployed, FrontPoint
from autocomp.run.finish import unread
from autocomp.tasks.task import Task, evaluate_task

INPUTS = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """Outputs of several kinds: by name, nested, and one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.body(x).relu()
        return {"logits": self.head(hidden), "more": (hidden, None)}


class Turned(nn.Module):
    """Samples along the second axis, of the output too, and a table without any."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1) + table


def fixed(model: CanonicalModel, size: int, axis: int = 0) -> Callable[..., object]:
    """What a compiler makes of a model: tensors in a row, for one batch size alone."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        assert inputs[0].shape[axis] == size
        found = model.code.run(model, *inputs)
        return tuple(value for value in found if isinstance(value, Tensor))

    return run


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 5), samples=st.integers(1, 12))
def test_any_number_of_samples_gives_what_torch_gives(size: int, samples: int) -> None:
    model = canonical(Heads().eval(), (INPUTS[:size],))
    deployed = DeployedModel(model, fixed(model, size), (INPUTS[:size],), 60.0)
    with torch.no_grad():
        found, expected = deployed(INPUTS[:samples]), model(INPUTS[:samples])
    assert list(found) == ["logits", "more"]
    assert found["more"][1] is None
    assert torch.allclose(found["logits"], expected["logits"], atol=1e-6)
    assert torch.allclose(found["more"][0], expected["more"][0], atol=1e-6)


@pytest.mark.parametrize("samples", [1, 2, 3, 7])
def test_samples_may_lie_along_any_axis(samples: int) -> None:
    x, table = torch.randn(3, 7, 6), torch.randn(3, 1, 4)
    model = canonical(Turned().eval(), (x[:, :2], table), batch_axes=(1, None))
    deployed = DeployedModel(model, fixed(model, 2, axis=1), (x[:, :2], table), 60.0)
    with torch.no_grad():
        assert torch.allclose(deployed(x[:, :samples], table), model(x[:, :samples], table), atol=1e-6)


def task_of(metric: Callable[[Tensor], Any]) -> tuple[Task, Any]:
    def evaluate(model: nn.Module) -> dict[str, Any]:
        return {"metric": metric(model(INPUTS)["logits"])}

    task = Task(model=Heads().eval(), example_inputs=(INPUTS[:2],), calibration=[(INPUTS,)], evaluate=evaluate)
    read = evaluate_task(task, task.model)
    return task, replace(EVALUATION, metrics=dict(read), errors=read.errors())


def test_what_agrees_is_said_to() -> None:
    task, told = task_of(lambda logits: float(logits.mean()))
    read = read_deployed(task, told, task.model, fixed(task.model, 2), "model.so")
    assert read.metrics["metric"] == pytest.approx(told.metrics["metric"], rel=1e-4)
    assert (read.differs, read.note, read.file) == ((), "", "model.so")


def test_a_difference_is_held_to_its_noise() -> None:
    def off(model: CanonicalModel, by: Tensor) -> Callable[..., object]:
        run = fixed(model, 2)

        def shifted(*inputs: Tensor) -> tuple[Tensor, ...]:
            logits, hidden = run(*inputs)  # type: ignore[misc]
            return logits + by * torch.randn_like(logits), hidden

        return shifted

    torch.manual_seed(0)
    task, told = task_of(lambda logits: logits[:, 0])
    noise = read_deployed(task, told, task.model, off(task.model, torch.tensor(0.05)), "model.so")
    assert noise.differs == (), "it differs, by no more than chance"
    assert noise.errors["metric"] > 0
    wrong = read_deployed(task, told, task.model, lambda *x: tuple(v + 1 for v in fixed(task.model, 2)(*x)), "model.so")  # type: ignore[attr-defined]
    assert wrong.differs == ("metric",)
    task, told = task_of(lambda logits: float(logits.mean()))
    unknown = read_deployed(task, told, task.model, off(task.model, torch.tensor(0.5)), "model.so")
    assert unknown.differs == ("metric",)
    assert not unknown.errors, "no noise is known"


def test_why_it_was_not_read_is_said() -> None:
    task, told = task_of(lambda logits: float(logits.mean()))

    def slow(*inputs: Tensor) -> object:
        time.sleep(0.02)
        return fixed(task.model, 2)(*inputs)

    assert read_deployed(task, told, task.model, slow, "model.so", 0.05).note == "not read in 0 s"
    other = replace(task, evaluate=lambda model: {"metric": float(model(INPUTS[:, None])["logits"].mean())})
    assert "is compiled for [[2, 6]]" in read_deployed(other, told, task.model, slow, "model.so").note

    def fails(*_: Tensor) -> object:
        raise RuntimeError("the board is gone")

    assert "the board is gone" in read_deployed(task, told, task.model, fails, "model.so").note


def test_points_whose_metric_was_not_read_are_told_of() -> None:
    late, read = Deployed("model.so", note="not read in 60 s"), Deployed("model.so", {"accuracy": 0.9})
    points = [FrontPoint(EVALUATION, deployed={"x86-host": late}), FrontPoint(EVALUATION, deployed={"x86-host": read})]
    (said,) = unread(points)
    assert EVALUATION.candidate.id in said
    assert "torch's alone: by the file that was written it was not read in 60 s" in said
    assert unread(points[1:]) == []


@pytest.mark.slow
def test_a_run_reads_the_metric_from_its_libraries(tmp_path: Path, spaces: dict[str, str], short_tuning: None) -> None:
    result = autocomp.search(
        "tiny_task:task", out=tmp_path / "run", space=spaces["full"], trials=6, measurements=2, references=False
    )
    points = [point.record for point in result.front]
    for point in points:
        read = point.deployed["x86-host"]
        assert (read.file, read.note) == ("model.so", "")
        assert read.metrics["accuracy"] == pytest.approx(point.evaluation.metrics["accuracy"], abs=0.02)
    again = autocomp.SearchResult(tmp_path / "run")
    assert [point.record for point in again.front] == points
    assert "as model.so computes it" in (tmp_path / "run" / "report.html").read_text()
