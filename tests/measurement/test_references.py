"""ONNX Runtime as a reference: its session stands in for the model, whatever its outputs and the axes of its samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocomp import Task
from autocomp.compiler.verify import output_error, reference_outputs
from autocomp.export.onnx import export_onnx, onnx_session
from autocomp.measurement.references import _session_module


class Stepped(nn.Module):
    """One step of a recurrence: inputs [N, 4] and states [2, N, 8], whose samples lie along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(4, 8), nn.GRUCell(8, 8)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, states: Tensor) -> dict[str, Tensor]:
        new = []
        for cell, state in zip(self.cells, states, strict=True):
            x = cell(x, state)
            new.append(x)
        return {"scores": self.head(x), "states": torch.stack(new)}


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_a_session_stands_in_for_a_model_of_several_outputs(samples: int, tmp_path: Path) -> None:
    torch.manual_seed(0)

    def inputs(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 4), torch.randn(2, count, 8)

    task = Task(
        name="steps", model=Stepped().eval(), example_inputs=inputs(2), calibration=[inputs(8)], evaluate=lambda _model: {"score": 1.0},
        batch_axes=(0, 1),
    )  # fmt: skip
    stand_in = _session_module(
        onnx_session(export_onnx(task.model, task.example_inputs, tmp_path / "model.onnx")), task
    )
    asked = inputs(samples)
    found = stand_in(*asked)
    assert found.keys() == {"scores", "states"}
    assert found["states"].shape == (2, samples, 8)
    assert output_error(found, reference_outputs(task.model, asked)) < 1e-5
