"""The estimated target: modules are emulated and equal torch, libraries too, and estimates are the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_task
import torch
from torch import Tensor, nn

from autocomp.cli.tables import show_latency
from autocomp.compiler.verify import relative_error
from autocomp.devices.estimated import EstimatedDevice
from autocomp.devices.open import open_device
from autocomp.errors import MismatchError, ObjectError
from autocomp.estimate.libraries import Library
from autocomp.hardware.profile import load_profile
from autocomp.tuning.store import KernelStore


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> EstimatedDevice:
    profile = load_profile("cortex-a76")
    device = open_device(profile, KernelStore.open(profile, tmp_path_factory.mktemp("store")))
    assert isinstance(device, EstimatedDevice)
    device.tuner.budget = 2
    return device


def test_module_equals_torch_and_is_estimated(
    device: EstimatedDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, x = tiny_task.model(), tiny_task.data(1, seed=2)[0]
    compiled = device.compile(model, [(x,)])
    latency = device.time(compiled, (x,))
    assert latency.how == "estimated"
    show_latency(latency, 0)
    said = " ".join(capsys.readouterr().out.split())
    assert "± 38%, estimated by the core model of cortex-a76 @ 2.4 GHz, 1 core" in said
    assert latency.seconds > sum(kernel.seconds for kernel in latency.kernels) > 0
    assert {kernel.how for kernel in latency.kernels} == {"estimated"}
    trials = device.tuner.trials
    assert device.time(device.compile(model, [(x,)]), (x,)).seconds == latency.seconds
    assert device.tuner.trials == trials, "the second build takes its kernels from the store"
    loaded = compiled.reload(compiled.save(tmp_path / "model.so"))
    result = loaded.run(x)
    assert isinstance(result, Tensor)
    with torch.no_grad():
        assert relative_error(result, model(x)) < 1e-5


def test_library_that_was_damaged_is_noticed(device: EstimatedDevice, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval(), torch.randn(1, 16)
    compiled = device.compile(model, [(x,)])
    path = compiled.save(tmp_path / "model.so")
    with pytest.raises(ObjectError, match="exports no function absent"):
        Library(path.read_bytes()).run("absent", [np.zeros(4, "float32")])
    with pytest.raises(ObjectError, match="not an ELF shared library"):
        Library(b"nothing of the kind")


def test_mismatch_names_the_layer(device: EstimatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    from autocomp.devices import estimated

    honest = estimated.EstimatedModel.run
    monkeypatch.setattr(estimated.EstimatedModel, "run", lambda self, *inputs: honest(self, *inputs) * 1.01)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval(), torch.randn(1, 16)
    with pytest.raises(MismatchError, match="differs from torch"):
        device.compile(model, [(x,)])


def test_unknown_instructions_are_named_with_their_share(
    device: EstimatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    import autocomp.estimate as estimate

    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval(), torch.randn(1, 16)
    compiled = device.compile(model, [(x,)])
    assert "core's table" not in device.time(compiled, (x,)).device
    honest = estimate.estimate_kernel
    monkeypatch.setattr(
        estimate, "estimate_kernel", lambda *a, **k: replace(honest(*a, **k), unknown_share=0.25, unknown=("strange",))
    )
    assert "25.00% of the instructions are not in the core's table (strange)" in device.time(compiled, (x,)).device
