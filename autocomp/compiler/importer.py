"""torch → Relax: the model as exported, with our integer custom ops given their own lowering."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.compiler.half import HalfConverter
from autocomp.compiler.normalise import decomposed, origin
from autocomp.compiler.weight_only import WeightOnlyConverter
from autocomp.errors import ExportError
from autocomp.hardware import Profile
from autocomp.kernels import compute, packing, requantise
from autocomp.kernels.intrinsics import dot_product

if TYPE_CHECKING:
    import torch
    import tvm


def export_program(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    """Export with ``torch.export`` and decompose to core operations. ExportError names the operation and where it stands."""
    import torch

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, example_inputs)
            return decomposed(program)
    except ExportError:
        raise
    except Exception as error:
        detail = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(
            f"the model {type(model).__name__} cannot be exported by torch.export: {detail}; make its forward traceable "
            "(no branches on tensor values), see torch.export's documentation"
        ) from error


def import_program(program: torch.export.ExportedProgram, profile: Profile) -> tvm.IRModule:
    """Translate an exported program to a Relax module with one function ``main``. ExportError for an unknown operation."""
    from tvm.relax.frontend.torch import from_exported_program

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TVM copies the graph in a way torch deprecates
            return from_exported_program(
                program,
                keep_params_as_input=False,
                unwrap_unit_return_tuple=True,
                run_ep_decomposition=False,  # `decomposed` has done it: another pass takes longer than the translation
                custom_convert_map={
                    "conv2d_w8a8.default": _QuantisedConverter(program, profile, convolution=True),
                    "linear_w8a8.default": _QuantisedConverter(program, profile, convolution=False),
                    "conv2d_fp16.default": HalfConverter(program, profile, convolution=True),
                    "linear_fp16.default": HalfConverter(program, profile, convolution=False),
                    "linear_weight_only.default": WeightOnlyConverter(program, profile),
                    "embedding.default": _embedding,
                },
            )
    except Exception as error:
        detail = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ExportError(f"the compiler cannot import the model: {detail}{_culprit(program, detail)}") from error


def _culprit(program: torch.export.ExportedProgram, detail: str) -> str:
    for node in program.graph.nodes:
        if node.op == "call_function":
            name = str(node.target).removeprefix("aten.")
            if name in detail or name.split(".")[0] + "'" in detail:
                return f" (used by {origin(node)})"
    return ""


def _whole_vectors(weight: np.ndarray, groups: int, lanes: int) -> np.ndarray:
    """Grouped OIHW weight with each group's outputs padded by zero rows to whole vectors, so that no vector reads two groups' inputs."""
    outputs = len(weight) // groups
    if groups == 1 or weight.shape[1] == outputs == 1 or outputs % lanes == 0:
        return weight
    padded = np.zeros((groups, compute.round_up(outputs, lanes), *weight.shape[1:]), weight.dtype)
    padded[:, :outputs] = weight.reshape(groups, outputs, *weight.shape[1:])
    return padded.reshape(-1, *weight.shape[1:])


def _without_padding(sums: Any, groups: int, channels: int) -> Any:
    """The sums of the channels that ``_whole_vectors`` was given."""
    from tvm import te

    outputs, padded = channels // groups, int(sums.shape[-1]) // groups
    return te.compute(
        (*sums.shape[:-1], channels),
        lambda *i: sums[(*i[:-1], i[-1] // outputs * padded + i[-1] % outputs)],
        name="take",
    )


def _embedding(node: Any, importer: Any) -> Any:
    """Look rows up; an index outside the table means its nearest row, where TVM's own translation reads foreign memory."""
    from tvm import relax

    table, indices = importer.env[node.args[0]], importer.env[node.args[1]]
    extents = [*indices.ty.shape.values, table.ty.shape.values[-1]]
    value = indices
    for step in (
        lambda x: relax.op.astype(x, "int32"),
        lambda x: relax.op.reshape(x, (-1,)),
        lambda x: relax.op.take(table, x, axis=0, mode="clip"),
        lambda x: relax.op.reshape(x, extents),
    ):
        value = importer.block_builder.emit(step(value))
    return value


class _QuantisedConverter:
    """Emit quantise → integer contraction → dequantise for ``autocomp::conv2d_w8a8`` and ``autocomp::linear_w8a8``.

    The three are separate functions so that fusion can put dequantise (and the next layer's quantise) into the write-back.
    """

    def __init__(self, program: torch.export.ExportedProgram, profile: Profile, *, convolution: bool) -> None:
        signature = program.graph_signature
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.state = {**program.state_dict, **program.constants}
        self.dot = dot_product(profile)
        self.lanes = profile.lanes
        self.convolution = convolution
        self._quantised: dict[tuple[int, float, int], tuple[Any, Any]] = {}

    def __call__(self, node: Any, importer: Any) -> Any:
        from tvm import relax

        builder = importer.block_builder
        x = importer.env[node.args[0]]
        weight_array, scale, bias = (self._array(argument) for argument in node.args[1:4])
        inv_xs, zero_point = node.args[4:6]
        data = builder.emit(relax.op.permute_dims(x, [0, 2, 3, 1])) if self.convolution else x
        zero_point -= self.dot.offset  # of the integers as they are stored
        zero = np.array([zero_point], "int32")
        quantised = self._quantise(builder, x, data, float(inv_xs), int(zero_point))
        if self.convolution:
            stride, padding, dilation, groups = node.args[6:10]
            shape = [int(size) for size in data.ty.shape]
            tiled = _whole_vectors(weight_array, int(groups), max(self.lanes, self.dot.lanes))
            spec = compute.ConvSpec.of(
                shape, tiled.shape, stride, [*padding, *padding], dilation, int(groups), self.lanes
            )
            packed = packing.pack_conv_weight(tiled, spec, self.dot)
            accumulator = builder.emit_te(
                lambda data, w, z: compute.conv2d(data, w, spec, self.dot, z),
                quantised, relax.const(packed), relax.const(zero), primfunc_name_hint="conv2d_int8",
            )  # fmt: skip
            if len(tiled) != len(weight_array):
                accumulator = builder.emit_te(
                    _without_padding, accumulator, int(groups), len(weight_array), primfunc_name_hint="take_channels"
                )
        else:
            rows = [int(size) for size in data.ty.shape]
            spec_d = compute.DenseSpec.of(rows, weight_array.shape[0], self.lanes)
            packed = packing.pack_dense_weight(weight_array, self.lanes, self.dot)
            accumulator = builder.emit_te(
                lambda data, w: compute.dense(data, w, spec_d, self.dot),
                quantised, relax.const(packed), primfunc_name_hint="dense_int8",
            )  # fmt: skip
        # sum (q - zp) w = sum q w - zp sum w: the second term is known now
        compensation = (weight_array.reshape(len(weight_array), -1).astype("int64").sum(1) * int(zero_point)).astype(
            "int32"
        )
        result = builder.emit_te(
            requantise.dequantise, accumulator, relax.const(compensation), relax.const(scale), relax.const(bias),
            primfunc_name_hint="dequantise",
        )  # fmt: skip
        return builder.emit(relax.op.permute_dims(result, [0, 3, 1, 2])) if self.convolution else result

    def _array(self, node: Any) -> np.ndarray:
        """The array of a weight, which the exported graph takes as an input."""
        return self.state[self.names[node.name]].detach().numpy()

    def _quantise(self, builder: Any, source: Any, data: Any, inv_xs: float, zero_point: int) -> Any:
        from tvm import relax

        key = (hash(source), inv_xs, zero_point)
        if key not in self._quantised:  # two layers that read one tensor on one scale share its integers
            value = builder.emit_te(
                lambda data, inverse, zero: requantise.quantise(data, inverse, zero, self.dot.activation),
                data, relax.const(np.array([inv_xs], "float32")), relax.const(np.array([zero_point], "float32")),
                primfunc_name_hint="quantise",
            )  # fmt: skip
            self._quantised[key] = (source, value)  # the source is held so that its hash stays taken
        return self._quantised[key][1]
