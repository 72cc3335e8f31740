"""What is compressed is the model that was given: sizes used as numbers, hooks of wrappers and precisions do not slip through."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autocomp
from autocomp.errors import UsageError
from autocomp.tasks.task import Task

torch.set_num_threads(1)


class ByLength(nn.Module):
    """Divides by the length as a number of Python's, or by its logarithm, as `export` writes down."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.head, self.how = nn.Linear(8, 32), nn.Linear(32, 1), how

    def forward(self, x: Tensor) -> Tensor:
        summed = self.inner(x).relu().sum(1)
        if self.how == "float":
            return self.head(summed / float(x.shape[1]))
        if self.how == "log":
            return self.head(summed / math.log(1 + x.shape[1]))
        if self.how == "batch":
            return self.head(summed) * (1.0 if x.shape[0] < 20 else 3.0)
        return self.head(summed / x.shape[1])


def task(how: str, calibrated: tuple[int, ...], judged: int) -> Task:
    torch.manual_seed(0)
    model = ByLength(how).eval()
    x = torch.randn(64, judged, 8)
    with torch.no_grad():
        wanted = model(x)
    return Task(
        model=model,
        example_inputs=(torch.randn(1, calibrated[0], 8),),
        calibration=[(torch.randn(32, length, 8),) for length in calibrated],
        evaluate=lambda m: {"loss": float((m(x) - wanted).square().mean()) + 0.01},
        higher_is_better=False,
        outputs="regression",
    )


def search(given: Task, out: Path, space: str) -> Any:
    return autocomp.search(given, out=out, space=space, trials=4, measurements=1, references=False)


@pytest.mark.parametrize(("how", "calibrated", "judged"), [("float", (8,), 16), ("log", (8,), 40), ("batch", (8,), 8)])
@pytest.mark.usefixtures("short_tuning")
def test_a_form_that_is_another_model_where_it_is_judged_is_refused(
    how: str, calibrated: tuple[int, ...], judged: int, tmp_path: Path, spaces: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match="the exported form of the model from the model as it was given"):
        search(task(how, calibrated, judged), tmp_path / "run", spaces["full"])
    assert not (tmp_path / "run" / "front.json").exists()


@pytest.mark.usefixtures("short_tuning")
def test_sizes_in_arithmetic_of_tensors_are_the_model(tmp_path: Path, spaces: dict[str, str]) -> None:
    result = search(task("plain", (8, 16), 16), tmp_path / "run", spaces["full"])
    assert result.dense.metrics["loss"] == pytest.approx(0.01, rel=1e-3)


def test_a_wrapper_with_hooks_is_refused_or_kept() -> None:
    inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    wrapped = nn.DataParallel(inner)
    wrapped.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 10.0,))
    x = torch.randn(16, 8)
    with pytest.raises(UsageError, match="differs from"):
        Task(model=wrapped, example_inputs=(x[:1],), calibration=[(x,)], evaluate=lambda m: {"a": float(m(x).mean())})
    plain = Task(
        model=nn.DataParallel(inner), example_inputs=(x[:1],), calibration=[(x,)],
        evaluate=lambda m: {"a": float(m(x).mean())},
    )  # fmt: skip
    assert torch.allclose(plain.model(x), inner(x), atol=1e-6)
