"""The other side of every comparison: ONNX Runtime on one thread, fp32 and its best static int8, and our own W8A8 of the same model."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocomp.compress.fold import fold_batchnorm
from autocomp.compress.quantize import activation_parameters, quantised
from autocomp.devices.timing import interleaved, quiet_core
from autocomp.onnx_export import export_onnx, onnx_session

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
        parent, _, child = name.rpartition(".")
        layer = quantised(model.get_submodule(name), *activation_parameters(*span))  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), child, layer)
    return model


class Session:
    """An ONNX model in ONNX Runtime on one thread, its inputs and outputs bound once."""

    def __init__(self, path: Path, inputs: Inputs) -> None:
        self._session = onnx_session(path)
        self._binding = self._session.io_binding()
        self._arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in inputs]
        for value, array in zip(self._session.get_inputs(), self._arrays, strict=True):
            self._binding.bind_cpu_input(value.name, array)
        for value in self._session.get_outputs():
            self._binding.bind_output(value.name)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def output(self) -> Tensor:
        self.run()
        return torch.from_numpy(self._binding.copy_outputs_to_cpu()[0])


def onnx_fp32(model: nn.Module, inputs: Inputs) -> Session:
    with tempfile.TemporaryDirectory() as folder:
        return Session(export_onnx(copy.deepcopy(model), inputs, Path(folder) / "model.onnx"), inputs)


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
