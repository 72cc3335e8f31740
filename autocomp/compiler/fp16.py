"""``autocomp::conv2d_fp16`` and ``autocomp::linear_fp16`` → Relax.

Where the target multiplies 16-bit floats: cast → contraction → bias, three functions, so that fusion puts the cast of the next such layer into
the write-back of this one and activations stay in 16 bits between them. Elsewhere the same rounded values are multiplied in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.compiler import convolutions
from autocomp.compiler.stored import StoredConverter
from autocomp.hardware.profile import Profile
from autocomp.kernels import fp16
from autocomp.kernels.specs import ConvSpec, DenseSpec

if TYPE_CHECKING:
    import torch


def lowering(program: torch.export.ExportedProgram, profile: Profile) -> dict[str, Any]:
    """The translation of each op, by its name."""
    return {
        "conv2d_fp16.default": HalfConverter(program, profile, convolution=True),
        "linear_fp16.default": HalfConverter(program, profile, convolution=False),
    }


class HalfConverter(StoredConverter):
    """Emit one 16-bit layer."""

    def __init__(self, program: torch.export.ExportedProgram, profile: Profile, *, convolution: bool) -> None:
        super().__init__(program, profile, convolution=convolution)
        self.lanes = 2 * profile.lanes
        self.has_kernels = fp16.has_kernels(profile)

    def __call__(self, node: Any, importer: Any) -> Any:
        builder, x = importer.block_builder, importer.env[node.args[0]]
        weight, bias = (self.array(argument) for argument in node.args[1:3])
        if not self.has_kernels:
            return self._in_float32(builder, x, weight, bias, node.args[3:])
        return self._in_float16(builder, x, weight, bias, node.args[3:])

    def _in_float16(self, builder: Any, x: Any, weight: np.ndarray, bias: np.ndarray, geometry: Any) -> Any:
        from tvm import relax

        data = self._round(builder, x)
        if self.convolution:
            stride, padding, dilation, groups = geometry
            emit = self._sums(builder)
            sums = convolutions.constant(builder, data, weight, stride, padding, dilation, int(groups), emit)
        else:
            dense = DenseSpec.of([int(size) for size in data.ty.shape], len(weight), self.lanes)
            packed = relax.const(fp16.pack_dense_weight(weight, self.lanes))
            sums = builder.emit_te(
                lambda data, w: fp16.dense(data, w, dense), data, packed, primfunc_name_hint="dense_fp16"
            )
        result = builder.emit(relax.op.add(sums, relax.const(np.ascontiguousarray(bias))))
        return builder.emit(relax.op.permute_dims(result, [0, 3, 1, 2])) if self.convolution else result

    def _sums(self, builder: Any) -> convolutions.Emit:
        """What makes a plain convolution of 16-bit values."""
        from tvm import relax

        from autocomp.compiler.vectors import in_whole_vectors

        def emit(data: Any, weight: Any, strides: Any, borders: Any, dilation: Any, groups: int) -> Any:
            low, high = zip(*borders, strict=True)
            shape = [int(size) for size in data.ty.shape]

            def sums(tiled: np.ndarray) -> Any:
                spec = ConvSpec.of(shape, tiled.shape, strides, [*low, *high], dilation, groups, self.lanes)
                packed = relax.const(fp16.pack_conv_weight(tiled, spec))
                name = "depthwise_fp16" if spec.depthwise else "conv2d_fp16"
                return builder.emit_te(
                    lambda data, w: fp16.conv2d(data, w, spec), data, packed, primfunc_name_hint=name
                )

            return in_whole_vectors(builder, weight.value, groups, self.lanes, sums)

        return emit

    def _round(self, builder: Any, x: Any) -> Any:
        """``x`` in 16 bits, channels last."""
        from tvm import te

        def make() -> Any:
            return builder.emit_te(
                lambda data: te.compute(data.shape, lambda *i: data[i].astype("float16"), name="to_half"),
                self.channels_last(builder, x), primfunc_name_hint="to_half",
            )  # fmt: skip

        return self.once(x, make)

    def _in_float32(self, builder: Any, x: Any, weight: np.ndarray, bias: np.ndarray, geometry: Any) -> Any:
        from tvm import relax

        rounded = builder.emit(relax.op.astype(builder.emit(relax.op.astype(x, "float16")), "float32"))
        wide = np.ascontiguousarray(weight.astype("float32"))
        if not self.convolution:
            product = builder.emit(relax.op.matmul(rounded, relax.const(np.ascontiguousarray(wide.T))))
            return builder.emit(relax.op.add(product, relax.const(np.ascontiguousarray(bias))))
        stride, padding, dilation, groups = geometry
        sums = builder.emit(
            relax.op.nn.conv2d(rounded, relax.const(wide), list(stride), list(padding), list(dilation), int(groups))
        )
        return builder.emit(relax.op.add(sums, relax.const(np.ascontiguousarray(bias.reshape(1, -1, 1, 1)))))
