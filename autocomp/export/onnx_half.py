"""16-bit layers → casts about a float32 product."""

from __future__ import annotations

from typing import Any

_FLOAT = 1  # ONNX's numbers of types


def casts_about(op: Any, kind: int, linear: Any, conv2d: Any) -> dict[Any, Any]:
    """The translation of a type's two ops, with onnxscript's operators ``op``; ``kind`` is ONNX's number of the type.

    Products are summed in float32, which every runtime has kernels for.
    """

    def rounded(x: Any, w: Any) -> tuple[Any, Any]:
        return op.Cast(op.Cast(x, to=kind), to=_FLOAT), op.Cast(w, to=_FLOAT)

    def linear_half(x: Any, w: Any, bias: Any) -> Any:
        value, weight = rounded(x, w)
        return op.Add(op.MatMul(value, op.Transpose(weight, perm=[1, 0])), bias)

    def conv2d_half(x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
        value, weight = rounded(x, w)
        return op.Conv(
            value, weight, bias,
            strides=list(stride), pads=[*padding, *padding], dilations=list(dilation), group=int(groups),
        )  # fmt: skip

    return {linear: linear_half, conv2d: conv2d_half}
