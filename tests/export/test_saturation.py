"""An exported 8-bit model on a processor without VNNI, where ONNX Runtime's own choice of kernels overflows; emulated by qemu."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from wholes import quantise_all

from autocomp.export.onnx import EXACT, export_onnx, onnx_session, run_session

RUN = """
import json, sys
import numpy, onnxruntime
def run(settings):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: numpy.load(sys.argv[2])})[0].tolist()
print(json.dumps([run({}), run(json.loads(sys.argv[3]))]))
"""


def overflowing(folder: Path) -> tuple[nn.Module, Tensor, Path]:
    """8-bit convolutions in a row: their weights and activations are as large as 8 bits allow, so two products exceed 16 bits."""
    torch.manual_seed(0)
    x = torch.rand(1, 8, 8, 8) * 0.2 + 0.8
    model = nn.Sequential(*[nn.Conv2d(i, o, 3, padding=1) for i, o in ((8, 16), (16, 16), (16, 8))]).eval()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.where(torch.rand_like(layer.weight) < 0.6, 0.1, -0.1))
        model = quantise_all(model, x)
    return model, x, export_onnx(model, (x,), folder / "model.onnx")


def test_each_8_bit_weight_has_zero_points_of_its_own(tmp_path: Path) -> None:
    graph = onnx.load(overflowing(tmp_path)[2]).graph
    weights = {value.name for value in graph.initializer if value.data_type == onnx.TensorProto.INT8}
    decoded = [
        list(node.input) for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights
    ]
    assert len(decoded) == 3
    assert len({inputs[2] for inputs in decoded}) == 3


def check_answers(path: Path, x: Tensor, expected: Tensor) -> None:
    """The file opens with and without the options of the manifest, and computes what torch did."""
    for everywhere in (False, True):
        answer = run_session(onnx_session(path, exact=True, everywhere=everywhere), x)
        assert float((answer - expected).norm() / expected.norm()) < 1e-3


class Twice(nn.Module):
    """One convolution that is called twice, as in Siamese networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(torch.relu(self.conv(x))))


def test_a_shared_8_bit_weight_opens_with_the_options_of_the_manifest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        model = quantise_all(Twice().eval(), x)
        expected = model(x)
    path = export_onnx(model, (x,), tmp_path / "model.onnx")
    check_answers(path, x, expected)
    weights = [value for value in onnx.load(path).graph.initializer if "weight" in value.name and len(value.dims) == 4]
    assert len(weights) == 2, "it is stored once"


class Loop(nn.Module):
    """A dense layer that is called in a loop: its weight is turned around once, for all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x).relu()
        return self.head(x)


def test_an_8_bit_weight_that_is_turned_around_for_several_opens_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 32)
    with torch.no_grad():
        model = quantise_all(Loop().eval(), x)
        expected = model(x)
    path = export_onnx(model, (x,), tmp_path / "model.onnx")
    check_answers(path, x, expected)


@pytest.mark.board
def test_the_options_of_the_manifest_keep_products_exact(tmp_path: Path) -> None:
    import numpy as np

    model, x, path = overflowing(tmp_path)
    np.save(tmp_path / "x.npy", x.numpy())
    packages = f"PYTHONPATH={sysconfig.get_path('purelib')}"
    python = ["qemu-x86_64", "-cpu", "Haswell-noTSX", "-E", packages, str(Path(sys.executable).resolve())]
    arguments = [str(path), str(tmp_path / "x.npy"), json.dumps(EXACT)]
    answer = subprocess.run([*python, "-c", RUN, *arguments], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    own_choice, exact = (torch.tensor(values) for values in json.loads(answer.stdout))
    with torch.no_grad():
        expected = model(x)
    assert float((exact - expected).norm() / expected.norm()) < 1e-3
    assert float((own_choice - expected).norm() / expected.norm()) > 0.1, (
        "the model does not overflow: it tests nothing"
    )
