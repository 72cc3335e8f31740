"""There is always a schedule: graphs drawn at random compile and equal torch, and what no template takes still runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_graphs import RandomMaps, RandomTokens, Together
from torch import Tensor, nn

from autocomp.compiler.build import build
from autocomp.compiler.verify import check_outputs
from autocomp.devices.local import LocalDevice
from autocomp.kernels import templates

torch.set_num_threads(1)


@pytest.mark.parametrize(("seed", "channels"), [(0, 16), (1, 20), (2, 48)])
def test_random_graphs_equal_torch(device: LocalDevice, seed: int, channels: int) -> None:
    torch.manual_seed(seed)
    graphs: list[nn.Module] = []
    inputs: list[Tensor] = []
    for k, (height, width) in enumerate([(6, 5), (7, 8), (4, 4)]):
        graphs += [RandomMaps(100 * seed + k, channels), RandomTokens(100 * seed + k, channels)]
        inputs += [torch.randn(1 + seed % 2, channels, height, width), torch.randn(1 + seed % 2, height, channels)]
    model = Together(graphs).eval()
    compiled = build(model, tuple(inputs), device.profile, device.tuner)
    assert check_outputs(model, compiled.run, [tuple(inputs)], "the graphs") < 1e-4


class BesideItself(nn.Module):
    """What the epilogue reads beside the product is computed in the same kernel, from something else."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2 + 1
        return y + self.layer(x)


LAYERS = {
    "linear": (lambda: nn.Linear(32, 32), (4, 32)),
    "linear on tokens": (lambda: nn.Linear(32, 32), (2, 5, 32)),
    "linear, ragged": (lambda: nn.Linear(20, 20), (3, 20)),
    "conv": (lambda: nn.Conv2d(32, 32, 3, padding=1), (1, 32, 7, 9)),
    "pointwise": (lambda: nn.Conv2d(32, 32, 1), (2, 32, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32), (1, 32, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(32, 32, 3, padding=1), (1, 32, 11)),
}


def test_side_inputs_of_an_epilogue_are_inlined(device: LocalDevice, monkeypatch: Any) -> None:
    """By the template, not by what there is to fall back on."""
    monkeypatch.setattr(templates, "LAST_RESORT", ())
    model = Together([_Pair(BesideItself(make())) for make, _ in LAYERS.values()]).eval()
    inputs = tuple(torch.randn(shape) for _, shape in LAYERS.values())
    compiled = build(model, inputs, device.profile, device.tuner)
    assert check_outputs(model, compiled.run, [inputs], "the pairs") < 1e-4


class _Pair(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


def test_a_kernel_that_no_template_schedules_still_runs(device: LocalDevice, monkeypatch: Any) -> None:
    """Templates that fail at every tile: the kernels are built from the loops as they are, and the module equals torch."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("no such schedule")

    monkeypatch.setattr(templates, "_tile_contraction", refuse)
    monkeypatch.setattr(templates, "schedule_rowwise", refuse)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 32), nn.Softmax(-1)).eval()
    x = torch.randn(1, 3, 5, 5)
    compiled = build(model, (x,), device.profile, device.tuner)
    assert check_outputs(model, compiled.run, [(x,)], "the module") < 1e-4
    assert compiled.kernels
