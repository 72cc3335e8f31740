"""The other side of every comparison: ONNX Runtime on one thread, fp32 and its best static int8, and our own W8A8 of the same model."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocomp.compress.scales import activation_parameters, quantised
from autocomp.export.onnx import export_onnx, onnx_session
from autocomp.graph.fold import fold_batchnorm
from autocomp.hardware.timing import interleaved, quiet_core
from autocomp.layers.bf16 import in_brain
from autocomp.layers.fp16 import halved

Inputs = tuple[Tensor, ...]
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_CONTRACTIONS = ["Conv", "MatMul", "Gemm"]


@torch.no_grad()
def quantise_model(model: nn.Module, calibration: Sequence[Inputs]) -> nn.Module:
    """A copy with BatchNorm folded and every convolution and linear layer in W8A8, ranges the extremes over ``calibration``."""
    model = fold_batchnorm(model)
    ranges: dict[str, tuple[float, float]] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: Inputs, _output: Tensor) -> None:
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, float(inputs[0].min())), max(high, float(inputs[0].max()))

        return hook

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    handles = [module.register_forward_hook(hook_for(name)) for name, module in layers]
    for inputs in calibration:
        model(*inputs)
    for handle in handles:
        handle.remove()
    for name, span in ranges.items():
        layer = quantised(model.get_submodule(name), *activation_parameters(*span))
        model.set_submodule(name, layer)
    return model


def halve_model(model: nn.Module) -> nn.Module:
    """A copy with BatchNorm folded and every convolution and linear layer in fp16."""
    return replace_layers(fold_batchnorm(model), LAYERS, halved)


def brain_model(model: nn.Module) -> nn.Module:
    """A copy with BatchNorm folded and every convolution and linear layer in bfloat16."""
    return replace_layers(fold_batchnorm(model), LAYERS, in_brain)


def replace_layers(model: nn.Module, kinds: tuple[type, ...], made_of: Callable[[Any], nn.Module]) -> nn.Module:
    """The model, with what ``made_of`` makes of each layer of these types in its place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, kinds):
            model.set_submodule(name, made_of(layer))
    return model


class Session:
    """An ONNX model in ONNX Runtime, its inputs and outputs bound once."""

    def __init__(self, path: Path, inputs: Inputs, threads: int = 1, profile_to: Path | None = None) -> None:
        self._session = onnx_session(path, threads, profile_to)
        self._binding = self._session.io_binding()
        self._arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in inputs]
        for value, array in zip(self._session.get_inputs(), self._arrays, strict=True):
            self._binding.bind_cpu_input(value.name, array)
        for value in self._session.get_outputs():
            self._binding.bind_output(value.name)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def end_profiling(self) -> str:
        return self._session.end_profiling()

    def output(self) -> Tensor:
        self.run()
        return torch.from_numpy(self._binding.copy_outputs_to_cpu()[0])


class ProfiledSession:
    """An ONNX model of one operator, run in turns with ours; the seconds its nodes take, from ONNX Runtime's own profiler.

    Nodes that only change the layout (transposes, reorders) are left out: a whole model does not pay them at every operator.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, *, int8: bool) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        path = export_onnx(copy.deepcopy(model), inputs, folder / "model.onnx")
        if int8:
            _quantise(path, folder / "int8.onnx", [inputs], None)
            path = folder / "int8.onnx"
        self._session = Session(path, inputs, profile_to=folder / "profile")
        self._counts: list[int] = []
        for _ in range(3):
            self._session.run()
        start = time.perf_counter()
        self._session.run()
        self._once = time.perf_counter() - start

    def repeat(self, seconds: float) -> None:
        """One sample: as many runs as fill ``seconds``."""
        count = max(3, min(200, round(seconds / self._once)))
        with quiet_core():
            for _ in range(count):
                self._session.run()
        self._counts.append(count)

    def finish(self) -> list[float]:
        """Seconds one run took in its nodes, the mean of each sample."""
        events = json.loads(Path(self._session.end_profiling()).read_text())
        self._folder.cleanup()
        nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
        runs = max(1, sum(self._counts) + 4)
        per_run = len(nodes) // runs
        assert per_run * runs == len(nodes), "every run has the same nodes"
        moves = ("Transpose", "ReorderInput", "ReorderOutput")
        seconds = [0.0 if event["args"]["op_name"] in moves else event["dur"] * 1e-6 for event in nodes]
        totals = [sum(seconds[start : start + per_run]) for start in range(4 * per_run, len(seconds), per_run)]
        samples, start = [], 0
        for count in self._counts:
            samples.append(sum(totals[start : start + count]) / count)
            start += count
        return samples


def onnx_fp32(model: nn.Module, inputs: Inputs, threads: int = 1) -> Session:
    with tempfile.TemporaryDirectory() as folder:
        return Session(export_onnx(copy.deepcopy(model), inputs, Path(folder) / "model.onnx"), inputs, threads)


def onnx_int8(model: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> tuple[Session, str]:
    """The fastest of ONNX Runtime's static quantisations, and its name; QDQ, uint8 activations, int8 weights per channel.

    Two are tried: every operator it can quantise (its default), and only convolutions and matrix products.
    """
    sessions: dict[str, Session] = {}
    with tempfile.TemporaryDirectory() as temporary:
        source = export_onnx(copy.deepcopy(model), inputs, Path(temporary) / "model.onnx")
        for name, operators in {"all operators": None, "contractions": _CONTRACTIONS}.items():
            target = Path(temporary) / f"{name}.onnx"
            _quantise(source, target, calibration, operators)
            sessions[name] = Session(target, inputs)
    with quiet_core():
        samples = interleaved({name: session.run for name, session in sessions.items()}, repeats=5)
    best = min(samples, key=lambda name: float(np.median(samples[name])))
    return sessions[best], best


def quantised_onnx(source: Path, target: Path, calibration: Sequence[Inputs]) -> Path:
    """``source`` with every operator quantised that ONNX Runtime can, as ``onnx_int8`` has it first."""
    _quantise(source, target, calibration, None)
    return target


def _quantise(source: Path, target: Path, calibration: Sequence[Inputs], operators: list[str] | None) -> None:
    from onnxruntime import quantization as ort

    names = [value.name for value in onnx_session(source).get_inputs()]

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = (
                {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)} for inputs in calibration
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)  # it advises to pre-process the model, which was exported just now
    try:
        ort.quantize_static(
            str(source), str(target), Reader(), quant_format=ort.QuantFormat.QDQ, per_channel=True,
            activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8, op_types_to_quantize=operators,
        )  # fmt: skip
    finally:
        root.setLevel(level)
