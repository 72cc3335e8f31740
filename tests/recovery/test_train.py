"""Training a compressed model: it learns, goes on where it was stopped, hands back nothing worse, and says why it cannot."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import autocomp
from autocomp.compress.scales import quantised
from autocomp.errors import CorruptError, UsageError
from autocomp.recovery import lessons as drawn
from autocomp.recovery import stored
from autocomp.recovery.lessons import Lessons, Teaching
from autocomp.recovery.losses import Features, distillation_loss, labels_loss, sureness
from autocomp.recovery.one import recovered
from autocomp.recovery.rate import lowest, search_rate
from autocomp.recovery.recipe import Recipe, list_recipes, load_recipe
from autocomp.recovery.schedules import Span, learning_rate, temperature
from autocomp.recovery.train import STOPPED, train
from autocomp.tasks.divergence import Comparison, total
from autocomp.tasks.outputs import Output

torch.set_num_threads(1)
PLAIN = load_recipe("default").model_copy(update={"learning_rate": 3e-3})


class Batches:
    """Batches of the tiny task with labels, the same at each pass."""

    def __init__(self, count: int = 6, samples: int = 64) -> None:
        self.count, self.samples = count, samples

    def __iter__(self) -> Iterator[Any]:
        for seed in range(self.count):
            inputs, labels = tiny_task.data(self.samples, seed=100 + seed)
            yield (inputs,), labels


def task(**changes: Any) -> autocomp.Task:
    return replace(tiny_task.task(), **{"train": Batches(), "loss": functional.cross_entropy, **changes})


def damaged(model: nn.Module) -> nn.Module:
    """The tiny net with a quantised layer, and a head that answers wrongly."""
    model = copy.deepcopy(model)
    model.set_submodule("conv1", quantised(model.get_submodule("conv1"), 20.0, 0))
    with torch.no_grad():
        model.get_submodule("head").weight.mul_(0.1).add_(
            0.3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        )
    return model


def teaching(of: autocomp.Task) -> Teaching:
    made = Teaching.of(of)
    made.lessons.draw()
    return made


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_brings_a_damaged_model_back_and_leaves_teacher_and_model_alone() -> None:
    made = task()
    model = damaged(made.model)
    before, teacher = copy.deepcopy(model.state_dict()), copy.deepcopy(made.model.state_dict())
    done = recovered(model, made, PLAIN, Span(steps=40))
    assert done.better
    assert done.after["accuracy"] > done.before["accuracy"] + 0.2
    assert done.steps == 40
    assert done.curve[-1][1] < done.curve[0][1]
    assert done.after["accuracy"] == pytest.approx(made.evaluate(done.model)["accuracy"])
    assert same(before, model.state_dict())
    assert same(teacher, made.model.state_dict())
    assert not done.model.training


def test_without_labels_it_learns_from_the_teacher_alone() -> None:
    made = tiny_task.task()
    done = recovered(damaged(made.model), made, PLAIN, Span(steps=40))
    assert done.after["accuracy"] > done.before["accuracy"]


def test_calibration_data_are_varied_where_the_task_says_how() -> None:
    asked: list[int] = []

    def louder(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        asked.append(len(batch[0]))
        return (batch[0] + 0.1 * torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(len(asked))),)

    made = Teaching.of(replace(tiny_task.task(), augment=louder)).lessons
    made.draw(most=3)
    assert asked[:3] == [64] * 3
    first, second = made.pool[:2]
    assert not torch.equal(first.inputs[0], second.inputs[0])
    assert first.target is None


def test_what_training_makes_worse_is_not_handed_back() -> None:
    made = task()
    wild = PLAIN.model_copy(update={"learning_rate": 1.0, "clip": 1e6})
    done = recovered(made.model, made, wild, Span(steps=20))
    assert not done.better
    assert done.model is made.model
    assert done.after == done.before


def test_a_training_that_diverges_says_so() -> None:
    made = task(loss=None)
    broken = copy.deepcopy(made.model)
    with torch.no_grad():
        broken.get_submodule("head").bias.fill_(torch.inf)
    done = train(broken, teaching(made), PLAIN, Span(steps=5), 1e-3)
    assert "not finite at step 1" in done.failure


def test_one_that_is_stopped_goes_on_on_the_same_curve(tmp_path: Path) -> None:
    made = teaching(task())
    model, span = damaged(made.teacher), Span(steps=30)
    whole = train(model, made, PLAIN, span, 3e-3)
    asked, path = iter(range(100)), tmp_path / "it.part"
    first = train(model, made, PLAIN, span, 3e-3, checkpoint=path, stop=lambda: next(asked) >= 11)
    assert first.failure == STOPPED
    assert first.steps == 12
    rest = train(model, made, PLAIN, span, 3e-3, checkpoint=path)
    assert same(whole.weights, rest.weights)
    assert whole.curve == rest.curve
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    made = teaching(task())
    model, span, path = damaged(made.teacher), Span(steps=20), tmp_path / "it.part"
    for limit in (4, 9):
        asked = iter(range(100))
        train(model, made, PLAIN, span, 3e-3, checkpoint=path, stop=lambda: next(asked) >= limit)  # noqa: B023 - called here
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="damaged"):
        stored.read(path)
    rest = train(model, made, PLAIN, span, 3e-3, checkpoint=path)
    assert rest.steps == 20
    assert same(rest.weights, train(model, made, PLAIN, span, 3e-3).weights)


def test_weights_come_back_from_their_file_and_from_no_other(tmp_path: Path) -> None:
    made = teaching(task())
    model = damaged(made.teacher)
    done = train(model, made, PLAIN, Span(steps=5), 3e-3)
    stored.write(tmp_path / "w.pt", {stored.FORM: done.weights})
    back = stored.restored(model, tmp_path / "w.pt")
    assert same(done.model.state_dict(), back.state_dict())
    with pytest.raises(CorruptError, match="another candidate"):
        stored.restored(made.teacher, tmp_path / "w.pt")


def test_weights_are_known_by_their_content(tmp_path: Path) -> None:
    made = teaching(task())
    model = damaged(made.teacher)
    first, second = (train(model, made, PLAIN, Span(steps=steps), 3e-3).weights for steps in (3, 5))
    names = [stored.write_by_content(tmp_path, "abc-f00-0", weights) for weights in (first, second)]
    assert names[0] != names[1]
    assert stored.write_by_content(tmp_path, "abc-f00-0", first) == names[0]
    assert same(stored.read(tmp_path / names[1])[stored.FORM], second)
    shutil.copy(tmp_path / names[1], tmp_path / names[0])  # as from another run
    with pytest.raises(CorruptError, match="another training"):
        stored.read(tmp_path / names[0])


def test_a_stage_without_rounding_ends_in_what_is_delivered() -> None:
    stages = [{"name": "floats", "share": 0.5, "rounding": False}, {"name": "integers", "share": 0.5}]
    recipe = Recipe(format_version=1, stages=stages, learning_rate=3e-3, ema=0.9)
    made = task()
    done = recovered(damaged(made.model), made, recipe, Span(steps=40))
    assert done.better
    assert "QuantConv2d" in str(done.model.get_submodule("conv1"))


def test_layers_that_are_shared_are_matched_in_the_channels_that_were_kept() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    kept, student = torch.tensor([0, 2, 5]), nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3))
    x, features = torch.randn(4, 1, 8, 8), Features(teacher, {"0": kept, "2": None})
    with torch.no_grad(), features.recorded(teacher) as expected:
        teacher(x)
    with features.recorded(student) as actual:
        student(x)
    assert float(features.loss(expected, actual)) > 0.1
    with torch.no_grad():
        student[0].weight.copy_(teacher[0].weight[kept])
        student[0].bias.copy_(teacher[0].bias[kept])
    only = Features(teacher, {"0": kept})
    with only.recorded(student) as actual:
        student(x)
    assert float(only.loss(expected, actual)) == pytest.approx(0, abs=1e-10)
    recipe = PLAIN.model_copy(update={"stages": [PLAIN.stages[0].model_copy(update={"features": 1.0})]})
    made = task()
    assert recovered(damaged(made.model), made, recipe, Span(steps=20), {"conv2": None}).better


@pytest.mark.parametrize("recipe", [PLAIN.model_copy(update={"autocast": "bf16"})])
def test_it_learns_in_bfloat16_and_delivers_float32(recipe: Recipe) -> None:
    made = task()
    done = recovered(damaged(made.model), made, recipe, Span(steps=40))
    assert done.better
    assert {tensor.dtype for tensor in done.model.parameters()} == {torch.float32}


# --- what is learnt from ---


def test_the_loss_at_temperature_one_is_the_divergence() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(6, 1, 5), torch.randn(6, 1, 5).requires_grad_()
    comparison = Comparison((Output("output", "classes", 2),), (1,), (None,))
    expected = total(comparison, [([teacher], [student])])
    assert distillation_loss(comparison, [teacher], [student], 1.0).item() == pytest.approx(expected, rel=1e-5)
    same = teacher.clone().requires_grad_()
    assert distillation_loss(comparison, [teacher], [same], 3.0).item() == pytest.approx(0, abs=1e-6)
    assert sureness(comparison, [torch.zeros(2, 1, 5)]) == pytest.approx(0, abs=1e-6)
    assert sureness(comparison, [100 * torch.eye(5)[None]]) == pytest.approx(1, abs=1e-6)


@given(along=st.floats(0, 1), hot=st.floats(1, 8), cold=st.floats(1, 8), sure=st.floats(0, 1))
def test_temperatures_and_rates_stay_between_their_ends(along: float, hot: float, cold: float, sure: float) -> None:
    hot, cold = max(hot, cold), min(hot, cold)
    for kind in ("constant", "cosine", "entropy"):
        assert cold - 1e-9 <= temperature(kind, hot, cold, along, sure) <= hot + 1e-9
    for schedule in ("one-cycle", "cosine", "constant"):
        assert 0 < learning_rate(schedule, along) <= 1
    assert temperature("cosine", hot, cold, 0.0, sure) == pytest.approx(hot)
    assert temperature("cosine", hot, cold, 1.0, sure) == pytest.approx(cold)


def test_a_span_ends_with_its_steps_or_its_seconds() -> None:
    assert Span(steps=10).along(5, 1e9) == 0.5
    assert Span(seconds=10.0).along(10**9, 5.0) == 0.5
    assert Span(steps=10, seconds=1.0).along(1, 0.9) == 0.9


def test_the_rate_of_the_least_loss_is_taken_and_the_least_where_all_diverge() -> None:
    found = lowest(lambda rate: abs(math.log10(rate) + 2.6), [1e-5, 1e-4, 1e-3, 1e-2], 1e-2)
    assert found.taken == pytest.approx(10**-2.5)
    assert str(found) == "3.2e-03 (of 6 from 1e-05 to 1e-02)"
    assert lowest(lambda rate: math.inf, [1e-5, 1e-4], 1e-2).taken == 1e-5
    assert lowest(lambda rate: 1.0 if rate < 1e-3 else 1.01, [1e-5, 1e-4, 1e-3, 1e-2], 1e-3).taken == 1e-2


def test_a_search_for_the_rate_keeps_to_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made, steps = teaching(task()), []

    def counted(*given: Any) -> list[float]:
        steps.append(given[3].steps)
        clock[0] += given[3].steps * 1.0  # a second a step
        return [abs(math.log10(given[4]) + 2.0) + 1.0] * given[3].steps

    clock = [0.0]
    monkeypatch.setattr("autocomp.recovery.rate.losses", counted)
    monkeypatch.setattr("autocomp.recovery.rate.time.monotonic", lambda: clock[0])
    recipe = PLAIN.model_copy(update={"learning_rate": None, "learning_rates": (1e-4, 1e-2)})
    assert search_rate(made.teacher, made, recipe).taken == 1e-2
    assert steps == [2, 12, 12, 12, 12]  # the best is the highest: one beside it
    for seconds, expected in ((1000.0, 12), (42.0, 8), (15.0, 4)):
        steps.clear()
        found = search_rate(made.teacher, made, recipe, seconds)
        assert set(steps[1:]) == {expected}
        assert sum(steps) <= seconds
        assert found.step_seconds == 1.0
    steps.clear()
    assert str(search_rate(made.teacher, made, recipe, 5.0)).startswith("1.0e-03, the middle of the range")
    assert steps == [2]


def test_lessons_are_drawn_once_and_gone_through_in_another_order_each_time() -> None:
    made = teaching(task()).lessons
    assert (len(made.pool), made.passes, made.each_pass) == (6, 1, 6)  # the same at each pass: one says all
    some = made.begin(0)
    first, second = ([id(next(some)) for _ in range(6)] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second
    later = made.begin(8)
    assert [id(next(later)) for _ in range(4)] == second[2:]
    made.seed = 1
    other = made.begin(0)
    assert [id(next(other)) for _ in range(6)] != first


def test_data_that_do_not_fit_are_drawn_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "POOL_BYTES", 1)
    made = teaching(task()).lessons
    assert made.pool == []
    from_the_start, from_the_fourth = made.begin(0), made.begin(4)
    wanted = [next(from_the_start) for _ in range(9)][4:]
    for one, other in zip(wanted, from_the_fourth, strict=False):
        assert torch.equal(one.inputs[0], other.inputs[0])
        assert torch.equal(one.rows[0], other.rows[0])


# --- bad input ---


class Ends:
    """A loader that raises, blocks or yields the wrong thing at its second batch."""

    def __init__(self, how: Any) -> None:
        self.how = how

    def __iter__(self) -> Iterator[Any]:
        inputs, labels = tiny_task.data(16, seed=1)
        yield (inputs,), labels
        if self.how == "raises":
            raise OSError("the disk went away")
        if self.how == "blocks":
            time.sleep(30)
        yield self.how


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "Task.train raised OSError after batch 0: the disk went away"),
        ("blocks", "Task.train gave no batch within 0 s after batch 0: does its loader block?"),
        (torch.zeros(3), "Task.train batch 1 must be a pair"),
        ((torch.zeros(3), torch.zeros(3)), "Task.train batch 1, its inputs must be a tuple of tensors"),
        (((torch.full((2, 1, 8, 8), torch.nan),), torch.zeros(2)), "NaN or infinite"),
        (((torch.zeros(2, 1, 8, 8),) * 2, torch.zeros(2)), "must have 1 input"),
    ],
)
def test_a_loader_that_fails_is_named(how: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "BLOCKED", 0.2)
    made = replace(tiny_task.task(), train=Ends(how), loss=functional.cross_entropy)
    with pytest.raises(UsageError, match=said):
        Teaching.of(made).lessons.draw()


def test_no_data_at_all_is_refused() -> None:
    made = replace(tiny_task.task(), train=[], loss=functional.cross_entropy)
    with pytest.raises(UsageError, match=r"Task\.train yields no batch"):
        Lessons(made, made.model, Teaching.of(made).comparison).draw()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda output, target: (output.argmax(1) != target).float().mean(), "must be differentiable"),
        (lambda output, target: functional.cross_entropy(output, target, reduction="none"), "a scalar tensor"),
        (lambda output, target: 0.5, "it returned a float"),
        (
            lambda output, target: functional.cross_entropy(output, target[:3]),
            "Task.loss raised ValueError for targets of shape",
        ),
    ],
)
def test_a_loss_that_cannot_be_minimised_is_named(loss: Any, said: str) -> None:
    inputs, labels = tiny_task.data(16, seed=1)
    with pytest.raises(UsageError, match=said):
        labels_loss(loss, tiny_task.model()(inputs), labels)


def test_too_short_a_training_says_what_it_takes() -> None:
    made = task()
    with pytest.raises(UsageError, match="2 steps are too few to learn anything: give 6 at least"):
        recovered(made.model, made, PLAIN, Span(steps=2))
    searched = load_recipe("default")
    with pytest.raises(UsageError, match=r"are too short: a step takes .* a pass through the data"):
        recovered(damaged(made.model), made, searched, Span(seconds=1e-3))


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing of this model can be trained"):
        train(nn.Flatten(), teaching(task()), PLAIN, Span(steps=2), 1e-3)


def test_what_only_decides_cannot_be_distilled() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_task.model()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(1)

    inputs, _ = tiny_task.data(16, seed=1)
    made = autocomp.Task(
        model=Decides().eval(), example_inputs=(inputs[:1],), calibration=[(inputs,)], evaluate=lambda model: {"a": 1.0}
    )
    with pytest.raises(UsageError, match="there is nothing to train towards"):
        Teaching.of(made)


# --- recipes ---


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_read_and_end_in_what_is_delivered(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.stages[-1].rounding


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("format_version: 1\nstages: [{name: a, sharee: 1.0}]", "sharee"),
        ("format_version: 1\nstages: [{name: a, share: 0.5}]", "must be 1 together, got 0.5"),
        ("format_version: 1\nstages: [{name: a, logits: 0, labels: 0}]", "learns from nothing"),
        ("format_version: 1\nstages: [{name: a, hot: 1.0, cold: 2.0}]", "must not be above hot"),
        ("format_version: 1\nstages: [{name: a, rounding: false}]", "must train what is delivered"),
        ("format_version: 1\nlearning_rates: [0.1, 0.01]\nstages: [{name: a}]", "the lower first"),
        ("format_version: 2\nstages: []", "a newer one wrote it"),
        ("[]", "must be a mapping"),
    ],
)
def test_a_recipe_that_is_wrong_says_where(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=said):
        load_recipe(tmp_path / "r.yaml")


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(UsageError, match="Did you mean 'default'"):
        load_recipe("defualt")
