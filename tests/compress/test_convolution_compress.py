"""Transposed and three-dimensional convolutions are compressed as plain ones are: seen, pruned, updated, rounded, compiled, exported."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from autocomp.compiler.build import build
from autocomp.compiler.verify import output_error, reference_outputs
from autocomp.database.calibrate import Statistics, collect_from, patches
from autocomp.database.database import LayerDatabase
from autocomp.database.parts import stored_bytes
from autocomp.database.stitch import stitch
from autocomp.devices.local import LocalDevice
from autocomp.export.onnx import export_onnx, onnx_session, run_session
from autocomp.graph.analyse import analyse
from autocomp.graph.canonical import canonical
from autocomp.graph.fold import fold_batchnorm
from autocomp.graph.graph import Graph
from autocomp.graph.program import CanonicalModel
from autocomp.layers.convolution import Layers, outputs_first
from autocomp.layers.decode import decoded
from autocomp.layers.narrow import take
from autocomp.records.candidate import Candidate, Method
from autocomp.records.precisions import Precision
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile
from autocomp.space.space import Space

torch.set_num_threads(1)

# layer, spatial sizes
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "volume": (lambda: nn.Conv3d(32, 32, 3, (1, 2, 2), 1), (4, 7, 6)),
    "time alone": (lambda: nn.Conv3d(32, 32, (3, 1, 1), (2, 1, 1), (1, 0, 0)), (6, 5, 4)),
    "space alone": (lambda: nn.Conv3d(32, 32, (1, 3, 3), padding=(0, 1, 1), bias=False), (3, 7, 6)),
    "dilated groups": (lambda: nn.Conv3d(32, 32, 3, 2, (1, 2, 1), (1, 2, 1), groups=2), (6, 9, 9)),
    "depthwise volume": (lambda: nn.Conv3d(32, 32, 3, padding=1, groups=32), (4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(32, 32, 4, 2, 1), (5, 6)),
    "uneven taps": (lambda: nn.ConvTranspose2d(32, 32, 3, 2, 1, 1), (5, 6)),
    "cut inputs": (lambda: nn.ConvTranspose2d(32, 32, 2, 1, 2, bias=False), (6, 5)),
    "transposed groups": (lambda: nn.ConvTranspose2d(32, 32, 3, (2, 1), 1, (1, 0), groups=2, dilation=(3, 2)), (6, 5)),
    "transposed depthwise": (lambda: nn.ConvTranspose2d(32, 32, 4, 2, 1, groups=32), (6, 5)),
    "line": (lambda: nn.ConvTranspose1d(32, 32, 7, 3, 2, 2), (10,)),
    "transposed volume": (lambda: nn.ConvTranspose3d(32, 32, 3, 2, 1, 1), (3, 4, 5)),
}


class Between(nn.Module):
    """The layer between two others, whose channels can go."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        self.first, self.layer, self.last = conv(3, 32, 1), layer, conv(layer.out_channels, 4, 1)  # type: ignore[arg-type]
        self.norm = norm(layer.out_channels)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.layer(self.first(x).relu())).relu()).flatten(2).mean(2)


def between(name: str) -> tuple[Between, tuple[Tensor, ...]]:
    torch.manual_seed(3)
    made, size = KINDS[name]
    model = Between(made(), len(size))
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval(), (torch.randn(2, 3, *size),)


@functools.cache
def analysed(name: str) -> tuple[CanonicalModel, Graph, tuple[Tensor, ...]]:
    model, inputs = between(name)
    plain = canonical(model, inputs)
    return plain, analyse(plain, inputs), inputs


@functools.cache
def statistics_of(name: str) -> Statistics:
    model, graph, inputs = analysed(name)
    torch.manual_seed(4)
    return collect_from(model, [(torch.randn(32, *inputs[0].shape[1:]),)], graph, 32)


@pytest.mark.parametrize("name", KINDS)
def test_rows_times_weight_is_the_output(name: str) -> None:
    model, graph, inputs = analysed(name)
    layer, x, module = graph.layers["layer"], torch.randn(2, 32, *inputs[0].shape[2:]), model.get_submodule("layer")
    assert isinstance(module, Layers)
    expected = module(x)
    rows = patches(x, layer, 1 << 20, torch.Generator())
    weight = outputs_first(module).detach().flatten(1)
    by_group = rows.unflatten(1, (layer.conv_groups, -1)).transpose(0, 1)
    found = torch.cat(list(by_group @ weight.unflatten(0, (layer.conv_groups, -1)).transpose(1, 2)), 1)
    if module.bias is not None:
        found = found + module.bias
    assert torch.allclose(found, expected.movedim(1, -1).flatten(0, -2), atol=1e-5)
    inside = x.numel() // 32 if layer.output_padding is not None else expected.numel() // expected.shape[1]
    assert layer.macs == inside * weight.numel()


@pytest.mark.parametrize("name", KINDS)
def test_taking_channels_is_ignoring_the_others(name: str) -> None:
    model, inputs = between(name)
    layer, x = model.layer, torch.randn(2, 32, *inputs[0].shape[2:])
    groups = layer.groups
    kept = torch.arange(32).view(groups, -1)[: max(1, groups // 2)].flatten() if groups > 1 else torch.tensor([0, 3, 4])
    out = layer.out_channels
    rows = (
        torch.arange(out).view(groups, -1)[: max(1, groups // 2)].flatten() if groups > 1 else torch.tensor([1, 5, 9])
    )
    small = take(layer, rows, None if groups > 1 else kept)
    zeros = torch.zeros_like(x)
    zeros[:, kept] = x[:, kept]
    assert torch.allclose(small(x[:, kept]), layer(zeros)[:, rows], atol=1e-5)


def compressed(
    name: str, precision: Precision, keep: float, device: LocalDevice, folder: Path
) -> tuple[Space, Candidate, nn.Module]:
    model, graph, _ = analysed(name)
    rules = [Rule(layers="*", keep=[1.0, 0.5]), Rule(layers="layer", precisions=["fp32", precision])]
    space = build_space(graph, SpaceFile(format_version=1, rules=rules), device.profile)
    database = LayerDatabase(folder, model, graph, space, statistics_of(name))
    candidate = space.uniform(keep, precision)
    assert candidate.methods["layer"] == Method(precision)
    return space, candidate, stitch(model, graph, database, candidate)


@pytest.mark.parametrize("name", KINDS)
def test_eight_bits_on_half_the_channels(name: str, device: LocalDevice, tmp_path: Path) -> None:
    _, graph, inputs = analysed(name)
    space, candidate, made = compressed(name, "w8a8", 0.5, device, tmp_path / "layers")
    assert {graph.layers["layer"].in_group, graph.layers["layer"].out_group} == set(graph.groups) - {"last"}
    module = made.get_submodule("layer")
    columns, rows = space.shape("layer", candidate.widths)
    assert (columns, rows) != (graph.layers["layer"].in_channels, graph.layers["layer"].out_channels)
    folded = fold_batchnorm(made)
    size = sum(t.numel() * t.element_size() for t in folded.get_submodule("layer").buffers())
    assert size == stored_bytes(graph.layers["layer"], columns, rows, candidate.methods["layer"], True)
    assert module.weight.dtype == torch.int8
    expected = reference_outputs(made, inputs)
    assert torch.allclose(folded(*inputs), expected[0], atol=1e-4)
    compiled = build(folded, inputs, device.profile, device.tuner)
    assert output_error(compiled.run(*inputs), reference_outputs(folded, inputs)) < 1e-5
    path = export_onnx(made, inputs, tmp_path / "model.onnx")
    assert (
        output_error(run_session(onnx_session(path, exact=True), *inputs), expected) < 2e-2
    )  # a level may round the other way


@pytest.mark.parametrize(
    ("name", "precision"), [("volume", "w8"), ("transposed", "w4"), ("line", "vq4"), ("transposed groups", "fp16")]
)
def test_stored_weights_are_decoded(name: str, precision: Precision, device: LocalDevice, tmp_path: Path) -> None:
    inputs = analysed(name)[2]
    made = compressed(name, precision, 1.0, device, tmp_path / "layers")[2]
    expected = reference_outputs(made, inputs)
    whole = decoded(fold_batchnorm(made), device.profile.precisions)
    assert type(whole.get_submodule("layer")).__module__.startswith("torch.nn")
    compiled = build(whole, inputs, device.profile, device.tuner)
    assert output_error(compiled.run(*inputs), expected) < (1e-2 if precision == "fp16" else 1e-4)
    path = export_onnx(made, inputs, tmp_path / "model.onnx")
    assert output_error(run_session(onnx_session(path, exact=True), *inputs), expected) < 1e-2
    floats = {
        (initializer.name, math.prod(initializer.dims))
        for initializer in onnx.load(path).graph.initializer
        if initializer.data_type == onnx.TensorProto.FLOAT
    }
    weight = analysed(name)[0].layer.weight.numel()
    assert not [name for name, size in floats if size == weight], "the weight is stored as it is, not as it decodes"


@pytest.mark.parametrize("name", [name for name in KINDS if "group" not in name and "depthwise" not in name])
@torch.no_grad()
def test_update_lowers_the_error(name: str, device: LocalDevice, tmp_path: Path) -> None:
    """Half the inputs gone: with the update of the weights that stay the output is nearer than without."""
    model, graph, _ = analysed(name)
    space = build_space(graph, SpaceFile(format_version=1, rules=[Rule(layers="*", keep=[1.0, 0.5])]), device.profile)
    dense, data = space.dense(), statistics_of(name).batches[0]
    widths = dict(dense.widths) | {"first": min(space.widths["first"])}
    errors = []
    for classic in (False, True):
        database = LayerDatabase(tmp_path / str(classic), model, graph, space, statistics_of(name), classic=classic)
        made = stitch(model, graph, database, Candidate(widths, dense.methods), reestimate=False)
        seen: list[Tensor] = []
        for which in (model, made):
            handle = which.get_submodule("layer").register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            which(*data)
            handle.remove()
        errors.append(float((seen[0] - seen[1]).square().mean()))
    assert errors[0] < errors[1]
