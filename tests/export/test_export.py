"""Exported files: read back they compute what was searched, and one that cannot be written is reported, not raised."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import tiny_task
import torch
from points import EVALUATION
from torch import Tensor, nn
from wholes import quantise_all

from autocomp.compiler import build as build_module
from autocomp.compiler.build import CompiledModel
from autocomp.compiler.verify import relative_error
from autocomp.compress.scales import weight_only
from autocomp.devices.local import LocalDevice
from autocomp.errors import AutocompError, BoardError, ExportError
from autocomp.export import files as export
from autocomp.export.files import MANIFEST, export_point, load_model
from autocomp.export.onnx import export_onnx, onnx_session, run_session
from autocomp.graph.canonical import canonical
from autocomp.hardware import link
from autocomp.layers.fp16 import halved

torch.set_num_threads(1)


def test_files_read_back_and_the_manifest_names_them(device: LocalDevice, tmp_path: Path) -> None:
    model, x = tiny_task.model(), tiny_task.data(1, seed=2)[0]
    compiled = device.compile(model, [(x,)])
    verified = export_point(
        EVALUATION,
        model,
        {"x86-host": compiled, "my/again.yaml": compiled, "pi": BoardError("no board")},
        [(x,)],
        tmp_path,
    )
    assert set(verified) == {"so", "so:my/again.yaml", "so:pi", "onnx"}
    assert {kind for kind, check in verified.items() if not check.ok} == {"so:pi"}
    assert verified["so:pi"].note == "no board"
    assert (tmp_path / "model.so").exists()
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["inputs"] == [{"shape": [1, 1, 8, 8], "dtype": "float32"}]
    assert manifest["latency"]["x86-host"]["how"] == "measured"
    assert set(manifest["sha256"]) == {"model.so", "model.my_again.so", "model.onnx", "model.safetensors"}
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(x), model(x))


def test_linker_that_fails_is_reported(device: LocalDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU()).eval(), torch.randn(1, 8)
    compiled = device.compile(model, [(x,)])
    for name, command, words in (
        ("absent", None, "no linker on this machine"),
        ("failing", ["false"], "linking .*model.so failed"),
    ):
        monkeypatch.setattr(link, "find_linker", lambda _architecture, command=command: command)
        verified = export_point(EVALUATION, model, {"x86-host": compiled}, [(x,)], tmp_path / name)
        assert not verified["so"].ok
        assert re.search(words, verified["so"].note)
        assert verified["onnx"].ok, "one file that fails leaves the others be"
        with pytest.raises(AutocompError, match=words):
            compiled.save(tmp_path / name / "model.so")


def test_library_that_computes_something_else_is_reported(
    device: LocalDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU()).eval(), torch.randn(1, 8)
    compiled = device.compile(model, [(x,)])
    honest = CompiledModel.run
    monkeypatch.setattr(build_module.CompiledModel, "run", lambda self, *inputs: honest(self, *inputs) * 1.01)
    verified = export_point(EVALUATION, model, {"x86-host": compiled}, [(x,)], tmp_path)
    assert not verified["so"].ok
    assert verified["so"].wrong
    assert "model.so differs from torch by" in verified["so"].note
    assert not (tmp_path / "model.so").exists(), "nobody is to deploy it"
    assert verified["onnx"].ok


def test_every_part_fails_alone(device: LocalDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised in one, of whatever class, the others are written."""

    def refuse(*_: object, **__: object) -> None:
        raise TypeError("not today")

    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU()).eval(), torch.randn(1, 8)
    compiled = device.compile(model, [(x,)])
    for fails, patched in {
        "so": (build_module.CompiledModel, "save"),
        "onnx": (export, "export_onnx"),
        "weights": (export, "load_model"),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(*patched, refuse)
            verified = export_point(EVALUATION, model, {"x86-host": compiled}, [(x,)], tmp_path / fails)
        assert {kind for kind, check in verified.items() if not check.ok} == {fails}
        assert verified[fails].note == "TypeError: not today"
        assert not verified[fails].wrong
        written = set(json.loads((tmp_path / fails / MANIFEST).read_text())["sha256"])
        gone = "model.safetensors" if fails == "weights" else f"model.{fails}"
        assert written == {"model.so", "model.onnx", "model.safetensors"} - {gone}


def test_a_model_that_cannot_be_pickled_is_delivered_whole(device: LocalDevice, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16)).eval(), torch.randn(1, 8)
    compiled = device.compile(model, [(x,)])
    model.shortcut = lambda value: value  # type: ignore[assignment]  # as networks do that were written for one use
    verified = export_point(EVALUATION, model, {"x86-host": compiled}, [(x,)], tmp_path)
    assert all(check.ok for check in verified.values())
    torch.testing.assert_close(load_model(tmp_path)(torch.ones(3, 8)), model(torch.ones(3, 8)))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(3, 32, 3, padding=1), (2, 3, 9, 9)),
        (lambda: nn.Conv2d(4, 16, (3, 5), (2, 1), (1, 2), (1, 2), groups=2), (1, 4, 12, 14)),
        (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), (1, 16, 8, 8)),
        (lambda: nn.Linear(24, 10), (5, 24)),
        (lambda: nn.Linear(24, 10, bias=False), (2, 7, 24)),
    ],
    ids=["conv", "strided, dilated, grouped", "depthwise", "linear", "linear of a sequence"],
)
def test_quantised_layer_in_onnx_equals_torch(make: type[nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) + 0.3  # ranges that are not symmetric have a zero point to get wrong
    model = quantise_all(nn.Sequential(make()).eval(), x)
    export_onnx(model, (x,), tmp_path / "model.onnx")
    result = run_session(onnx_session(tmp_path / "model.onnx", exact=True), x)
    assert isinstance(result, torch.Tensor)
    with torch.no_grad():
        assert relative_error(result, model(x)) < 1e-3


def test_onnx_holds_integers(tmp_path: Path) -> None:
    import onnx

    x = torch.randn(2, 16)
    model = quantise_all(nn.Sequential(nn.Linear(16, 64)).eval(), x)
    exported = onnx.load(str(export_onnx(model, (x,), tmp_path / "model.onnx")))
    kinds = {node.op_type for node in exported.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    weights = [tensor for tensor in exported.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert sorted(list(tensor.dims) for tensor in weights) == [[64], [64, 16]]  # the zero points, too


@pytest.mark.parametrize("form", ["w8", "w4", "fp16"])
def test_onnx_holds_small_weights_as_they_are(form: str, tmp_path: Path) -> None:
    """Neither the exporter nor its optimiser stores what a weight decodes to in its place."""
    import onnx

    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    model = nn.Sequential(halved(layer) if form == "fp16" else weight_only(layer, int(form[1]), 32)).eval()
    x = torch.randn(3, 64)
    path = export_onnx(model, (x,), tmp_path / "model.onnx")
    floats = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(math.prod(t.dims) for t in floats) <= 48 * 2  # scales and bias
    answer = run_session(onnx_session(path), x)
    with torch.no_grad():
        assert relative_error(answer, model(x)) < 1e-2


class OddAttention(nn.Module):
    """Attention over five axes, which torch's exporter refuses to translate, beside a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 2, 3, 4, 3, 2, 8).permute(4, 0, 1, 5, 2, 3, 6)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)  # [N, 2, heads, 3, 4, 8]
        return self.out(mixed.transpose(2, 3).reshape(x.shape[0], 24, 16).mean(1))


def test_attention_of_any_rank_is_exported_to_onnx(tmp_path: Path) -> None:
    x = torch.randn(1, 24, 16)
    model = canonical(OddAttention().eval(), (x,))
    session = onnx_session(export_onnx(model, (x,), tmp_path / "model.onnx"))
    with torch.no_grad():
        assert torch.allclose(run_session(session, x), model(x), atol=1e-5)


def test_what_onnx_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    class Uncommon(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match="bessel_j0") as caught:
        export_onnx(Uncommon().eval(), (torch.randn(2, 3),), tmp_path / "model.onnx")
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
