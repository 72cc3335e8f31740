"""Floats to 8-bit levels and integer sums back to floats, as ``layers.w8a8`` specifies them: what surrounds an integer contraction."""

from __future__ import annotations

from typing import Any

_ROUNDING = 1.5 * 2**23  # a float32 with this much added has no fraction bits left: half goes to even
_ROUNDING_BITS = 0x4B400000  # of that number


def quantise(data: Any, inverse_scale: Any, zero_point: Any, dtype: str) -> Any:
    """``clamp(round_half_even(x * inverse_scale) + zero_point, 0, 255)``: the specification is ``layers.w8a8``.

    Where ``dtype`` is int8, 128 is taken off the zero point that is given, and so off every bound and result. The clamp comes first (its
    bounds are whole numbers, so that is the same), and the rounding is the addition of 1.5 * 2^23: the integer then stands in the low
    bits of the sum. A conversion of floats would check for values that cannot occur, one by one.
    """
    from tvm import te, tirx

    low, high = (-128.0, 127.0) if dtype == "int8" else (0.0, 255.0)

    def value(*i: Any) -> Any:
        zero = zero_point[0]
        level = tirx.max(
            tirx.min(data[i] * inverse_scale[0], tirx.const(high, "float32") - zero),
            tirx.const(low, "float32") - zero,
        )
        bits = tirx.reinterpret("int32", level + tirx.const(_ROUNDING, "float32"))
        return (bits - (tirx.const(_ROUNDING_BITS, "int32") - zero.astype("int32"))).astype(dtype)

    return te.compute(data.shape, value, name="quantise")


def dequantise(sums: Any, compensation: Any, scale: Any, bias: Any) -> Any:
    """``fma(float(sums - compensation), scale, bias)`` along the last axis, rounded once."""
    from tvm import te, tirx

    def value(*i: Any) -> Any:
        exact = (sums[i] - compensation[i[-1]]).astype("float32")
        return tirx.call_intrin("float32", "tirx.fma", exact, scale[i[-1]], bias[i[-1]])

    return te.compute(sums.shape, value, name="dequantise")
