"""What `check` refuses is named as the user wrote it."""

from __future__ import annotations

import pytest
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
