"""A plan says before a search what it may find: nothing is compiled, and what it says holds together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autocomp
from autocomp.cli.main import main
from autocomp.config.settings import load_settings
from autocomp.devices.local import LocalDevice
from autocomp.graph.fold import folded_bytes
from autocomp.progress import Progress
from autocomp.run.forecast import forecast

TASK = "tiny_task:task"


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a plan compiles nothing")

    monkeypatch.setattr(LocalDevice, "compile", refuse)
    monkeypatch.setattr(LocalDevice, "time", refuse)


def test_a_plan_has_a_front_its_layers_and_its_cost(spaces: dict[str, str]) -> None:
    found = autocomp.plan(load_settings(None, {"task": TASK, "space": spaces["wide"]}))
    speedups = [point.speedup["x86-host"] for point in found.points]
    assert speedups == sorted(speedups)
    assert speedups[0] >= 1.0
    assert speedups[-1] > 1.2
    divergences = [point.divergence for point in found.points]
    assert divergences == sorted(divergences)
    assert sum(point.read is not None for point in found.points) >= 3
    assert {layer.layer for layer in found.layers} <= {"stem", "conv1", "conv2", "head"}
    assert all(0 <= layer.saves <= layer.share <= 1 for layer in found.layers)
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert any("estimated" in note for note in found.notes)


def test_goals_that_the_front_does_not_reach_are_told(
    spaces: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", TASK, "--space", spaces["wide"], "--max-latency", "900x", "--max-drop", "1%"]
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not any(point["meets"] for point in said["points"])
    assert any("expect none to be found" in note for note in said["notes"])
    assert any("max_drop is not planned for" in note for note in said["notes"])
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "predicted front, estimated" in shown
    assert "misses the goals" in shown


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "nothing"]) == 2
    assert "unknown task 'nothing'" in capsys.readouterr().err
    assert main(["plan", "digits", "--max-latency", "0.5x"]) == 2
    assert "must be at least 1x" in capsys.readouterr().err


def test_an_error_of_kernels_is_called_that() -> None:
    """What the latency model is off by is the median of single kernels; of whole modules nothing is known before any is measured."""
    from autocomp.config.settings import Settings
    from autocomp.run.forecast import _notes

    (note,) = _notes(Settings(task="digits"), (), {"x86-host": 0.06})
    assert "single kernels off by 6% in the median" in note


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder turned over."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(self.inner(x)), self.inner.weight.t())


def test_a_plan_counts_bytes_as_a_run_does() -> None:
    given = Tied().eval()
    held = sum(tensor.nbytes for tensor in given.parameters())
    task = autocomp.Task(
        given, (torch.randn(1, 64),), [(torch.randn(64, 64),)], lambda model: {"score": 1.0}, name="tied"
    )
    found = forecast(load_settings(None, {"task": "tied", "space": "default"}), task, Progress())
    assert 2 * held == pytest.approx(folded_bytes(task.model), rel=0.02)
    assert found.points[0].divergence < 1e-6
    assert found.points[0].smaller < 1.1, (
        "its two layers, as they are or in 16 bits, take no less than the one that the model holds"
    )
