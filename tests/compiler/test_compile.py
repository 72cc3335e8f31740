"""Whole models: compiled and equal to torch, or refused with a clear message."""

from __future__ import annotations

from pathlib import Path

import nets
import pytest
import torch
from torch import Tensor, nn
from wholes import mobile, quantise_all

from autocomp.compiler.build import CompiledModel, build
from autocomp.compiler.importer import export_program
from autocomp.compiler.verify import check_outputs, first_differing_layer, relative_error
from autocomp.devices.local import LocalDevice
from autocomp.errors import ExportError, MismatchError, UsageError
from autocomp.hardware.profile import load_profile
from autocomp.tuning.store import KernelStore


class SmallViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
        return self.head(self.encoder(tokens)[:, 0])


def awkward() -> nn.Module:
    """Odd channels, a large kernel, dilation, stride 3, groups, pooling, and a flatten of channels that are not last."""
    return nn.Sequential(
        nn.Conv2d(3, 20, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 33, 3, 3, 1, dilation=2), nn.GELU(), nn.Conv2d(33, 48, 1),
        nn.Conv2d(48, 32, 3, groups=2, padding=1), nn.Conv2d(32, 32, 3, groups=4, padding=1), nn.Flatten(), nn.Linear(512, 100),
        nn.Softmax(-1),
    )  # fmt: skip


FAMILIES = {
    "mobile": (mobile, (1, 3, 37, 37)),
    "mobile, batch of 3": (mobile, (3, 3, 32, 32)),
    "awkward": (awkward, (2, 3, 29, 29)),
    "transformer": (SmallViT, (1, 3, 16, 16)),
    "perceptron": (lambda: nn.Sequential(nn.Linear(17, 33), nn.Tanh(), nn.Linear(33, 5)), (7, 17)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_torch(device: LocalDevice, name: str) -> None:
    make, shape = FAMILIES[name]
    torch.manual_seed(0)
    model = nets.randomise(make().eval())
    inputs = [(torch.randn(shape),) for _ in range(2)]
    compiled = build(model, inputs[0], device.profile, device.tuner)
    assert check_outputs(model, compiled.run, inputs, name) < 1e-4


@pytest.mark.parametrize("profile_name", ["x86-host", "x86-64-v3"])
def test_int8_chain_equals_the_specification_bit_for_bit(profile_name: str, tmp_path: Path) -> None:
    profile = load_profile(profile_name)
    device = LocalDevice(profile, KernelStore.open(profile, tmp_path))
    device.tuner.budget = 1
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 40, 3, 2, 1), nn.ReLU(), nn.Conv2d(40, 48, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(48 * 36, 10),
    )  # fmt: skip
    model = quantise_all(model.eval(), torch.randn(8, 3, 12, 12))
    x = torch.randn(1, 3, 12, 12)
    compiled = build(model, (x,), profile, device.tuner)
    assert torch.equal(compiled.run(x), model(x))
    assert sum(kernel.operator.endswith("int8") for kernel in compiled.kernels) == 4
    between = [kernel.name for kernel in compiled.kernels if kernel.name.startswith("quantise")]
    assert len(between) <= 1, "activations stay integers between quantised layers"


def test_saved_module_reads_back_and_runs(device: LocalDevice, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU()).eval()
    x = torch.randn(2, 8)
    compiled = build(model, (x,), device.profile, device.tuner)
    loaded = CompiledModel.load(compiled.save(tmp_path / "model.so"), device.profile)
    assert torch.equal(loaded.run(x), compiled.run(x))
    latency = compiled.time(x, repeats=5, seconds=1e-3)
    assert latency.how == "measured"
    assert len(latency.samples) == 5
    assert latency.seconds > 0
    with pytest.raises(UsageError, match="not a compiled model"):
        CompiledModel.load(tmp_path / "absent.so", device.profile)


def test_untraceable_model_is_refused() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="cannot be exported"):
        export_program(Branches().eval(), (torch.randn(3),))


def test_mismatch_names_the_layer_that_differs(device: LocalDevice) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    x = torch.randn(1, 8)

    def compile_wrong(candidate: nn.Module):  # the compiled second linear layer has another weight
        import copy

        wrong = copy.deepcopy(candidate)
        layers = [module for module in wrong.modules() if isinstance(module, nn.Linear)]
        with torch.no_grad():
            layers[1].weight.add_(0.5)
        return build(wrong, (x,), device.profile, device.tuner).run

    with pytest.raises(MismatchError, match="differs from torch by"):
        check_outputs(model, compile_wrong(model), [(x,)], "the module")
    assert first_differing_layer(model, compile_wrong, (x,)) == "2"


def test_relative_error_of_shapes_and_values() -> None:
    one = torch.ones(3)
    assert relative_error(one, one) == 0
    assert relative_error(torch.ones(2), one) == float("inf")
    assert relative_error(torch.tensor([1.0, 1.0, float("nan")]), one) == float("inf")
    assert relative_error(torch.tensor([1.0, 1.0, 1.5]), one) == pytest.approx(0.5)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_a_library_that_was_written_again_is_the_one_that_is_loaded(device: LocalDevice, tmp_path: Path) -> None:
    """A process that has loaded a file by its name gets the old code for that name from the system, as long as it holds it."""
    x, loaded = torch.randn(2, 6), []
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Linear(6, 5).eval()
        compiled = build(model, (x,), device.profile, device.tuner)
        loaded.append(compiled.reload(compiled.save(tmp_path / "model.so")))
        torch.testing.assert_close(loaded[-1].run(x), model(x))
