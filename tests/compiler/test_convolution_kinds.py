"""Operations that have no template of their own: brought to those that have, equal to torch, and no contraction left to plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from wholes import quantise_all

from autocomp.compiler.build import build
from autocomp.compiler.verify import output_error, reference_outputs
from autocomp.devices.latency import layer_work
from autocomp.devices.local import LocalDevice
from autocomp.devices.open import open_device
from autocomp.graph.analyse import analyse
from autocomp.hardware.profile import load_profile
from autocomp.kernels.specs import live_taps
from autocomp.records.candidate import Method
from autocomp.tuning.store import KernelStore

torch.set_num_threads(1)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def check(model: nn.Module, inputs: tuple[Tensor, ...], device: LocalDevice, bound: float = 1e-5) -> list[str]:
    """The compiled model equals torch; the templates its kernels have."""
    compiled = build(model.eval(), inputs, device.profile, device.tuner)
    assert output_error(compiled.run(*inputs), reference_outputs(model, inputs)) < bound
    return [kernel.operator for kernel in compiled.kernels]


# layer, spatial sizes
TRANSPOSED = {
    "exact": (nn.ConvTranspose2d(8, 12, 4, 2, 1), (7, 9)),
    "uneven taps": (nn.ConvTranspose2d(24, 32, 3, 2, 1, 1), (14, 14)),
    "no overlap": (nn.ConvTranspose2d(16, 32, 2, 2, bias=False), (5, 6)),
    "gaps": (nn.ConvTranspose2d(5, 3, 1, 3, output_padding=1), (5, 6)),
    "cut inputs": (nn.ConvTranspose2d(5, 3, 2, 1, 2), (6, 5)),
    "dilated": (nn.ConvTranspose2d(6, 6, 3, (2, 1), 1, (1, 0), groups=2, dilation=(3, 2)), (6, 5)),
    "grouped": (nn.ConvTranspose2d(16, 32, 4, 2, 1, groups=2), (6, 5)),
    "depthwise": (nn.ConvTranspose2d(16, 16, 5, (2, 3), 2, groups=16), (6, 5)),
    "vocoder": (nn.ConvTranspose1d(16, 8, 16, 8, 4), (33,)),
    "odd line": (nn.ConvTranspose1d(3, 5, 7, 3, 2, 2), (10,)),
    "volume": (nn.ConvTranspose3d(6, 8, 3, 2, 1, 1), (3, 4, 5)),
}


# of which taps read padding alone: layer, spatial sizes
FAR = {
    "centre": (nn.Conv2d(16, 32, 3, padding=24, dilation=24), (8, 8)),
    "one axis": (nn.Conv2d(16, 32, 3, padding=(6, 1), dilation=(6, 1)), (5, 9)),
    "one side": (nn.Conv2d(8, 16, 5, padding=(8, 2), dilation=(4, 1)), (6, 7)),
    "strided": (nn.Conv2d(8, 16, 3, 2, 9, 9), (7, 7)),
    "depthwise": (nn.Conv2d(16, 16, 3, padding=12, dilation=12, groups=16), (8, 8)),
    "grouped": (nn.Conv2d(16, 32, 3, padding=12, dilation=12, groups=4), (8, 8)),
    "line": (nn.Conv1d(8, 16, 7, padding=48, dilation=16), (12,)),
    "volume": (nn.Conv3d(4, 8, 3, padding=6, dilation=6), (3, 4, 5)),
    "nothing but padding": (nn.Conv2d(8, 16, 2, padding=10, dilation=22), (4, 4)),
}


@pytest.mark.parametrize(
    ("name", "integers"),
    [*((name, False) for name in FAR), *((name, True) for name in FAR if isinstance(FAR[name][0], nn.Conv2d))],
)
def test_taps_that_read_padding_alone_are_left_out(name: str, integers: bool, device: LocalDevice) -> None:
    layer, size = FAR[name]
    x = torch.randn(2, layer.in_channels, *size)
    model: nn.Module = nn.Sequential(layer, nn.ReLU())
    if integers:
        model = quantise_all(copy.deepcopy(model), x)
    check(model, (x,), device)


def test_latency_model_knows_of_left_out_taps(device: LocalDevice) -> None:
    layer, size = FAR["centre"]
    plain = nn.Conv2d(16, 32, 1)
    works = [
        layer_work(analyse(nn.Sequential(conv), (torch.randn(1, 16, *size),)).layers["0"], Method(), device.profile)
        for conv in (layer, plain)
    ]
    assert works[0] == works[1]


@given(
    kernel=st.integers(1, 5), size=st.integers(1, 12), stride=st.integers(1, 3), low=st.integers(0, 14), high=st.integers(0, 14),
    dilation=st.integers(1, 13),
)  # fmt: skip
def test_live_taps(kernel: int, size: int, stride: int, low: int, high: int, dilation: int) -> None:
    outputs = (size + low + high - dilation * (kernel - 1) - 1) // stride + 1
    if outputs < 1:
        return
    reads = [any(0 <= o * stride + t * dilation - low < size for o in range(outputs)) for t in range(kernel)]
    taps = live_taps(kernel, size, stride, (low, high), dilation)
    assert not any(read for tap, read in enumerate(reads) if tap not in taps)
    assert taps == list(range(taps[0], taps[-1] + 1))


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolution(name: str, device: LocalDevice) -> None:
    layer, size = TRANSPOSED[name]
    x = torch.randn(2, layer.in_channels, *size)
    operators = check(nn.Sequential(layer, nn.LeakyReLU(0.1)), (x,), device)
    assert name == "depthwise" or set(operators) & {"conv2d", "winograd", "conv3d", "dense"}


VOLUMES = {
    "kernel": (nn.Conv3d(3, 20, 3, padding=1), (4, 7, 6)),
    "patches": (nn.Conv3d(3, 32, (2, 4, 4), (2, 4, 4)), (4, 8, 8)),
    "time alone": (nn.Conv3d(6, 33, (3, 1, 1), (2, 1, 1), padding=(1, 0, 0)), (6, 5, 4)),
    "space alone": (nn.Conv3d(6, 16, (1, 3, 3), stride=(1, 2, 2)), (3, 7, 6)),
    "point": (nn.Conv3d(6, 8, 1), (3, 5, 4)),
    "grouped, dilated": (nn.Conv3d(8, 12, 3, 2, (1, 2, 1), (1, 2, 1), groups=4), (6, 9, 9)),
    "depthwise": (nn.Conv3d(32, 32, 3, padding=1, groups=32), (4, 5, 6)),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_three_dimensional_convolution(name: str, device: LocalDevice) -> None:
    layer, size = VOLUMES[name]
    operators = check(nn.Sequential(layer, nn.ReLU()), (torch.randn(2, layer.in_channels, *size),), device)
    contractions = [operator for operator in operators if operator != "rowwise"]
    assert len(contractions) == 1


def test_video_network_stays_channels_last(device: LocalDevice) -> None:
    model = nn.Sequential(
        nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(16, 32, (3, 1, 1)), nn.ReLU(), nn.AvgPool3d((1, 2, 2)),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    x = torch.randn(1, 3, 8, 8, 8)
    compiled = build(model.eval(), (x,), device.profile, device.tuner)
    assert output_error(compiled.run(x), reference_outputs(model, (x,))) < 1e-5
    assert sum("transpose" in kernel.name for kernel in compiled.kernels) == 1, "the input's alone"


@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(8, 32, 32), (4, 24, 20), (5, 5, 10)])
def test_narrow_groups_are_on_the_template(groups: int, inputs: int, outputs: int, device: LocalDevice) -> None:
    model = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups), nn.ReLU())
    assert "conv2d" in check(model, (torch.randn(2, inputs, 7, 9),), device)


# function of data and weight, data, weight
COMPUTED = {
    "plain": (lambda x, w: functional.conv2d(x, w.tanh(), None, 2, 1).relu(), (2, 8, 7, 9), (20, 8, 3, 3)),
    "point": (lambda x, w: functional.conv2d(x, w.tanh()), (1, 8, 7, 9), (16, 8, 1, 1)),
    "grouped": (lambda x, w: functional.conv2d(x, w.tanh(), None, 1, 1, 1, 4), (2, 24, 7, 9), (20, 6, 3, 3)),
    "depthwise": (lambda x, w: functional.conv2d(x, w.tanh(), groups=8), (2, 8, 7, 9), (8, 1, 3, 3)),
    "line": (lambda x, w: functional.conv1d(x, w.tanh()), (2, 8, 40), (12, 8, 3)),
    "volume": (lambda x, w: functional.conv3d(x, w.tanh()), (1, 8, 4, 5, 6), (12, 8, 3, 3, 3)),
    "transposed": (lambda x, w: functional.conv_transpose2d(x, w.tanh(), None, 2, 1), (1, 6, 4, 5), (6, 8, 3, 3)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_computed_from_the_input(name: str, device: LocalDevice) -> None:
    function, data, weight = COMPUTED[name]
    operators = check(Function(function), (torch.randn(data), torch.randn(weight)), device)
    assert set(operators) & {"conv2d", "conv3d", "dense", "depthwise"}


def test_bias_and_activation_of_a_line_are_fused(device: LocalDevice) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.second(self.first(x).relu())).relu()

    x = torch.randn(2, 16, 50)
    model = Residual().eval()
    compiled = build(model, (x,), device.profile, device.tuner)
    assert output_error(compiled.run(x), reference_outputs(model, (x,))) < 1e-5
    first, *convolutions, last = (kernel.operator for kernel in compiled.kernels)
    assert (first, last) == ("rowwise", "rowwise")
    assert len(convolutions) == 2
    assert set(convolutions) <= {"conv2d", "winograd"}


@pytest.mark.parametrize("exponent", [-2, -1, 0.5, 1.5, 2, 3, 7, 2.3])
def test_powers(exponent: float, device: LocalDevice) -> None:
    check(Function(lambda x: x**exponent), (torch.rand(5, 33) + 0.5,), device, 1e-6)


def test_gelu_written_by_a_power_calls_no_library(device: LocalDevice) -> None:
    gelu = Function(lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3)))))
    x = torch.randn(4, 64)
    compiled = build(gelu.eval(), (x,), device.profile, device.tuner)
    assert output_error(compiled.run(x), reference_outputs(gelu, (x,))) < 1e-6
    assert "powf" not in compiled._executable.mod.imports[0].inspect_source("ll")


@pytest.mark.parametrize("layer", [
    nn.ConvTranspose2d(6, 9, 3, 2, 1, 1), nn.Conv3d(3, 9, 3, padding=1), nn.Conv2d(8, 12, 3, groups=4),
], ids=["transposed", "volume", "grouped"])  # fmt: skip
def test_estimated_target_equals_torch(layer: nn.Module, tmp_path: Path) -> None:
    profile = load_profile("cortex-a76")
    device = open_device(profile, KernelStore.open(profile, tmp_path))
    device.tuner.budget = 1
    x = torch.randn(1, layer.in_channels, *[4] * (layer.weight.dim() - 2))
    model = nn.Sequential(layer, nn.ReLU()).eval()
    compiled = device.compile(model, [(x,)])  # MismatchError where it differs
    assert output_error(compiled.run(x), reference_outputs(model, (x,))) < 1e-5
