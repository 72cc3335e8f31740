"""Importer honesty: model families compiled and equal to torch, in fp32 and in W8A8; and operations TVM's importer gets wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import quantise_model
from torch import Tensor, nn
from torch.nn import functional
from zoo import ZOO, like
from zoo.inputs import parameters_of

from autocomp.compiler.build import build
from autocomp.compiler.importer import export_program, import_program
from autocomp.compiler.layout import to_channels_last
from autocomp.compiler.verify import output_error, reference_outputs
from autocomp.devices.local import LocalDevice
from autocomp.graph.canonical import canonical
from autocomp.graph.fold import fold_batchnorm
from autocomp.hardware.profile import load_profile

torch.set_num_threads(1)

# Parameters as published. Whisper: of 39 M, the encoder's, positions not counted. Conformer: its paper's 10.3 M have a decoder, ours a CTC head.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "efficientnet_b0": 5_288_548,
    "vit_tiny": 5_717_416,
    "bert_x4": 4 * 7_087_872,
    "whisper_tiny": 7_632_384,
    "conformer_s": 8_708_672,
}


def error_of(model: nn.Module, inputs: tuple[Tensor, ...], device: LocalDevice) -> float:
    compiled = build(model, inputs, device.profile, device.tuner)
    return output_error(compiled.run(*inputs), reference_outputs(model, inputs))


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_size(name: str) -> None:
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        # sizes alone: nothing is initialised, and statistics need no forward pass
        for module in ("zoo.vision", "zoo.sequence"):
            patch.setattr(f"{module}.settle", lambda model, *_: model)
            patch.setattr(f"{module}.smooth_noise", lambda *shape, seed=0: torch.empty(shape))
        model, _ = ZOO[name]()
    assert parameters_of(model) == PARAMETERS[name]


FAST = {
    "resnet18",
    "mobilenet_v2",
    "whisper_tiny",
}  # convolutions, depthwise ones, attention; the others take a quarter of a minute each


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ZOO])
def test_family_equals_torch(name: str, device: LocalDevice) -> None:
    model, inputs = ZOO[name](small=True)
    assert error_of(model, inputs, device) < 1e-5
    eight = quantise_model(model, [inputs, like(inputs, 1)])
    assert error_of(eight, inputs, device) < 1e-2


def test_attention_written_either_way(device: LocalDevice) -> None:
    model, inputs = ZOO["vit_tiny"](small=True, plain=True)
    assert error_of(model, inputs, device) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "conformer_s"])
def test_every_batchnorm_is_folded(name: str) -> None:
    model, inputs = ZOO[name](small=True)
    folded = fold_batchnorm(canonical(model, inputs))
    left = [module for module in folded.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert left == []


# layout: transposes that remain are those of the model's own input, of attention's heads, and of weights (folded later)
@pytest.mark.parametrize(("name", "most"), [("resnet18", 2), ("mobilenet_v2", 2), ("efficientnet_b0", 2)])
def test_no_transpose_inside_a_convolutional_body(name: str, most: int) -> None:
    model, inputs = ZOO[name](small=True)
    program = export_program(fold_batchnorm(canonical(model, inputs)).eval(), inputs)
    text = to_channels_last(import_program(program, load_profile("x86-host")))["main"].script()
    assert text.count("permute_dims") <= most


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _masked(x: Tensor) -> Tensor:
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[2] = False  # a query with no key: its row of weights is zero, not NaN
    return functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


# Each of these was imported with no warning and a wrong result, or not at all, before compiler/normalise.py. Input [2, 6, 9, 9].
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative index of an axis": lambda x: x[:, -1],
    "negative indices in a list": lambda x: x[:, [0, -1]],
    "alpha of an addition": lambda x: torch.add(x, x.abs(), alpha=3),
    "alpha of a subtraction": lambda x: torch.sub(x, x.abs(), alpha=0.5),
    "SELU": functional.selu,
    "CELU": lambda x: functional.celu(x, 0.7),
    "ELU": lambda x: functional.elu(x, 0.3),
    "nearest upsampling by no whole factor": lambda x: functional.interpolate(x, size=(13, 7)),
    "nearest upsampling by 2": lambda x: functional.interpolate(x, scale_factor=2),
    "GroupNorm": lambda x: functional.group_norm(x, 3),
    "GroupNorm with factors": lambda x: functional.group_norm(x, 2, torch.arange(6.0), torch.ones(6)),
    "attention with a causal mask": lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention that masks every key": _masked,
    "GLU over channels": lambda x: functional.glu(x, 1),
    "chunks of channels": lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
    "pixels as tokens": lambda x: x.flatten(2).transpose(1, 2),
    "channels and rows as one axis": lambda x: x.flatten(1, 2) + 1,
    "channels split, with axes of size 1": lambda x: x.unflatten(1, (2, 1, 3)).mean(1),
    "channel shuffle": lambda x: functional.channel_shuffle(x, 3),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("after_convolution", [False, True], ids=["alone", "channels last"])
def test_operation_is_imported_rightly(name: str, after_convolution: bool, device: LocalDevice) -> None:
    torch.manual_seed(0)
    model: nn.Module = Function(OPERATIONS[name])
    if after_convolution:  # the operation then meets a value that the compiler holds in another order of axes
        model = nn.Sequential(nn.Conv2d(6, 6, 1), model)
    assert error_of(model.eval(), (torch.randn(2, 6, 9, 9),), device) < 1e-5


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "groups"), [
    (3, 1, 1, 1, 1), (5, 2, 2, 1, 1), (1, 1, 0, 1, 1), (15, 1, 7, 1, 24), (3, 3, 0, 2, 1), (3, 1, 1, 1, 4),
])  # fmt: skip
def test_conv1d_in_both_precisions(
    kernel: int, stride: int, padding: int, dilation: int, groups: int, device: LocalDevice
) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 24, 37),)
    layer = nn.Conv1d(24, 24, kernel, stride, padding, dilation, groups)
    norm = nn.BatchNorm1d(24)
    model = nn.Sequential(layer, norm, nn.SiLU())
    model.train()(*inputs)
    model.eval().requires_grad_(False)
    compiled = build(model, inputs, device.profile, device.tuner)
    assert output_error(compiled.run(*inputs), reference_outputs(model, inputs)) < 1e-5
    assert error_of(quantise_model(model, [inputs]), inputs, device) < 1e-5
