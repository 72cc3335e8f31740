"""``autocomp::conv2d_bf16`` and ``autocomp::linear_bf16`` → Relax.

Where the target has instructions for them: round → contraction → bias, three functions, so that fusion puts the rounding of the next such layer
into the write-back of this one, and activations stay in 16 bits between them. Elsewhere, and for depthwise convolutions, which wait for
memory, the same rounded values are multiplied in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.compiler import convolutions
from autocomp.compiler.stored import StoredConverter
from autocomp.compiler.vectors import in_whole_vectors
from autocomp.hardware.profile import Profile
from autocomp.kernels import bf16, compute, packing
from autocomp.kernels.specs import ConvSpec, DenseSpec
from autocomp.records.precisions import BRAIN, FORMATS

if TYPE_CHECKING:
    import torch


def lowering(program: torch.export.ExportedProgram, profile: Profile) -> dict[str, Any]:
    """The translation of each op, by its name."""
    return {
        "conv2d_bf16.default": BrainConverter(program, profile, convolution=True),
        "linear_bf16.default": BrainConverter(program, profile, convolution=False),
    }


def has_kernels(profile: Profile) -> bool:
    """Whether the target multiplies pairs of bfloat16: a profile that says so is held to it when it is loaded."""
    return any(FORMATS[name].family is BRAIN for name in profile.precisions)


class BrainConverter(StoredConverter):
    """Emit one layer in bfloat16."""

    def __init__(self, program: torch.export.ExportedProgram, profile: Profile, *, convolution: bool) -> None:
        super().__init__(program, profile, convolution=convolution)
        self.dot = bf16.dot(profile)
        self.has_kernels = has_kernels(profile)

    def __call__(self, node: Any, importer: Any) -> Any:
        from tvm import relax

        builder, x = importer.block_builder, importer.env[node.args[0]]
        weight, bias = (self.array(argument) for argument in node.args[1:3])
        if not self.convolution:
            result = self._linear(builder, x, weight)
            return builder.emit(relax.op.add(result, relax.const(np.ascontiguousarray(bias))))
        stride, padding, dilation, groups = node.args[3:]
        pairs = self.has_kernels and not (int(groups) > 1 and weight.shape[1] == 1)
        data = self._round(builder, x, pairs=pairs)
        emit = self._sums(builder) if pairs else convolutions.floats(builder)
        array = bf16.bits_of(weight) if pairs else np.ascontiguousarray(weight)
        sums = convolutions.constant(builder, data, array, stride, padding, dilation, int(groups), emit)
        result = builder.emit(relax.op.add(sums, relax.const(np.ascontiguousarray(bias))))
        return builder.emit(relax.op.permute_dims(result, [0, 3, 1, 2]))

    def _linear(self, builder: Any, x: Any, weight: np.ndarray) -> Any:
        from tvm import relax

        data = self._round(builder, x, pairs=self.has_kernels)
        if not self.has_kernels:
            return builder.emit(relax.op.matmul(data, relax.const(np.ascontiguousarray(weight.T))))
        spec = DenseSpec.of([int(size) for size in data.ty.shape], len(weight), self.lanes)
        packed = relax.const(packing.pack_dense_weight(bf16.bits_of(weight), self.lanes, self.dot))
        return builder.emit_te(
            lambda data, w: compute.dense(data, w, spec, self.dot), data, packed, primfunc_name_hint="dense_bf16"
        )

    def _sums(self, builder: Any) -> convolutions.Emit:
        """What makes a plain convolution of bits."""
        from tvm import relax

        def emit(data: Any, weight: Any, strides: Any, borders: Any, dilation: Any, groups: int) -> Any:
            low, high = zip(*borders, strict=True)
            shape = [int(size) for size in data.ty.shape]

            def sums(tiled: np.ndarray) -> Any:
                spec = ConvSpec.of(shape, tiled.shape, strides, [*low, *high], dilation, groups, self.lanes)
                packed = relax.const(packing.pack_conv_weight(tiled, spec, self.dot))
                return builder.emit_te(
                    lambda data, w: compute.conv2d(data, w, spec, self.dot),
                    data,
                    packed,
                    primfunc_name_hint="conv2d_bf16",
                )

            return in_whole_vectors(builder, weight.value, groups, self.lanes, sums)

        return emit

    def _round(self, builder: Any, x: Any, *, pairs: bool) -> Any:
        """``x`` rounded, channels last; its bits (``pairs``), or float32."""
        function = bf16.rounded if pairs else bf16.rounded_in_float32

        def make() -> Any:
            return builder.emit_te(function, self.channels_last(builder, x), primfunc_name_hint="to_bf16")

        return self.once(x, make, pairs)
