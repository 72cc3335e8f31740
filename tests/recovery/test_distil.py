"""Short distillation on a tiny net: it learns, says why it cannot, and its temperature falls."""

from __future__ import annotations

import copy

import pytest
import tiny_task
import torch
from hypothesis import given
from hypothesis import strategies as st

from autocomp.errors import AutocompError, UsageError
from autocomp.recovery.distill import COLD, HOT, distil, distillation_loss, temperature
from autocomp.tasks.divergence import Comparison, compare, total
from autocomp.tasks.outputs import Output

torch.set_num_threads(1)


class Batches:
    """Four batches, afresh each time."""

    def __iter__(self):
        for seed in range(4):
            inputs, labels = tiny_task.data(32, seed=seed)
            yield (inputs,), labels


@given(steps=st.integers(2, 200))
def test_temperature_falls_from_hot_to_cold(steps: int) -> None:
    values = [temperature(step, steps) for step in range(steps)]
    assert values[0] == HOT
    assert values[-1] == pytest.approx(COLD)
    assert values == sorted(values, reverse=True)


def distance(teacher: torch.nn.Module, model: torch.nn.Module, inputs: torch.Tensor) -> float:
    with torch.no_grad():
        comparison, rows = compare((Output("output", "classes", 1),), [(teacher(inputs), len(inputs))], len(inputs))
        return total(comparison, [(rows[0], comparison.rows(model(inputs), len(inputs)))])


def test_the_loss_at_temperature_one_is_the_divergence() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(6, 1, 5), torch.randn(6, 1, 5).requires_grad_()
    comparison = Comparison((Output("output", "classes", 2),), (1,), (None,))
    expected = total(comparison, [([teacher], [student])])
    assert distillation_loss(comparison, [teacher], [student], 1.0).item() == pytest.approx(expected, rel=1e-5)
    same = teacher.clone().requires_grad_()
    assert distillation_loss(comparison, [teacher], [same], 3.0).item() == pytest.approx(0, abs=1e-6)


def test_it_brings_a_damaged_model_back_towards_its_teacher() -> None:
    teacher = tiny_task.model()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.head.weight.mul_(0.2)
    inputs, _ = tiny_task.data(128, seed=9)
    before = distance(teacher, model, inputs)
    torch.manual_seed(0)
    distil(model, teacher, Batches(), steps=30, learning_rate=2e-2)
    assert not model.training
    assert distance(teacher, model, inputs) < 0.5 * before


def test_what_cannot_be_trained_is_refused() -> None:
    teacher = tiny_task.model()
    with pytest.raises(UsageError, match="yields no batch"):
        distil(copy.deepcopy(teacher), teacher, [], steps=2)
    with pytest.raises(UsageError, match="every layer of this model is quantised"):
        distil(torch.nn.Sequential(), teacher, Batches(), steps=2)
    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        broken.head.bias.fill_(torch.inf)
    with pytest.raises(AutocompError, match="diverged at step"):
        distil(broken, teacher, Batches(), steps=2)
