"""What a search expects of any kind of device, checked on a small model: for whoever adds one.

from autocomp.devices.contract import check_device
check_device(MyDevice(profile, KernelStore.open(profile)))
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from autocomp.devices.device import Compiled, Device
from autocomp.errors import AutocompError
from autocomp.records.latency import Latency

if TYPE_CHECKING:
    import torch

SAMPLES = 3
HOW = {
    "local": "measured",
    "rpc": "measured",
    "estimate": "estimated",
}  # how a latency was obtained, by how its profile is reached


def check_device(device: Device) -> None:
    """Go through all that a search does with a device. AssertionError says which promise it breaks.

    A small convolution and a dense layer are compiled, compared with torch on several inputs, timed alone and in turn, saved, and read back.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    model = nn.Sequential(*layers).eval()
    inputs: list[tuple[torch.Tensor, ...]] = [(torch.randn(1, 3, 8, 8),) for _ in range(SAMPLES)]
    compiled = device.compile(model, inputs)
    assert compiled.profile.name == device.profile.name, "a module says which profile it is of"
    assert compiled.kernels, "a module knows its kernels"
    assert compiled.checked_inputs > 0, "a module is worth comparing with torch"
    _computes(compiled, model, inputs)
    _latency(device.time(compiled, inputs[0]), device)
    tail = list(compiled.tail(*inputs[0]).values())
    assert tail == sorted(tail), "percentiles rise"
    _predicts(device)
    with tempfile.TemporaryDirectory() as folder:
        path = compiled.save(Path(folder) / "model.so")
        assert path.stat().st_size > 0, "save writes a file"
        again = compiled.reload(path)
        _computes(again, model, inputs)
        in_turn = device.time_in_turn([compiled, again], inputs[0])
        assert len(in_turn) == 2, "time_in_turn gives one latency for each module"
        for latency in in_turn:
            _latency(latency, device)
        _refuses(compiled, Path(folder) / "nothing.so", inputs[0])


def _computes(compiled: Compiled, model: torch.nn.Module, inputs: list[tuple[torch.Tensor, ...]]) -> None:
    from autocomp.compiler.verify import check_outputs

    check_outputs(model, compiled.run, inputs[: compiled.checked_inputs], "the device's module")


def _latency(latency: Latency, device: Device) -> None:
    assert 0 < latency.seconds < math.inf, "a latency is a time"
    assert latency.how == HOW[device.profile.reach], "a latency says how it was obtained"
    assert latency.profile == device.profile.name, "a latency says of which profile it is"
    assert latency.how == "estimated" or latency.spread >= 0, "what is measured has a spread"


def _predicts(device: Device) -> None:
    device.model.fit_kernels(device.store.records())
    assert device.store.records(), "what was tuned is in the store"
    assert device.model.module_seconds(1e-3, 3) > 0, "the latency model predicts modules"


def _refuses(compiled: Compiled, path: Path, inputs: tuple[torch.Tensor, ...]) -> None:
    path.write_bytes(b"no library")
    try:
        compiled.reload(path).run(*inputs)
    except AutocompError:
        return
    raise AssertionError("a file that is no library is refused by an error of ours, at the latest when it is run")
