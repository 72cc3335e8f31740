"""Models with complex numbers inside, compiled for this machine and written as ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocomp.compiler.build import build
from autocomp.compiler.verify import output_error, reference_outputs
from autocomp.devices.local import LocalDevice
from autocomp.export.onnx import export_onnx, onnx_session, run_session
from autocomp.graph.canonical import canonical

torch.set_num_threads(1)


class Rotary(nn.Module):
    """Positions turned as Llama's authors wrote it, with a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 8)
        angles = torch.outer(torch.arange(12), 1.0 / 100 ** (torch.arange(0, 32, 2) / 32))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.inner(x).unflatten(2, (-1, 2)))
        return self.outer(torch.view_as_real(pairs * self.turns).flatten(2))


class Filter(nn.Module):
    """A global filter over a picture's spectrum, whose weights are pairs of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 8)
        self.weight = nn.Parameter(torch.randn(12, 9, 2))

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft2(self.inner(x), dim=(1, 2), norm="ortho") * torch.view_as_complex(self.weight)
        return self.outer(torch.fft.irfft2(found, s=(12, 16), dim=(1, 2), norm="ortho"))


class Spectrogram(nn.Module):
    """Log energies of frequency bands, as speech models begin."""

    def __init__(self) -> None:
        super().__init__()
        self.bands = nn.Linear(33, 8, bias=False)
        self.register_buffer("window", torch.hann_window(48))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(x.flatten(1), 64, 16, 48, self.window, return_complex=True)
        return torch.log(self.bands(spectrum.abs().square().transpose(1, 2)).abs() + 1e-2)


@pytest.mark.parametrize("made", [Rotary, Filter, Spectrogram])
def test_a_model_with_complex_numbers(made: type[nn.Module], device: LocalDevice, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given, inputs = made().eval(), (torch.randn(1, 12, 16),)
    model = canonical(given, inputs)
    expected = reference_outputs(given, inputs)
    compiled = build(model, inputs, device.profile, device.tuner)
    assert output_error(compiled.run(*inputs), expected) < 1e-5
    export_onnx(model, inputs, tmp_path / "model.onnx")
    assert output_error(run_session(onnx_session(tmp_path / "model.onnx"), *inputs), expected) < 1e-5
