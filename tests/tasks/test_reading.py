"""Standard errors of metrics: known where a task gives the values of samples, and of differences sample by sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_task
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autocomp.errors import UsageError
from autocomp.tasks.reading import Metrics, otherwise, values_of
from autocomp.tasks.task import Task, evaluate_task


def task(returned: object) -> Task:
    made = tiny_task.task()
    made.evaluate = lambda _: returned  # type: ignore[assignment, return-value]
    return made


@pytest.mark.parametrize("given_as", [torch.tensor, np.array, list, lambda v: torch.tensor(v).bool()])
def test_a_metric_of_samples_is_their_mean(given_as) -> None:
    made = task({"accuracy": given_as([1.0, 0.0, 1.0, 1.0]), "loss": 0.3})
    read = evaluate_task(made, made.model)
    assert dict(read) == {"accuracy": 0.75, "loss": 0.3}
    assert read.errors() == {"accuracy": pytest.approx(0.25)}


@pytest.mark.parametrize("kind", [np.float64, np.float32, "tensor"])
def test_one_array_may_be_filled_for_each_model(kind: object) -> None:
    out: Any = torch.zeros(4, dtype=torch.float64) if kind == "tensor" else np.zeros(4, dtype=kind)  # type: ignore[call-overload]
    made = task({"accuracy": out})
    out[:] = torch.tensor([1.0, 0.0, 1.0, 1.0]) if kind == "tensor" else [1.0, 0.0, 1.0, 1.0]
    first = evaluate_task(made, made.model)
    out[:] = torch.tensor([1.0, 0.0, 0.0, 0.0]) if kind == "tensor" else [1.0, 0.0, 0.0, 0.0]
    second = evaluate_task(made, made.model)
    assert first.errors() == {"accuracy": pytest.approx(0.25)}
    assert second.drop_errors(first)["accuracy"] == pytest.approx(np.std([0, 0, 1, 1], ddof=1) / 2)


def test_a_difference_is_surer_than_its_sides() -> None:
    dense = Metrics({"accuracy": 0.5}, {"accuracy": np.array([1.0, 0.0, 1.0, 0.0])})
    same = Metrics({"accuracy": 0.5}, {"accuracy": np.array([1.0, 0.0, 1.0, 0.0])})
    other = Metrics({"accuracy": 0.25}, {"accuracy": np.array([1.0, 0.0, 0.0, 0.0])})
    assert same.drop_errors(dense) == {"accuracy": 0.0}
    assert other.drop_errors(dense)["accuracy"] == pytest.approx(0.25)
    assert other.drop_errors(None) == {}
    assert Metrics({"accuracy": 0.5}).drop_errors(dense) == {}
    fewer = Metrics({"accuracy": 0.5}, {"accuracy": np.array([1.0, 0.0])})
    assert fewer.drop_errors(dense) == {}, "other samples say nothing of the difference"


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=50))
def test_the_error_is_that_of_a_mean(values: list[float]) -> None:
    found = Metrics({"m": float(np.mean(values))}, {"m": np.array(values)}).errors()["m"]
    assert found == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), torch.ones(1), "text", np.ones((2, 2)), {"a": 1}])
def test_what_is_no_list_of_samples(value: object) -> None:
    assert values_of(value) is None


@pytest.mark.parametrize("value", [torch.ones(2, 2), [1.0, float("nan")], ["a", "b"]])
def test_samples_that_cannot_be_taken(value: object) -> None:
    made = task({"accuracy": value})
    with pytest.raises(UsageError, match=r"Task\.evaluate must return"):
        evaluate_task(made, made.model)


def test_readings_that_differ_are_named() -> None:
    assert otherwise({"a": 1.0, "b": 2.0}, {"a": 1.0 + 1e-6, "b": 2.1}) == "b 2, now 2.1"
    assert otherwise({"a": 0.0}, {"a": 0.0}) == ""
    assert otherwise({"a": 1.0}, {}) == "a 1, now none"


def test_the_built_in_tasks_tell_their_errors() -> None:
    from autocomp.tasks import digits

    splits = digits.load_splits()

    class First(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :10]

    answered = digits.accuracy(First(), digits.slices(splits[1], seed=1))
    slices = [values for name, values in answered.items() if name != "accuracy"]
    assert torch.equal(answered["accuracy"], torch.stack(slices).mean(0)), "an image is one sample, in all its slices"
