"""8-bit layers → QuantizeLinear and DequantizeLinear about a float product, which a runtime takes as one in integers."""

from __future__ import annotations

from typing import Any

import numpy as np


def translations(op: Any) -> dict[Any, Any]:
    """The translation of each op by itself, with onnxscript's operators ``op``."""
    import torch

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

    return {
        torch.ops.autocomp.linear_w8a8.default: linear,
        torch.ops.autocomp.conv2d_w8a8.default: convolution,
        torch.ops.autocomp.convolution_w8a8.default: convolution,
    }
