"""Reference points: the dense model in ONNX Runtime, fp32 and statically quantised, and in torch with dynamic int8.

They are timed beside our dense module in one run.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.compiler.build import CompiledModel
from autocomp.errors import last_line
from autocomp.export.onnx import export_onnx, onnx_session
from autocomp.graph.batches import Axes, Batch, axes_of, count, like, part
from autocomp.hardware.timing import interleaved, median_and_spread, quiet_core
from autocomp.records.evaluation import Reference
from autocomp.records.latency import Latency
from autocomp.tasks.task import Task, evaluate_task

if TYPE_CHECKING:
    import torch

FP32 = "ONNX Runtime fp32"
INT8 = "ONNX Runtime int8"
DYNAMIC = "torch dynamic int8"
OURS = "dense, tuned (called from Python)"


def measure_references(
    task: Task, compiled: CompiledModel, samples: int, warn: Callable[[str], None] = lambda text: None
) -> list[Reference]:
    """Measure ONNX Runtime fp32 and int8 (QDQ, uint8 activations, one thread) against our dense module, interleaved.

    All are called from Python with bound inputs, so that a call's overhead meets each alike; ours is returned too.
    ``samples`` calibration samples set the int8 ranges. A model with linear layers is also run by torch with their weights in int8 and
    ranges of activations taken at run time, which is all that torch's own dynamic quantisation covers. One that cannot be made or judged is
    left out, and ``warn`` is told why.
    """
    import torch

    calls: dict[str, Any] = {OURS: compiled.prepare(*task.example_inputs)}
    metrics, sizes = {OURS: evaluate_task(task, task.model)}, {OURS: _parameter_bytes(task.model)}

    def add(name: str, make: Callable[[], tuple[torch.nn.Module, Callable[[], object], int] | None]) -> None:
        try:
            if (made := make()) is not None:
                metrics[name] = evaluate_task(task, made[0])
                calls[name], sizes[name] = made[1:]
        except Exception as error:
            warn(f"{name} could not be measured as a reference: {type(error).__name__}: {last_line(error)}")

    def session(path: Path) -> tuple[torch.nn.Module, Callable[[], object], int]:
        opened = onnx_session(path)
        return _session_module(opened, task), _bound(opened, task.example_inputs), path.stat().st_size

    def dynamic() -> tuple[torch.nn.Module, Callable[[], object], int] | None:
        model = _quantise_dynamic(task.model)
        return None if model is None else (model, lambda: model(*task.example_inputs), _state_bytes(model))

    with tempfile.TemporaryDirectory() as temporary:
        fp32, int8 = Path(temporary) / "fp32.onnx", Path(temporary) / "int8.onnx"
        add(FP32, lambda: session(export_onnx(task.model, task.example_inputs, fp32)))
        if FP32 in calls:
            add(INT8, lambda: session(_quantise_static(fp32, int8, task, samples)))
    add(DYNAMIC, dynamic)
    with quiet_core(), torch.inference_mode():
        samples_by_name = interleaved(calls)
    references = []
    for name, times in samples_by_name.items():
        seconds, spread = median_and_spread(times)
        latency = Latency(seconds, spread, "measured", compiled.profile.name, f"{name}, 1 thread", tuple(times))
        references.append(
            Reference(name, metrics[name], latency, sizes[name], "timed in one run, interleaved, called from Python")
        )
    return references


def _bound(session: Any, example_inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """A call of a session on inputs and outputs that are bound once."""
    import numpy as np

    binding = session.io_binding()
    arrays = [np.ascontiguousarray(tensor.detach().numpy()) for tensor in example_inputs]
    for value, array in zip(session.get_inputs(), arrays, strict=True):
        binding.bind_cpu_input(value.name, array)
    for value in session.get_outputs():
        binding.bind_output(value.name)

    def call(_kept: list[Any] = arrays) -> None:  # whose memory is bound
        session.run_with_iobinding(binding)

    return call


def _parameter_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _quantise_static(source: Path, target: Path, task: Task, samples: int) -> Path:
    """ONNX Runtime's own post-training quantisation: QDQ, uint8 activations, int8 weights a channel, min-max ranges."""
    from onnxruntime import quantization as ort

    class Reader(ort.CalibrationDataReader):
        def __init__(self, names: Sequence[str]) -> None:
            self._feeds = (
                {name: x.numpy() for name, x in zip(names, row, strict=True)} for row in _rows(task, samples)
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    names = [value.name for value in onnx_session(source).get_inputs()]
    with _silent_logger():
        ort.quantize_static(
            str(source), str(target), Reader(names), quant_format=ort.QuantFormat.QDQ, per_channel=True,
            activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8,
        )  # fmt: skip
    return target


def _quantise_dynamic(model: torch.nn.Module) -> torch.nn.Module | None:
    """The model with torch's dynamic int8 linear layers; None where it has none, or this torch no longer offers them.

    None for recurrent layers, too: their canonical form is a loop in Python, which would be a weak opponent.
    """
    import torch

    from autocomp.layers.recurrent import Recurrence

    quantise = getattr(torch.ao.quantization, "quantize_dynamic", None)
    kinds = {type(module) for module in model.modules()}
    if quantise is None or torch.nn.Linear not in kinds or Recurrence in kinds:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this will move to another package
        quantised: torch.nn.Module = quantise(model, {torch.nn.Linear}, torch.qint8)
    return quantised.eval()


def _state_bytes(model: torch.nn.Module) -> int:
    """Size of what ``torch.save`` writes of the state: quantised layers pack their weights where no parameter shows them."""
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model.state_dict(), buffer)
    return buffer.tell()


def _rows(task: Task, samples: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Calibration samples of the example inputs' shapes, cut into batches of their size."""
    size = count(task.example_inputs, task.batch_axes)
    parts = like(task.example_inputs, task.calibration, task.batch_axes)
    return islice(parts, max(1, -(-samples // size)))


def _session_module(session: Any, task: Task) -> torch.nn.Module:
    """A module that runs a fixed-batch session over any number of samples, so that the task can evaluate it.

    Its outputs are arranged as the model's own are, each joined along the axis that grows with the number of samples.
    """
    import torch
    from torch.utils._pytree import tree_flatten, tree_unflatten

    from autocomp.export.onnx import run_session

    axes = axes_of(task.example_inputs, task.batch_axes)
    size = count(task.example_inputs, axes)
    with torch.no_grad():
        leaves, arrangement = tree_flatten(task.model(*task.example_inputs))
        twice, _ = tree_flatten(task.model(*_repeated(task.example_inputs, 2, axes)))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    grows = [_axis_that_grows(leaves[index].shape, twice[index].shape) for index in places]

    class SessionModule(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> Any:
            samples, found = count(inputs, axes), []
            for start in range(0, samples, size):
                length = min(size, samples - start)
                rows = part(inputs, start, length, axes)
                # the last is filled with its own rows
                full = part(_repeated(rows, -(-size // length), axes), 0, size, axes)
                outputs = run_session(session, *full)
                outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
                found.append([
                    output if axis is None else output.narrow(axis, 0, output.shape[axis] * length // size)
                    for output, axis in zip(outputs, grows, strict=True)
                ])  # fmt: skip
            joined = list(leaves)
            for place, axis, parts in zip(places, grows, zip(*found, strict=True), strict=True):
                joined[place] = parts[0] if axis is None else torch.cat(parts, axis)
            return tree_unflatten(joined, arrangement)

    return SessionModule().eval()


def _repeated(inputs: Batch, times: int, axes: Axes) -> Batch:
    """Every sample so many times; an input without samples stays."""
    import torch

    pairs = zip(inputs, axes, strict=True)
    return tuple(tensor if axis is None else torch.cat([tensor] * times, axis) for tensor, axis in pairs)


def _axis_that_grows(shape: Sequence[int], larger: Sequence[int]) -> int | None:
    return next((axis for axis, (one, two) in enumerate(zip(shape, larger, strict=True)) if one != two), None)


@contextmanager
def _silent_logger() -> Iterator[None]:
    """onnxruntime's quantiser advises on the root logger to pre-process the model; it was exported just now."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
