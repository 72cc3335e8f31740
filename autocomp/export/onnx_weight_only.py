"""Linear layers of 8- and 4-bit levels → operators that decode them."""

from __future__ import annotations

from typing import Any


def translations(op: Any) -> dict[Any, Any]:
    """The translation of each op by itself, with onnxscript's operators ``op``."""
    import torch

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

    return {torch.ops.autocomp.linear_weight_only.default: weight_only}
