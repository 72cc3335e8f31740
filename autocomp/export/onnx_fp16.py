"""16-bit layers → casts about a float32 product."""

from __future__ import annotations

from typing import Any


def translations(op: Any) -> dict[Any, Any]:
    """The translation of each op by itself, with onnxscript's operators ``op``."""
    import torch

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

    return {torch.ops.autocomp.linear_fp16.default: linear_half, torch.ops.autocomp.conv2d_fp16.default: conv2d_half}
