"""What `check` refuses is named as the user wrote it."""

from __future__ import annotations

import pytest
import tiny_task
import torch
from torch import Tensor, nn

import autocomp
from autocomp.errors import ExportError
from autocomp.hardware.profile import load_profile
from autocomp.run.checked import refuse_unsupported


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.histc(x, bins=4).sum() + x


def test_an_operation_is_named_with_its_module_and_line() -> None:
    model = nn.Sequential(nn.Linear(6, 8), Counting(), nn.Linear(8, 3)).eval()
    task = autocomp.Task(
        model=model, example_inputs=(torch.randn(1, 6),), calibration=[(torch.randn(1, 6),)], evaluate=lambda m: {"a": 1.0}, name="counts"
    )  # fmt: skip
    with pytest.raises(ExportError, match=r"histc.*module '1' \(test_checked\.py:\d+, `return torch\.histc"):
        refuse_unsupported(task, load_profile("x86-host"))


def test_a_task_that_changes_torchs_default_type_is_offered_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from autocomp.config.settings import load_settings

    def doubled() -> autocomp.Task:
        task = tiny_task.task()
        torch.set_default_dtype(torch.float64)
        return task

    monkeypatch.setattr(tiny_task, "doubled", doubled, raising=False)
    before = torch.get_default_dtype()
    try:
        found = [autocomp.check(load_settings(overrides={"task": f"tiny_task:{name}"})) for name in ("task", "doubled")]
    finally:
        torch.set_default_dtype(before)
    assert found[0]["candidates"] == found[1]["candidates"]
    assert found[0]["layers"] == found[1]["layers"]
