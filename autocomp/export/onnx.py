"""torch → ONNX: quantised layers become standard QuantizeLinear / DequantizeLinear nodes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.errors import ExportError

if TYPE_CHECKING:
    import torch

# Without VNNI, ONNX Runtime sums pairs of 8-bit products in 16 bits, which large weights beside large activations overflow. This option of a
# session has it multiply exactly, more slowly [onnxruntime_session_options_config_keys.h, kOrtSessionOptionsAvx2PrecisionMode].
EXACT = {"session.x64quantprecision": "1"}


def export_onnx(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], path: Path) -> Path:
    """Write ``model`` (BatchNorm folded) as one ONNX file for the shapes of the example inputs. ExportError if it cannot be.

    A quantised layer computes the same integers up to float rounding: its input goes through QuantizeLinear and
    DequantizeLinear, its weight is an int8 constant with one scale a channel [ONNX operators 13]. Other weights are stored as they are,
    in 16, 8 or 4 bits or as indices, and decoded by operators that a runtime folds when it loads the file.
    """
    import torch

    from autocomp.export.onnx_recurrent import with_onnx_recurrences
    from autocomp.graph.fold import fold_batchnorm

    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                with_onnx_recurrences(fold_batchnorm(model).eval()), example_inputs, dynamo=True, verbose=False, external_data=False,
                custom_translation_table=_translations(),
            )  # fmt: skip
            assert program is not None  # only dynamo=False returns nothing
            _write_zero_points(program.model)
            program.save(str(path), external_data=False)
    except Exception as error:
        detail = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"the model cannot be exported to ONNX: {detail}") from error
    return path


def onnx_session(path: Path, threads: int = 1, profile_to: Path | None = None, exact: bool = False) -> Any:
    """Open an ONNX Runtime session on the CPU with a fixed number of threads; ``profile_to`` starts its profiler's file name.

    ``exact`` asks for 8-bit products that do not saturate (`EXACT`), on a processor where ONNX Runtime's own choice does.
    """
    import onnxruntime

    from autocomp.hardware.host import this_cpu

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    if exact and this_cpu().int8 == "none":  # elsewhere it would only be slower
        for key, value in EXACT.items():
            options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Run a session on torch tensors, in the order of its inputs."""
    import torch

    names = [value.name for value in session.get_inputs()]
    feeds = {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in zip(names, inputs, strict=True)}
    outputs = tuple(torch.from_numpy(value) for value in session.run(None, feeds))
    return outputs[0] if len(outputs) == 1 else outputs


def _write_zero_points(model: Any) -> None:
    """Give every 8-bit weight's DequantizeLinear the zeros it means, each its own: a runtime that is asked for `EXACT` changes them in place."""
    from onnxscript import ir

    graph = model.graph
    for index, node in enumerate(list(graph)):
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" and len(node.inputs) == 2 else None
        if weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.INT8:
            zeros = ir.tensor(np.zeros(weight.shape[0], dtype=np.int8), name=f"{weight.name}_zero_{index}")
            value = ir.Value(
                name=zeros.name, const_value=zeros, shape=zeros.shape, type=ir.TensorType(ir.DataType.INT8)
            )
            graph.register_initializer(value)
            node.resize_inputs(3)
            node.replace_input_with(2, value)


def _translations() -> dict[Any, Any]:
    import torch
    from onnxscript import opset18 as op

    from autocomp.export.onnx_recurrent import translation

    def quantised_input(x: Any, inv_xs: float, zp: int) -> Any:
        scale = op.Constant(value_float=float(1.0 / np.float32(inv_xs)))
        zero = op.Cast(op.Constant(value_int=int(zp)), to=2)  # 2: uint8
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)

    def weight_of(w: Any, scale: Any, inv_xs: float) -> Any:
        # the layer's scale is weight scale times activation scale
        return op.DequantizeLinear(w, op.Mul(scale, op.Constant(value_float=float(inv_xs))), axis=0)

    def linear(x: Any, w: Any, scale: Any, bias: Any, inv_xs: float, zp: int) -> Any:
        weight = op.Transpose(weight_of(w, scale, inv_xs), perm=[1, 0])
        return op.Add(op.MatMul(quantised_input(x, inv_xs, zp), weight), bias)

    def convolution(
        x: Any,
        w: Any,
        scale: Any,
        bias: Any,
        inv_xs: float,
        zp: int,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        output_padding: Any = None,
    ) -> Any:
        value, weight = quantised_input(x, inv_xs, zp), weight_of(w, scale, inv_xs)
        sizes = {
            "strides": list(stride),
            "pads": [*padding, *padding],
            "dilations": list(dilation),
            "group": int(groups),
        }
        if output_padding is None:
            return op.Conv(value, weight, bias, **sizes)
        outputs, inputs, *kernel = (int(size) for size in w.shape)
        each = outputs // int(groups)
        by_group = op.Reshape(weight, op.Constant(value_ints=[int(groups), each, inputs, *kernel]))
        turned = op.Transpose(by_group, perm=[0, 2, 1, *range(3, 3 + len(kernel))])
        first = op.Reshape(turned, op.Constant(value_ints=[inputs * int(groups), each, *kernel]))
        return op.ConvTranspose(value, first, bias, output_padding=list(output_padding), **sizes)

    def weight_only(x: Any, w: Any, scales: Any, bias: Any, bits: int, group: int) -> Any:
        # Standard operators that the runtime folds into a float weight when it loads the file: what is small is the file.
        def ints(*values: int) -> Any:
            return op.Constant(value_ints=list(values))

        levels = w
        if bits == 4:
            eight = op.Cast(op.Constant(value_int=8), to=2)  # 2: uint8
            low = op.BitwiseAnd(w, op.Cast(op.Constant(value_int=15), to=2))
            high = op.BitShift(w, op.Cast(op.Constant(value_int=4), to=2), direction="RIGHT")
            fields = op.Concat(op.Unsqueeze(low, ints(2)), op.Unsqueeze(high, ints(2)), axis=2)
            levels = op.BitwiseXor(fields, eight)  # two's complement, 8 too large
        levels = op.Reshape(op.Cast(levels, to=1), ints(-1, group))  # 1: float
        if bits == 4:
            levels = op.Sub(levels, op.Constant(value_float=8.0))
        weight = op.Reshape(op.Mul(levels, op.Reshape(scales, ints(-1, 1))), ints(int(w.shape[0]), -1))
        used = op.Slice(weight, ints(0), ints(int(x.shape[-1])), ints(1))
        return op.Add(op.MatMul(x, op.Transpose(used, perm=[1, 0])), bias)

    def halves(x: Any, w: Any) -> tuple[Any, Any]:
        # 10: float16, 1: float. Products are summed in float32, which every runtime has kernels for.
        return op.Cast(op.Cast(x, to=10), to=1), op.Cast(w, to=1)

    def linear_half(x: Any, w: Any, bias: Any) -> Any:
        value, weight = halves(x, w)
        return op.Add(op.MatMul(value, op.Transpose(weight, perm=[1, 0])), bias)

    def conv2d_half(x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
        value, weight = halves(x, w)
        return op.Conv(
            value, weight, bias,
            strides=list(stride), pads=[*padding, *padding], dilations=list(dilation), group=int(groups),
        )  # fmt: skip

    return {
        torch.ops.autocomp.linear_w8a8.default: linear,
        torch.ops.autocomp.linear_fp16.default: linear_half,
        torch.ops.autocomp.conv2d_fp16.default: conv2d_half,
        torch.ops.autocomp.linear_weight_only.default: weight_only,
        torch.ops.autocomp.conv2d_w8a8.default: convolution,
        torch.ops.autocomp.onnx_recurrence.default: translation(op),
        torch.ops.autocomp.convolution_w8a8.default: convolution,
    }


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
