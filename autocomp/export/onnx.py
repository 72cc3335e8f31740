"""torch → ONNX: quantised layers become standard QuantizeLinear / DequantizeLinear nodes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.errors import ExportError, last_line
from autocomp.records.precisions import FAMILIES, load

if TYPE_CHECKING:
    import torch

# Without VNNI, ONNX Runtime sums pairs of 8-bit products in 16 bits, which large weights beside large activations overflow. This option of a
# session has it multiply exactly, more slowly [onnxruntime_session_options_config_keys.h, kOrtSessionOptionsAvx2PrecisionMode].
EXACT = {"session.x64quantprecision": "1"}
NARROW, SMALL = 16, 64  # bits and entries: of a stored weight, at most and at least


def export_onnx(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], path: Path) -> Path:
    """Write ``model`` (BatchNorm folded) as one ONNX file for the shapes of the example inputs. ExportError if it cannot be.

    A quantised layer computes the same integers up to float rounding: its input goes through QuantizeLinear and
    DequantizeLinear, its weight is an int8 constant with one scale a channel [ONNX operators 13]. Other weights are stored as they are,
    in 16, 8 or 4 bits or as indices, and decoded by operators that a runtime folds when it loads the file.
    """
    import torch
    from onnxscript import optimizer
    from onnxscript.rewriter import onnx_fusions

    from autocomp.export.onnx_recurrent import with_onnx_recurrences
    from autocomp.graph.fold import fold_batchnorm

    try:
        with _quiet(), torch.no_grad():
            program = _program(with_onnx_recurrences(fold_batchnorm(model).eval()), example_inputs)
            # the exporter's own two steps, but for what is folded
            optimizer.optimize_ir(program.model, should_fold=_may_be_folded)
            onnx_fusions.fuse(program.model)
            _write_zero_points(program.model)
            program.save(str(path), external_data=False)
    except Exception as error:
        raise ExportError(f"the model cannot be exported to ONNX: {_cause(error)}") from error
    return path


def _program(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> Any:
    """The ONNX program. Operations that torch's exporter knows in their usual form alone (attention of other than four axes) are taken apart
    where it fails on one; else they stay whole, which runtimes are faster at."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    options: dict[str, Any] = {"dynamo": True, "verbose": False, "external_data": False, "optimize": False}
    options["custom_translation_table"] = _translations()
    try:
        program = torch.onnx.export(model, example_inputs, **options)
    except torch.onnx.OnnxExporterError as error:
        try:
            with sdpa_kernel(SDPBackend.MATH):
                taken_apart = torch.export.export(model, example_inputs).run_decompositions()
                program = torch.onnx.export(taken_apart, **options)
        except Exception:
            raise error from error.__cause__
    assert program is not None  # only dynamo=False returns nothing
    return program


def _cause(error: BaseException) -> str:
    """What was wrong at the bottom of an exporter's error, in a line without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return last_line(error)


def onnx_session(
    path: Path, threads: int = 1, profile_to: Path | None = None, exact: bool = False, everywhere: bool = False
) -> Any:
    """Open an ONNX Runtime session on the CPU with a fixed number of threads; ``profile_to`` starts its profiler's file name.

    ``exact`` asks for 8-bit products that do not saturate (`EXACT`), on a processor where ONNX Runtime's own choice does, or, with
    ``everywhere``, on any.
    """
    import onnxruntime

    from autocomp.hardware.host import this_cpu

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    if exact and (everywhere or this_cpu().int8 == "none"):  # elsewhere it would only be slower
        for key, value in EXACT.items():
            options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_runner(path: Path) -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
    """A function that computes a file's outputs in ONNX Runtime, with 8-bit products that do not overflow."""
    session = onnx_session(path, exact=True)
    return lambda *inputs: run_session(session, *inputs)


def run_session(session: Any, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Run a session on torch tensors, in the order of its inputs."""
    import torch

    names = [value.name for value in session.get_inputs()]
    feeds = {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in zip(names, inputs, strict=True)}
    outputs = tuple(torch.from_numpy(value) for value in session.run(None, feeds))
    return outputs[0] if len(outputs) == 1 else outputs


_TURNS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")  # which a runtime does to the weight itself, once


def _write_zero_points(model: Any) -> None:
    """Give every 8-bit weight's DequantizeLinear the zeros it means, each its own: a runtime that is asked for `EXACT` makes unsigned numbers of
    weight and zeros, in place. A weight with several readers it would make such of twice, and fail: that one is unsigned from the start."""
    from onnxscript import ir

    graph = model.graph
    readers: dict[Any, list[Any]] = {}  # of each weight: what decodes it
    for node in graph:
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" and len(node.inputs) == 2 else None
        if weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.INT8:
            readers.setdefault(weight, []).append(node)
    for weight, nodes in readers.items():
        decoded, zero = weight, np.int8(0)
        if len(nodes) > 1 or _readers(nodes[0].outputs[0]) > 1:
            values = (weight.const_value.numpy().astype(np.int16) + 128).astype(np.uint8)
            decoded, zero = _initializer(graph, f"{weight.name}_unsigned", values), np.uint8(128)  # type: ignore[assignment]
        for index, node in enumerate(nodes):
            zeros = np.full(weight.shape[0], zero, dtype=zero.dtype)
            node.resize_inputs(3)
            node.replace_input_with(0, decoded)
            node.replace_input_with(2, _initializer(graph, f"{weight.name}_zero_{index}", zeros))
        if decoded is not weight:
            graph.initializers.pop(weight.name)


def _readers(value: Any) -> int:
    """How many nodes compute with a value, however often it is turned around on the way to them."""
    uses = [use.node for use in value.uses()]
    return sum(_readers(node.outputs[0]) if node.op_type in _TURNS else 1 for node in uses)


def _initializer(graph: Any, name: str, values: np.ndarray) -> Any:
    """A constant of a graph."""
    from onnxscript import ir

    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def _may_be_folded(node: Any) -> bool | None:
    """Not what decodes a weight of 16 bits or fewer: its result would be stored in its place. Of all else the optimiser decides."""
    for value in node.inputs:
        constant = None if value is None else value.const_value
        if constant is not None and constant.dtype.bitwidth <= NARROW and constant.size >= SMALL:
            return False
    return None


def _translations() -> dict[Any, Any]:
    import torch
    from onnxscript import opset18 as op

    from autocomp.export.onnx_recurrent import translation

    table = {torch.ops.autocomp.onnx_recurrence.default: translation(op)}
    for family in FAMILIES:
        if family.onnx:
            load(family.forms)  # importing the modules registers their ops, which this model may be without
            table |= load(family.onnx)(op)
    return table


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports packages that are not installed and its own progress; neither helps a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
