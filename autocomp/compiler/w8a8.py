"""``autocomp::conv2d_w8a8``, ``convolution_w8a8``, ``linear_w8a8`` and ``lstm_w8a8`` → Relax, equal to the specification bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.compiler import convolutions
from autocomp.compiler.recurrent import LoopConverter
from autocomp.compiler.stored import StoredConverter
from autocomp.compiler.vectors import in_whole_vectors
from autocomp.hardware.profile import Profile
from autocomp.kernels import compute, packing, requantise
from autocomp.kernels.intrinsics import dot_product
from autocomp.kernels.specs import ConvSpec, DenseSpec
from autocomp.kernels.volumes import unfolded

if TYPE_CHECKING:
    import torch


def lowering(program: torch.export.ExportedProgram, profile: Profile) -> dict[str, Any]:
    """The translation of each op, by its name."""
    convolution = QuantisedConverter(program, profile, convolution=True)
    return {
        "conv2d_w8a8.default": convolution,
        "convolution_w8a8.default": convolution.general,
        "linear_w8a8.default": QuantisedConverter(program, profile, convolution=False),
        "lstm_w8a8.default": LoopConverter(program, profile),
    }


class QuantisedConverter(StoredConverter):
    """Emit quantise → integer contraction → dequantise for ``autocomp::conv2d_w8a8`` and ``autocomp::linear_w8a8``.

    The three are separate functions so that fusion can put dequantise (and the next layer's quantise) into the write-back.
    """

    def __init__(self, program: torch.export.ExportedProgram, profile: Profile, *, convolution: bool) -> None:
        super().__init__(program, profile, convolution=convolution)
        self.dot = dot_product(profile)

    def __call__(self, node: Any, importer: Any) -> Any:
        from tvm import relax

        builder = importer.block_builder
        x = importer.env[node.args[0]]
        weight_array, scale, bias = (self.array(argument) for argument in node.args[1:4])
        inv_xs, zero_point = node.args[4:6]
        data = self.channels_last(builder, x)
        zero_point -= self.dot.offset  # of the integers as they are stored
        zero = np.array([zero_point], "int32")
        quantised = self._quantise(builder, x, data, float(inv_xs), int(zero_point))
        if self.convolution:
            stride, padding, dilation, groups = node.args[6:10]
            emit = self._emitter(builder, scale, bias, zero, zero_point)
            result = convolutions.constant(
                builder, quantised, weight_array, stride, padding, dilation, int(groups), emit
            )
            return builder.emit(relax.op.permute_dims(result, [0, 3, 1, 2]))
        rows = [int(size) for size in data.ty.shape]
        spec = DenseSpec.of(rows, weight_array.shape[0], self.lanes)
        packed = packing.pack_dense_weight(weight_array, self.lanes, self.dot)
        sums = builder.emit_te(
            lambda data, w: compute.dense(data, w, spec, self.dot),
            quantised, relax.const(packed), primfunc_name_hint="dense_int8",
        )  # fmt: skip
        return self._floats(builder, sums, weight_array, scale, bias, zero_point)

    def general(self, node: Any, importer: Any) -> Any:
        """``autocomp::convolution_w8a8``: three dimensions unfolded to two, transposed ones in phases, each with its own integers."""
        import torch
        from tvm import relax

        from autocomp.layers.convolution import turned

        builder = importer.block_builder
        x = importer.env[node.args[0]]
        weight_array, scale, bias = (self.array(argument) for argument in node.args[1:4])
        inv_xs, zero_point = node.args[4:6]
        stride, padding, dilation, groups, output_padding = node.args[6:11]
        zero_point -= self.dot.offset
        zero = np.array([zero_point], "int32")
        rank = len(stride) + 2
        data = builder.emit(relax.op.permute_dims(x, [0, *range(2, rank), 1]))
        quantised = self._quantise(builder, x, data, float(inv_xs), int(zero_point))
        emit = self._emitter(builder, scale, bias, zero, zero_point)
        if output_padding is None:
            result = convolutions.constant(builder, quantised, weight_array, stride, padding, dilation, groups, emit)
        else:
            outputs = [int(size) for size in node.meta["val"].shape[2:]]
            inputs_first = convolutions.Weight(builder, turned(torch.from_numpy(weight_array), groups).numpy())
            result = convolutions.in_phases(
                builder, quantised, inputs_first, stride, padding, dilation, groups, outputs, self.lanes, emit
            )
        return builder.emit(relax.op.permute_dims(result, [0, rank - 1, *range(1, rank - 1)]))

    def _emitter(
        self, builder: Any, scale: np.ndarray, bias: np.ndarray, zero: Any, zero_point: int
    ) -> convolutions.Emit:
        """What makes a plain convolution of stored integers, its results dequantised."""
        from tvm import relax

        def emit(data: Any, weight: Any, strides: Any, borders: Any, dilation: Any, groups: int) -> Any:
            array = weight.value
            phases = len(array) // len(scale)  # of a transposed one: outputs are ordered by group, phase and channel

            def spread(values: np.ndarray) -> np.ndarray:
                by_group = values.reshape(groups, 1, -1).repeat(phases, 1)
                return np.ascontiguousarray(by_group.reshape(-1))

            frames = None
            if len(strides) == 3:
                frames = int(data.ty.shape[0])
                data = builder.emit_te(
                    lambda data, z: unfolded(data, z, array.shape[2], strides[0], borders[0], dilation[0], groups),
                    data, relax.const(zero), primfunc_name_hint="unfold",
                )  # fmt: skip
                array = array.swapaxes(1, 2).reshape(len(array), -1, *array.shape[3:])
            low, high = zip(*borders[-2:], strict=True)
            sums = self._sums(builder, data, array, strides[-2:], [*low, *high], dilation[-2:], groups, zero)
            result = self._floats(builder, sums, array, spread(scale), spread(bias), zero_point)
            if frames is None:
                return result
            many, *rest = (int(size) for size in result.ty.shape)
            return builder.emit(relax.op.reshape(result, [frames, many // frames, *rest]))

        return emit

    def _sums(
        self,
        builder: Any,
        data: Any,
        weight: np.ndarray,
        stride: Any,
        borders: Any,
        dilation: Any,
        groups: int,
        zero: Any,
    ) -> Any:
        """The int32 sums of products of stored integers ``data [N, H, W, C]`` with ``weight`` OIHW."""
        from tvm import relax

        shape = [int(size) for size in data.ty.shape]

        def sums(tiled: np.ndarray) -> Any:
            spec = ConvSpec.of(shape, tiled.shape, stride, borders, dilation, groups, self.lanes)
            packed = packing.pack_conv_weight(tiled, spec, self.dot)
            return builder.emit_te(
                lambda data, w, z: compute.conv2d(data, w, spec, self.dot, z),
                data, relax.const(packed), relax.const(zero), primfunc_name_hint="conv2d_int8",
            )  # fmt: skip

        return in_whole_vectors(builder, weight, groups, max(self.lanes, self.dot.lanes), sums)

    def _floats(
        self, builder: Any, sums: Any, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray, zero_point: int
    ) -> Any:
        from tvm import relax

        # sum (q - zp) w = sum q w - zp sum w: the second term is known now
        taken = (weight.reshape(len(weight), -1).astype("int64").sum(1) * int(zero_point)).astype("int32")
        return builder.emit_te(
            requantise.dequantise, sums, relax.const(taken), relax.const(scale), relax.const(bias),
            primfunc_name_hint="dequantise",
        )  # fmt: skip

    def _quantise(self, builder: Any, source: Any, data: Any, inv_xs: float, zero_point: int) -> Any:
        """The integers of ``data``, which is ``source`` in another order: two layers that read one tensor on one scale share them."""
        from tvm import relax

        def make() -> Any:
            return builder.emit_te(
                lambda data, inverse, zero: requantise.quantise(data, inverse, zero, self.dot.activation),
                data, relax.const(np.array([inv_xs], "float32")), relax.const(np.array([zero_point], "float32")),
                primfunc_name_hint="quantise",
            )  # fmt: skip

        return self.once(source, make, inv_xs, zero_point)
