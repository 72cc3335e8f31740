"""The other runtimes that a user could take: OpenVINO and ncnn, on one thread, each made from the same torch model.

What is not installed (``pip install 'autocomp[references]'``), or cannot run a model, is said and left out.
"""

from __future__ import annotations

import copy
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import Inputs, quantised_onnx
from torch import Tensor, nn

from autocomp.errors import last_line
from autocomp.export.onnx import export_onnx
from autocomp.processes.quiet import quiet_stderr

_KINDS = {torch.float32: "f32", torch.int64: "i64", torch.int32: "i32"}  # as pnnx calls them
_LATENCY = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "ENABLE_CPU_PINNING": "NO"}


@dataclass(frozen=True)
class Peer:
    """A model in another runtime: ``run`` computes it once on inputs that it holds, ``output`` is its first result."""

    name: str
    run: Callable[[], object]
    output: Callable[[], Tensor]


def peers(
    model: nn.Module, inputs: Inputs, precision: str, calibration: Sequence[Inputs], threads: int = 1
) -> tuple[list[Peer], list[str]]:
    """What can run ``model`` in a precision (``fp32``, ``bf16``, ``int8``), and why the others cannot."""
    makers: dict[str, Callable[[], Peer]] = {
        "OpenVINO": lambda: openvino(model, inputs, precision, calibration, threads)
    }
    if precision == "fp32":
        makers["ncnn"] = lambda: ncnn(model, inputs, threads)
    found, refused = [], []
    for name, make in makers.items():
        try:
            with quiet_stderr():
                found.append(make())
        except Exception as error:
            refused.append(f"{name}: {last_line(error)}")
    return found, refused


def openvino(model: nn.Module, inputs: Inputs, precision: str, calibration: Sequence[Inputs], threads: int = 1) -> Peer:
    """The ONNX file in OpenVINO; for int8 as ONNX Runtime quantises it (QDQ), which is a form that OpenVINO reads."""
    import openvino as ov

    core = ov.Core()
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(copy.deepcopy(model), inputs, Path(folder) / "model.onnx")
        if precision == "int8":
            path = quantised_onnx(path, Path(folder) / "int8.onnx", calibration)
        read = core.read_model(path)
    settings = {
        **_LATENCY,
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    compiled = core.compile_model(read, "CPU", settings)
    request = compiled.create_infer_request()
    for port, tensor in zip(compiled.inputs, inputs, strict=True):
        request.set_tensor(port, ov.Tensor(np.ascontiguousarray(tensor.numpy())))

    def output() -> Tensor:
        request.infer()
        return torch.from_numpy(np.array(request.get_output_tensor(0).data))

    return Peer("OpenVINO", request.infer, output)


def ncnn(model: nn.Module, inputs: Inputs, threads: int = 1) -> Peer:
    """The traced model through pnnx in ncnn, fp32: no 16-bit storage or arithmetic."""
    import ncnn
    import pnnx

    with tempfile.TemporaryDirectory() as folder:
        torch.jit.trace(copy.deepcopy(model).eval(), inputs, check_trace=False).save(f"{folder}/model.pt")
        shapes = ",".join(f"[{','.join(map(str, tensor.shape))}]{_KINDS[tensor.dtype]}" for tensor in inputs)
        converter = Path(pnnx.__file__).parent / "pnnx"
        command = [str(converter), "model.pt", f"inputshape={shapes}", "fp16=0"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
        net = ncnn.Net()
        net.opt.num_threads = threads
        net.opt.use_vulkan_compute = False
        for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(net.opt, name, False)
        if net.load_param(f"{folder}/model.ncnn.param") or net.load_model(f"{folder}/model.ncnn.bin"):
            raise RuntimeError("pnnx made no model that ncnn loads")
    mats = [ncnn.Mat(np.ascontiguousarray(tensor.numpy()[0])).clone() for tensor in inputs]

    def run() -> Any:
        extractor = net.create_extractor()
        for number, mat in enumerate(mats):
            extractor.input(f"in{number}", mat)
        return extractor.extract("out0")[1]

    return Peer("ncnn", run, lambda: torch.from_numpy(np.array(run()))[None])
