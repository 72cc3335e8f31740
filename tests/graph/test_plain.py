"""What a model may come as: converted on a copy, or refused in one message that says what to give instead."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import autocomp
from autocomp.api import _compiled
from autocomp.cli.main import main
from autocomp.errors import UsageError
from autocomp.graph.plain import plain, taking_any
from autocomp.tasks.task import Task, evaluate_task

torch.set_num_threads(1)
X = torch.linspace(-1, 1, 12).reshape(2, 6)


class Mixed(nn.Module):
    """Tied weights, a buffer, tensors in plain attributes, and a cast to the dtype that the model was made in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.full((6,), 0.5))
        self.scale = torch.full((6,), 2.0)
        self.scales = {"more": [torch.full((6,), 3.0)]}
        self.dtype = torch.float32
        self.where = torch.device("cpu")

    def to_dtype(self, dtype: torch.dtype) -> Mixed:
        self.to(dtype)
        self.scale, self.dtype = self.scale.to(dtype), dtype
        self.scales = {"more": [self.scales["more"][0].to(dtype)]}
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.where, self.dtype) + self.shift
        return self.second(torch.relu(self.first(x))) * self.scale * self.scales["more"][0]


def mixed(dtype: torch.dtype = torch.float32) -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval().to_dtype(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken_as_fp32_on_a_copy(dtype: torch.dtype) -> None:
    given = mixed(dtype)
    before = copy.deepcopy(given.state_dict())
    model, (x,), notes = plain(given, (X.to(dtype),))
    name = str(dtype).removeprefix("torch.")
    assert notes == [
        f"the model: {name} taken as float32, on a copy; sizes are of that",
        f"the example inputs: {name} taken as float32, on a copy; sizes are of that",
    ]
    assert isinstance(model, Mixed)
    assert {tensor.dtype for tensor in (*model.state_dict().values(), model.scale, x)} == {torch.float32}
    assert model.second.weight is model.first.weight, "what is tied stays tied"
    assert torch.allclose(model(x), mixed()(X), atol=2e-2 if dtype == torch.bfloat16 else 2e-3)
    assert {tensor.dtype for tensor in (*given.state_dict().values(), given.scale)} == {dtype}
    assert all(torch.equal(before[key], value) for key, value in given.state_dict().items())
    model.first.weight.data.zero_()
    assert given.first.weight.abs().sum() > 0, "the copy shares no memory with the model given"


def test_a_plain_model_is_taken_as_it_is() -> None:
    model = nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 2))
    x = torch.tensor([[0, 3]])
    found, (same,), notes = plain(model, (x,))
    assert found is model
    assert same is x
    assert notes == []


def compiled_inside() -> nn.Module:
    model = mixed()
    model.first = torch.compile(model.first, backend="eager")  # type: ignore[assignment]
    model.second.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
        lambda model: compiled_inside(),
    ],
    ids=["compiled", "parallel", "compiled parallel", "compiled inside"],
)
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, _, _ = plain(wrap(mixed()), (X,))
    assert isinstance(model, Mixed)
    assert [type(module) for module in model.modules()] == [Mixed, nn.Linear, nn.Linear]
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert torch.allclose(model(X), mixed()(X))
    torch.export.export(model, (X,))


def test_the_users_wrapped_model_is_left_alone() -> None:
    given = compiled_inside()
    plain(given, (X,))
    assert hasattr(given.first, "_orig_mod")
    assert given.second._compiled_call_impl is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_modules_of_exported_programs(dtype: torch.dtype) -> None:
    program = torch.export.export(mixed(dtype), (X.to(dtype),))
    model, (x,), _ = plain(program.module(), (X.to(dtype),))
    assert torch.allclose(model.eval()(x), mixed()(X), atol=2e-2)
    torch.export.export(model, (x,))
    with pytest.raises(UsageError, match=r"program\.module\(\)"):
        plain(program, (X,))  # type: ignore[arg-type]


def fake() -> nn.Module:
    with FakeTensorMode():
        return nn.Linear(6, 2)


def with_weight(make: Callable[[Tensor], Any]) -> nn.Module:
    model = nn.Module()
    model.register_buffer("table", make(torch.ones(6, 6)))
    return model


def traced_inside() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), torch.jit.trace(nn.Linear(6, 2).eval(), X))


REFUSED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "meta": (
        lambda: nn.Linear(6, 2, device="meta"),
        ["parameter 'weight' of Task.model has no values", "meta", "load"],
    ),
    "fake": (fake, ["parameter 'weight' of Task.model has no values", "fake"]),
    "lazy": (lambda: nn.LazyLinear(2), ["parameter 'weight' of Task.model is lazy", "run the model once"]),
    "scripted": (
        lambda: torch.jit.script(nn.Linear(6, 2)),
        ["Task.model was scripted or traced", "give the nn.Module"],
    ),
    "traced inside": (traced_inside, ["module '1' of Task.model was scripted or traced"]),
    "complex": (lambda: with_weight(lambda t: t.to(torch.complex32)), ["buffer 'table' of Task.model is of complex32"]),
    "float8": (lambda: with_weight(lambda t: t.to(torch.float8_e4m3fn)), ["is of float8_e4m3fn", "fp32"]),
    "quantised": (
        lambda: with_weight(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        ["buffer 'table' of Task.model is of qint8"],
    ),
    "sparse": (lambda: with_weight(lambda t: t.to_sparse()), ["buffer 'table' of Task.model is sparse", "to_dense"]),
    "nested": (
        lambda: with_weight(lambda t: torch.nested.nested_tensor([t, t[:2]], layout=torch.jagged)),
        ["buffer 'table' of Task.model is a NestedTensor"],
    ),
    "no module": (lambda: torch.relu, ["Task.model must be a torch.nn.Module"]),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")  # torch's own, of what it deprecates: scripts, quantised and nested tensors
def test_what_cannot_be_converted_is_refused(name: str) -> None:
    make, words = REFUSED[name]
    for call, said in (
        (lambda model: Task(model, (X,), [(X,)], lambda model: {"a": 1.0}), words),
        (lambda model: autocomp.compile(model, (X,)), [word.replace("Task.model", "the model") for word in words]),
        (lambda model: autocomp.measure(model, (X,)), [word.replace("Task.model", "the model") for word in words]),
    ):
        with pytest.raises(UsageError) as caught:
            call(make())
        for word in said:
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.ones(2, 6, device="meta"), "has no values (it is a meta tensor)"),
        (torch.ones(2, 6, dtype=torch.complex64), "is of complex64"),
        (torch.ones(2, 6).to_sparse(), "is sparse"),
        (torch.full((2, 6), float("nan")).bfloat16(), "NaN or infinite"),
    ],
)
def test_inputs_that_cannot_be_converted_are_refused(bad: Tensor, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Task(mixed(), (bad,), [(X,)], lambda model: {"a": 1.0})
    assert f"Task.example_inputs[0] {words}" in str(caught.value).replace("holds 12 value(s) that are ", "")
    with pytest.raises(UsageError, match=r"Task\.calibration\[1\]\[0\]"):
        Task(mixed(), (X,), [(X,), (bad,)], lambda model: {"a": 1.0})
    with pytest.raises(UsageError, match=r"example_inputs\[0\]"):
        autocomp.compile(mixed(), (bad,))


def test_one_tensor_is_not_a_tuple_of_rows() -> None:
    with pytest.raises(UsageError, match=r"example_inputs must be a tuple of tensors.*write \(tensor,\)"):
        autocomp.compile(mixed(), X)  # type: ignore[arg-type]


def test_a_task_in_bfloat16_is_evaluated_and_trained_on_bfloat16() -> None:
    seen = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(model(X.bfloat16()).dtype)
        return {"sum": float(model(x=X.bfloat16()).detach().sum())}

    train = [((X.bfloat16(),), torch.zeros(2))]
    task = Task(mixed(torch.bfloat16), (X.bfloat16(),), [(X.bfloat16(),)], evaluate, train=train)
    assert [note.partition(":")[0] for note in task.converted] == ["Task.model", "Task.example_inputs"]
    assert task.calibration[0][0].dtype == task.example_inputs[0].dtype == torch.float32
    assert evaluate_task(task, task.model)["sum"] == pytest.approx(float(mixed()(X).sum()), rel=0.05)
    assert seen == [torch.float32]
    assert not task.model._forward_pre_hooks
    for _ in range(2):
        assert [inputs[0].dtype for inputs, _ in task.train or ()] == [torch.float32]
    task.validate()
    assert len(task.converted) == 2


def test_inputs_of_any_kind_while_it_lasts() -> None:
    model = nn.Linear(6, 2)
    with taking_any(model):
        assert model(X.double()).dtype == torch.float32
    with pytest.raises(RuntimeError):
        model(X.double())


@pytest.mark.usefixtures("short_tuning")
def test_compiled_from_bfloat16_runs_on_bfloat16() -> None:
    device, compiled = _compiled(torch.compile(mixed(torch.bfloat16), backend="eager"), (X.bfloat16(),), "x86-host")
    assert torch.allclose(compiled.run(X.bfloat16()), mixed()(X), atol=5e-2)
    assert device.time(compiled, (X.bfloat16(),)).seconds > 0


@pytest.mark.usefixtures("short_tuning")
def test_a_file_in_bfloat16_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(mixed(torch.bfloat16), (X.bfloat16(),)), path)
    assert main(["measure", str(path)]) == 0
    assert "x86-host" in capsys.readouterr().out


def test_a_task_that_is_made_from_a_converted_one_stays_converted() -> None:
    task = Task(mixed(torch.bfloat16), (X.bfloat16(),), [(X,)], lambda model: {"sum": float(model(X.bfloat16()).sum())})
    again = dataclasses.replace(task, model=task.model)
    assert again.converted == task.converted
    assert evaluate_task(again, again.model) == evaluate_task(task, task.model)
