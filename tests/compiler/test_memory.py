"""The memory of a compiled module: what its planner lays out, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from autocomp.compiler.build import schedule
from autocomp.compiler.memory import workspace_bytes
from autocomp.devices.open import open_device
from autocomp.hardware.profile import load_profile
from autocomp.kernels import templates
from autocomp.kernels.specs import ConvSpec
from autocomp.tuning import forms
from autocomp.tuning.store import KernelStore

FLOAT = 4  # bytes


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory):
    profile = replace(load_profile("x86-64-v3"), precisions=("fp32",))
    device = open_device(profile, KernelStore.open(profile, tmp_path_factory.mktemp("kernels")))
    device.tuner.budget = 1

    def memory(model: nn.Module, *inputs: torch.Tensor) -> int:
        return schedule(model.eval(), inputs, profile, device.tuner).memory

    return memory


def test_inputs_weights_outputs_and_buffers_are_counted(planned) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert planned(model, torch.randn(1, 64)) == FLOAT * (64 + weights + 128 + 32)


def test_buffers_that_are_read_no_more_are_used_again(planned) -> None:
    def deep(layers: int) -> int:
        parts = [nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU()) for _ in range(layers)]
        return planned(nn.Sequential(*parts), torch.randn(8, 64)) - FLOAT * layers * 64 * 64

    assert deep(9) == deep(5), "two buffers take turns"


def test_a_narrower_model_needs_less(planned) -> None:
    def wide(channels: int) -> int:
        return planned(nn.Sequential(nn.Linear(64, channels), nn.ReLU(), nn.Linear(channels, 32)), torch.randn(4, 64))

    assert wide(32) < wide(64) < wide(128)


def test_what_a_kernel_takes_for_itself_is_counted(planned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "choose", lambda tuner, specs: {})  # all directly: over a padded picture
    first, second = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 5, padding=2, bias=False)
    found = planned(nn.Sequential(first, nn.ReLU(), second), torch.randn(1, 16, 10, 10))
    weights, picture, padded = FLOAT * 16 * 16 * (9 + 25), FLOAT * 16 * 10 * 10, FLOAT * 16 * 14 * 14
    assert found == weights + 4 * picture + padded, "input, output, two buffers that take turns, and the larger border"


def test_tiles_of_a_band_are_counted() -> None:
    profile = replace(load_profile("x86-64-v3"), precisions=("fp32",))
    spec = ConvSpec.of((1, 16, 16, 32), (32, 32, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, profile.lanes)
    function = forms.form(spec, 4)
    anchor = templates.describe(function)
    for tile in templates.tiles(anchor, profile):
        band = tile.band * 4 * 36 * (32 + 32)  # inputs at 36 points, and products
        padded = (4 * tile.band + 2) * 18 * 32
        assert workspace_bytes(templates.apply(function, tile, anchor, profile)) == FLOAT * (band + padded)


def test_a_module_says_it_with_its_latency(tmp_path: Path) -> None:
    import autocomp

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).eval()
    latency = autocomp.measure(model, (torch.randn(1, 64),), profile="x86-64-v3")
    assert latency.memory == FLOAT * (64 + 64 * 128 + 128 + 128 * 32 + 32 + 128 + 32)
