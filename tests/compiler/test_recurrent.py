"""Recurrent layers as one loop over time: equal to torch, of any length, and every step counted by the estimate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocomp.compiler.build import build
from autocomp.compiler.importer import export_program
from autocomp.compiler.verify import output_error, reference_outputs
from autocomp.devices.local import LocalDevice
from autocomp.devices.open import open_device
from autocomp.errors import ExportError
from autocomp.hardware.profile import load_profile
from autocomp.tuning.store import KernelStore

torch.set_num_threads(1)


def operators_of(model: nn.Module, inputs: tuple[Tensor, ...], device: LocalDevice) -> list[str]:
    """The compiled model equals torch; the templates its kernels have."""
    compiled = build(model.eval(), inputs, device.profile, device.tuner)
    assert output_error(compiled.run(*inputs), reference_outputs(model, inputs)) < 1e-5
    return [kernel.operator for kernel in compiled.kernels]


class Recurrent(nn.Module):
    """A layer with every output, and its states given as inputs or not."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        given = None if not states else states if len(states) == 2 else states[0]
        y, last = self.layer(x, given)
        return (y, *last) if isinstance(last, tuple) else (y, last)


# layer, inputs, how many states are given
RECURRENT = {
    "lstm": (nn.LSTM(5, 16), (4, 1, 5), 0),
    "lstm, deep both ways": (nn.LSTM(5, 37, 2, batch_first=True, bidirectional=True), (3, 7, 5), 2),
    "lstm without bias, batch of a prime": (nn.LSTM(9, 20, bias=False), (3, 13, 9), 0),
    "gru": (nn.GRU(5, 64), (7, 1, 5), 1),
    "gru, deep both ways": (nn.GRU(5, 37, 2, batch_first=True, bidirectional=True), (3, 7, 5), 1),
    "gru without bias": (nn.GRU(5, 12, bias=False, batch_first=True), (2, 5, 5), 0),
    "plain": (nn.RNN(5, 20, 2), (7, 9, 5), 1),
    "plain, relu": (nn.RNN(5, 20, nonlinearity="relu", batch_first=True), (9, 5, 5), 0),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layer(name: str, device: LocalDevice) -> None:
    layer, shape, states = RECURRENT[name]
    batch = shape[0] if layer.batch_first else shape[1]
    directions = layer.num_layers * (2 if layer.bidirectional else 1)
    given = [torch.randn(directions, batch, layer.hidden_size) for _ in range(states)]
    assert operators_of(Recurrent(layer), (torch.randn(shape), *given), device).count("dense") == directions


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_a_long_sequence_is_one_loop(cell: type[nn.RNNBase], device: LocalDevice) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = cell(8, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0][:, -1]

    operators = operators_of(Last(), (torch.randn(1, 3000, 8),), device)
    assert operators.count("dense") == 1
    assert len(operators) <= 5


def test_projected_states_are_refused() -> None:
    with pytest.raises(ExportError, match="proj_size"):
        export_program(Recurrent(nn.LSTM(4, 8, proj_size=3)).eval(), (torch.randn(5, 1, 4),))


def test_estimated_target_computes_and_counts_every_step(tmp_path: Path) -> None:
    """Machine code of another processor, emulated; four times the steps are estimated at about four times the time."""
    profile = load_profile("cortex-a76")
    device = open_device(profile, KernelStore.open(profile, tmp_path))
    device.tuner.budget = 1
    seconds = []
    for steps in (8, 32):
        model, x = Recurrent(nn.LSTM(6, 24)).eval(), torch.randn(steps, 2, 6)
        latency = device.time(device.compile(model, [(x,)]), (x,))
        seconds.append(sum(kernel.seconds for kernel in latency.kernels if kernel.name == "lstm"))
    assert 3 < seconds[1] / seconds[0] < 5
