"""Related models in one: channels in one order, ways to share a layer, the joint task, and the folder that is a task."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import autocomp
from autocomp.cli.main import main
from autocomp.errors import UsageError
from autocomp.fusion.align import aligned
from autocomp.fusion.fuse import _names
from autocomp.fusion.joint import MEAN, joint
from autocomp.fusion.shared import Way, choose
from autocomp.graph.analyse import analyse
from autocomp.tasks.task import Task, evaluate_task, load_task


class Net(nn.Module):
    """Two convolutions with norms, a residual one, a classifier."""

    def __init__(self, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.third = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, classes)
        for tensor in (self.norm.running_mean, self.norm.bias):
            nn.init.normal_(tensor, std=0.3)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.third(self.second(x).relu())
        return self.head(x.relu().mean((2, 3)))


def data(seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, 3, 8, 8, generator=generator)
    return x, torch.randint(0, classes, (96,), generator=generator)


def task_of(model: nn.Module, seed: int, name: str, **more: Any) -> Task:
    x, _ = data(seed)
    with torch.no_grad():
        told = model(x).argmax(1)  # the model itself is always right
    return Task(
        model=model, example_inputs=(x[:1],), calibration=[(x[:64],)], name=name, unit="%", outputs="classes@1",
        evaluate=lambda m: {"accuracy": (m(x).argmax(1) == told).float()}, test=None, **more,
    )  # fmt: skip


def shuffled(model: Net, seed: int = 5) -> Net:
    """The same function with its channels in another order, and those before a norm at another scale."""
    generator, found = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    inner, outer = torch.randperm(24, generator=generator), torch.randperm(16, generator=generator)
    scale = torch.rand(16, generator=generator) + 0.5
    with torch.no_grad():
        found.second.weight.copy_(found.second.weight[inner][:, outer])
        found.second.bias.copy_(found.second.bias[inner])
        found.third.weight.copy_(found.third.weight[outer][:, inner])
        found.third.bias.copy_(found.third.bias[outer])
        found.head.weight.copy_(found.head.weight[:, outer])
        found.first.weight.copy_((found.first.weight * scale.view(-1, 1, 1, 1))[outer])
        for name, power in (("running_mean", 1), ("running_var", 2), ("weight", 0), ("bias", 0)):
            tensor = getattr(found.norm, name)
            tensor.copy_((tensor * scale**power)[outer])
    return found


def test_another_order_of_channels_is_undone() -> None:
    model = Net()
    x = torch.randn(2, 3, 8, 8)
    first, second = (task_of(m, 0, "a").model for m in (model, shuffled(model)))
    assert torch.allclose(first(x), second(x), atol=1e-3)
    found = aligned(second, first, analyse(first, (x,)), (x,))
    assert torch.allclose(found(x), second(x), atol=1e-3)
    ours, theirs = dict(found.named_parameters()), dict(first.named_parameters())
    for name in ("first.weight", "second.weight", "third.weight", "head.weight"):
        assert torch.allclose(ours[name], theirs[name], atol=1e-3), name


def test_what_computes_the_same_is_shared_for_nothing(tmp_path: Path) -> None:
    model = Net()
    done = autocomp.fuse([task_of(model, 0, "one"), task_of(shuffled(model), 1, "two")], smaller=1.9, train=False)
    assert done.bytes["apart"] / done.bytes["fused"] > 1.8
    assert done.metrics["fused"]["accuracy"] == done.metrics["apart"]["accuracy"] == 1.0
    assert done.metrics["averaged"]["accuracy"] == 1.0
    assert set(done.ways.values()) <= {"own", "shared"}


def test_the_joint_task_is_judged_as_its_parts_are() -> None:
    tasks = [task_of(Net(seed=1), 0, "one"), task_of(Net(seed=2), 1, "two")]
    both = joint(tasks, ["one", "two"])
    x, y = data(0)[0][:5], data(1)[0][:5]
    first, second = both.model(x, y)
    assert torch.allclose(first, tasks[0].model(x), atol=1e-5)
    assert torch.allclose(second, tasks[1].model(y), atol=1e-5)
    with torch.no_grad():
        both.model.get_submodule("models.1.head").weight.zero_()
    found = evaluate_task(both, both.model)
    assert found["accuracy/one"] == 1.0
    assert found["accuracy/two"] < 1.0
    assert found["accuracy"] == pytest.approx((found["accuracy/one"] + found["accuracy/two"]) / 2)
    assert found.errors()["accuracy"] == pytest.approx(found.errors()["accuracy/two"] / 2, rel=0.02, abs=1e-9)


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 100), st.floats(0, 10)), max_size=4), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_choices_keep_within_what_they_may_take(sizes: list[list[tuple[int, float]]], share: float) -> None:
    found = {
        str(k): [
            Way("own", (), 100, 0.0),
            *(Way(str(n), (), weights, error) for n, (weights, error) in enumerate(each)),
        ]
        for k, each in enumerate(sizes)
    }
    least = sum(min(way.weights for way in each) for each in found.values())
    most = int(least + share * (100 * len(sizes) - least))
    chosen = choose(found, most)
    assert sum(way.weights for way in chosen.values()) <= most
    if most == 100 * len(sizes):
        assert all(way.error == 0 for way in chosen.values())


def test_training_makes_up_for_what_is_shared(tmp_path: Path) -> None:
    def taught(model: nn.Module, seed: int, name: str) -> Task:
        x, y = data(seed)
        return task_of(
            model, seed, name, train=[((x[:48],), y[:48]), ((x[48:],), y[48:])], loss=nn.functional.cross_entropy
        )

    tasks = [taught(Net(seed=3), 0, "one"), taught(Net(seed=4), 1, "two")]
    done = autocomp.fuse(tasks, smaller=1.5, length="60steps")
    assert done.bytes["apart"] / done.bytes["fused"] > 1.49
    assert done.training is not None
    assert done.training.steps == 60
    assert done.metrics["fused"]["accuracy"] >= done.metrics["shared"]["accuracy"]
    assert any(name != "own" for name in done.ways.values())


def test_of_the_same_inputs_what_all_share_first_is_run_once() -> None:
    model = Net()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight.neg_()
    tasks = [task_of(model, 0, "one"), task_of(other, 1, "two")]
    done = autocomp.fuse(tasks, smaller=1.8, train=False, same_inputs=True)
    assert len(done.task.example_inputs) == 1
    assert done.metrics["fused"]["accuracy"] == done.metrics["apart"]["accuracy"] == 1.0
    x = data(3)[0][:1]
    first, second = done.task.model(x)
    assert torch.allclose(first, model(x), atol=1e-3)
    assert torch.allclose(second, other(x), atol=1e-3)
    compiled = autocomp.compile(done.task.model, (x,))
    products = [kernel for kernel in compiled.kernels if kernel.operator != "rowwise"]
    assert len(products) == 1 + 2 * 3, "the first convolution is run once; each model has a norm of its own behind it"


class Reader(nn.Module):
    """An embedding, a dense layer, a classifier of sequences."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.dense, self.head = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(self.table(x)).relu().mean(1))


def test_embeddings_are_shared_too() -> None:
    x = torch.randint(0, 64, (96, 6), generator=torch.Generator().manual_seed(0))

    def reader(model: nn.Module, name: str) -> Task:
        told = model(x).argmax(1)
        return Task(
            model=model, example_inputs=(x[:1],), calibration=[(x[:64],)], outputs="classes@1", name=name,
            evaluate=lambda m: {"accuracy": (m(x).argmax(1) == told).float()},
        )  # fmt: skip

    same = Reader(0)
    done = autocomp.fuse([reader(same, "one"), reader(copy.deepcopy(same), "two")], smaller=1.9, train=False)
    assert done.ways["table"] == "shared"
    assert done.metrics["fused"]["accuracy"] == 1.0
    other = autocomp.fuse([reader(same, "one"), reader(Reader(1), "two")], smaller=1.5, train=False)
    assert other.bytes["apart"] / other.bytes["fused"] > 1.49


def with_batches(sizes: list[int], seed: int, name: str, **more: Any) -> Task:
    task, x = task_of(Net(seed=seed), seed, name, **more), data(seed)[0]
    return replace(task, calibration=[(batch,) for batch in x[: sum(sizes)].split(sizes)])


def test_all_calibration_data_are_taken_however_they_are_batched() -> None:
    both = joint([with_batches([96], 0, "one"), with_batches([16] * 4, 1, "two")], ["one", "two"])
    assert sum(len(first) for first, _ in both.calibration) == 96
    assert all(len(first) == len(second) for first, second in both.calibration)
    assert torch.equal(torch.cat([first for first, _ in both.calibration]), data(0)[0])
    assert torch.equal(torch.cat([second for _, second in both.calibration])[:64], data(1)[0][:64])


def test_training_batches_of_other_sizes_are_gone_through_in_parts() -> None:
    def taught(sizes: list[int], seed: int, name: str) -> Task:
        x, y = data(seed)
        pairs = [((a,), b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
        return task_of(Net(seed=seed), seed, name, train=pairs, loss=nn.functional.cross_entropy)

    both = joint([taught([96], 0, "one"), taught([32] * 3, 1, "two")], ["one", "two"])
    assert both.train is not None
    seen = list(both.train)
    assert [len(inputs[0]) for inputs, _ in seen] == [32] * 3
    assert torch.equal(torch.cat([targets[0] for _, targets in seen]), data(0)[1])
    uneven = replace(taught([96], 0, "one"), train=[((data(0)[0],), {"labels": data(0)[1]})])
    with pytest.raises(UsageError, match="cannot be taken apart"):
        list(joint([uneven, taught([32] * 3, 1, "two")], ["one", "two"]).train or ())


def test_the_error_of_the_mean_is_that_of_the_means() -> None:
    def judged(values: list[float], name: str) -> Task:
        return replace(task_of(Net(), 0, name), evaluate=lambda m: {"accuracy": torch.tensor(values)})

    both = joint([judged([1.0] * 200, "one"), judged([0.0] * 50, "two")], ["one", "two"])
    found = evaluate_task(both, both.model)
    assert found["accuracy"] == pytest.approx(0.5)
    assert found.errors()["accuracy"] == pytest.approx(0.0, abs=1e-9), "neither varies"
    noisy = joint([judged([0.0, 1.0] * 100, "one"), judged([0.0, 1.0] * 25, "two")], ["one", "two"])
    read = evaluate_task(noisy, noisy.model).errors()
    expected = (read["accuracy/one"] ** 2 + read["accuracy/two"] ** 2) ** 0.5 / 2
    assert read["accuracy"] == pytest.approx(expected, rel=0.02)


def test_objectives_of_other_names_have_a_mean() -> None:
    other = replace(task_of(Net(), 1, "two"), evaluate=lambda m: {"f1": 0.5, "f1/hard": 0.25, "seconds": 3.0})
    both = joint([task_of(Net(), 0, "one"), other], ["one", "two"])
    found = evaluate_task(both, both.model)
    assert list(found) == [MEAN, "mean/one", "mean/two", "mean/two/hard", "two/seconds"]
    assert found[MEAN] == pytest.approx(0.75)


def test_what_a_task_states_is_kept() -> None:
    x = data(0)[0]
    stated = replace(task_of(Net(), 0, "one"), outputs="regression@1", augment=lambda batch: (batch[0] + 1.0,))
    both = joint([stated, task_of(Net(), 1, "two")], ["one", "two"])
    assert both.outputs == ("regression@1", "classes@1")
    assert both.augment is not None
    first, second = both.augment((x, x))
    assert torch.equal(first, x + 1.0)
    assert torch.equal(second, x)


def test_every_name_is_another() -> None:
    tasks = [replace(task_of(Net(), 0, "x"), name=name) for name in ("a", "a", "a1", "b")]
    assert _names(tasks) == ["a2", "a3", "a1", "b"]


def test_heads_of_other_sizes_stay_their_own() -> None:
    done = autocomp.fuse(
        [task_of(Net(), 0, "one"), task_of(Net(classes=7, seed=9), 2, "two")], smaller=1.2, train=False
    )
    assert "head" not in done.ways
    assert done.metrics["apart"]["accuracy"] == 1.0
    assert done.task.model(data(0)[0][:2], data(2)[0][:2])[1].shape == (2, 7)


class Grouped(nn.Module):
    """Depthwise, grouped, transposed and dilated convolutions with biases."""

    def __init__(self, seed: int, dilation: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.into, self.deep = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.four = nn.Conv2d(16, 16, 3, padding=dilation, dilation=dilation, groups=4)
        self.up, self.head = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.Linear(12, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.four(self.deep(self.into(x).relu()).relu()).relu()
        return self.head(self.up(x).relu().mean((2, 3)))


def test_convolutions_of_all_kinds_are_shared() -> None:
    tasks = [task_of(Grouped(0), 0, "one"), task_of(Grouped(1), 1, "two")]
    done = autocomp.fuse(tasks, smaller=10.0, train=False)
    assert done.bytes["apart"] / done.bytes["fused"] > 1.7
    assert any("not 10x" in note for note in done.notes)
    assert {done.ways[name] for name in ("deep", "four", "up")} == {"shared"}
    unlike = autocomp.fuse(
        [task_of(Grouped(0), 0, "one"), task_of(Grouped(1, dilation=2), 1, "two")], smaller=1.7, train=False
    )
    assert "four" not in unlike.ways, "they read their inputs otherwise"


@pytest.mark.parametrize(
    ("tasks", "more", "message"),
    [
        (lambda: [task_of(Net(), 0, "one")], {}, "two tasks at least"),
        (lambda: [task_of(Net(), 0, "a"), tiny_task.task()], {}, "models of one architecture are fused"),
        (lambda: [task_of(Net(), 0, "a"), task_of(Net(), 0, "b", higher_is_better=False)], {}, "metrics can be averaged"),
        (lambda: [task_of(Net(), 0, "a")] * 2, {"smaller": "two"}, "smaller: "),
        (lambda: [task_of(Net(), 0, "a")] * 2, {"smaller": 0.5}, "at least 1x"),
        (lambda: [task_of(Net(), 0, "a")] * 2, {"out": "x"}, "Give names"),
        (lambda: [task_of(Net(), 0, "a")] * 2, {"length": "3epochs"}, "minutes or steps"),
        (lambda: [task_of(Net(), 0, "a"), tiny_task.task()], {"same_inputs": True}, "one architecture|the same inputs"),
        (lambda: ["digits", "digits"], {"out": "digits"}, "is the name of another task"),
        (lambda: ["digits", "digits"], {"out": "tk:a"}, "is the name of another task"),
        (lambda: ["digits", "nothing"], {"train": False}, "unknown task 'nothing'"),
    ],
)  # fmt: skip
def test_what_cannot_be_fused_is_said(tasks: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        autocomp.fuse(tasks(), **more)


def test_a_folder_is_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "both"
    names = ["tiny_task:task", "tiny_task:task"]
    assert main(["fuse", *names, "--out", str(out), "--smaller", "1.8x", "--minutes", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["names"] == ["tiny1", "tiny2"]
    found = load_task(str(out))
    read = evaluate_task(found, found.model)
    assert dict(read) == pytest.approx(said["metrics"]["fused"])
    assert said["bytes"]["apart"] / said["bytes"]["fused"] > 1.7
    assert main(["fuse", *names, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    stored = json.loads((out / "fusion.json").read_text())
    (out / "fusion.json").write_text(json.dumps({**stored, "sha256": "0" * 64}))
    with pytest.raises(UsageError, match=r"is not the file that fusion\.json was written for"):
        load_task(str(out))


@pytest.mark.slow
@pytest.mark.usefixtures("short_tuning")
def test_a_fused_model_is_searched(tmp_path: Path) -> None:
    autocomp.fuse(["tiny_task:task"] * 2, tmp_path / "both", smaller=1.5, length="30steps")
    result = autocomp.search(str(tmp_path / "both"), out=tmp_path / "run", trials=8, measurements=2, references=False)
    point = result.best()
    assert point.metrics.keys() >= {"accuracy", "accuracy/tiny1", "accuracy/tiny2"}
    model, x = point.load(), tiny_task.task().example_inputs[0]
    assert len(model(x, x)) == 2
