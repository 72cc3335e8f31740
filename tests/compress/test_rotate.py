"""Streams turned to their principal directions: the model computes what it did, and loses less with its last channels."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from streams import NORMS, Stream, analysed
from torch import Tensor, nn

from autocomp.compiler.build import build
from autocomp.compiler.verify import output_error, reference_outputs
from autocomp.compress.rotate import rotated
from autocomp.database.calibrate import collect_from
from autocomp.database.database import LayerDatabase
from autocomp.database.stitch import stitch
from autocomp.devices.local import LocalDevice
from autocomp.export.onnx import export_onnx, onnx_session, run_session
from autocomp.graph.analyse import analyse
from autocomp.graph.removal import removed, swapped
from autocomp.records.candidate import Candidate
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile

torch.set_num_threads(1)
TURNED = ("layer_norm", "rms_norm", "root mean square")


@pytest.mark.parametrize("name", TURNED)
@torch.no_grad()
def test_the_model_computes_what_it_did_with_less_in_its_last_channels(name: str) -> None:
    torch.manual_seed(0)
    model = Stream(NORMS[name])
    thin = torch.randn(8, 32)  # what is written into the stream lies in few directions, which no channel is
    for layer in (model.first, *model.downs):
        layer.weight.copy_(thin.T @ torch.randn(8, layer.in_features) / 8)
        layer.bias.copy_(torch.randn(8) @ thin)
    model.position.copy_(torch.randn(4, 8) @ thin)
    x = torch.randn(16, 4, 5)
    plain, graph = analysed(model, x[:2])
    turned, said = rotated(plain, graph, (x[:2],), [(x,)])
    assert said == {"first": ""}
    expected = plain(x)
    assert torch.allclose(turned(x), expected, atol=1e-4)
    group = analyse(turned, (x[:2],)).groups["first"]
    assert group.prunable
    assert group.approximate
    errors = []
    for which, own in ((plain, graph.groups["first"]), (turned, group)):
        with swapped(which, removed(which, own, torch.arange(9))):
            errors.append(float((which(x) - expected).abs().max()))
    assert errors[1] < 1e-3
    assert errors[0] > 0.05


def test_pictures_and_classes_enter_a_stream_too() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.token = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 1, 32))
            self.rest = Stream(NORMS["layer_norm"])
            self.rest.first = nn.Identity()
            self.rest.position = nn.Parameter(torch.randn(5, 32))

        def forward(self, x: Tensor) -> Tensor:
            patches = self.stem(x).flatten(2).transpose(1, 2)
            return self.rest(torch.cat([self.token.expand(len(x), -1, -1), patches], 1))[:, 0]

    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    plain, graph = analysed(Patches(), x)
    turned, said = rotated(plain, graph, (x,), [(x,)])
    assert list(said.values()) == [""]
    assert torch.allclose(turned(x), plain(x), atol=1e-4)
    assert not torch.allclose(turned.get_submodule("stem").weight, plain.get_submodule("stem").weight)


def test_a_narrowed_stream_is_compiled_exported_and_kept(device: LocalDevice, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 5)
    plain, graph = analysed(Stream(NORMS["layer_norm"]), x[:2])
    turned, _ = rotated(plain, graph, (x[:2],), [(x,)])
    graph = analyse(turned, (x[:2],))
    rule = Rule(layers="*", keep=[1.0, 0.5], precisions=["fp32", "w8a8"])
    space = build_space(graph, SpaceFile(format_version=1, rules=[rule], rotate=True, ends="any"), device.profile)
    statistics = collect_from(turned, [(x,)], graph, 16)
    candidate = space.uniform(0.5, "w8a8")
    widths = {name: min(options) for name, options in space.widths.items()}
    database = LayerDatabase(tmp_path / "layers", turned, graph, space, statistics)
    made = stitch(turned, graph, database, Candidate(widths, candidate.methods))
    assert made.get_submodule("ups.0").weight.shape == (32, 16)
    assert made.get_parameter("position").shape == (4, 16)
    expected = reference_outputs(made, (x[:2],))
    assert torch.equal(pickle.loads(pickle.dumps(made))(x[:2]), expected[0])
    compiled = build(made, (x[:2],), device.profile, device.tuner)
    assert output_error(compiled.run(x[:2]), expected) < 1e-2  # a level may round the other way
    path = export_onnx(made, (x[:2],), tmp_path / "model.onnx")
    assert output_error(run_session(onnx_session(path), x[:2]), expected) < 1e-2


class After(nn.Module):
    """A stream of which something else is read, or made."""

    def __init__(self, function: Callable[[Stream, Tensor], Tensor]) -> None:
        super().__init__()
        self.stream, self.function = Stream(NORMS["layer_norm"]), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.stream, x)


def through(stream: Stream, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    x = change(stream.first(x) + stream.position)
    x = x + stream.downs[0](stream.ups[0](stream.norms[0](x)).relu())
    return stream.last(stream.norms[1](x))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda s, x: through(s, x, torch.relu), "it goes through aten.relu"),
        (lambda s, x: through(s, x, lambda y: y * 2), "it goes through aten.mul"),
        (lambda s, x: through(s, x, lambda y: y) + s.last(s.first(x)), "stream.first makes is read elsewhere"),
        (lambda s, x: s.last(s.norms[0](s.first(x)).relu()), "reads its norm"),
    ],
)
def test_what_is_no_such_stream_is_left_and_said(function: Callable[[Stream, Tensor], Tensor], why: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5)
    plain, graph = analysed(After(function), x)
    turned, said = rotated(plain, graph, (x,), [(x,)])
    assert turned is plain
    assert [reason for reason in said.values() if why in reason], said
