"""bfloat16 as kernels have it: the bits of its numbers, which are the upper half of a float32's."""

from __future__ import annotations

from typing import Any

import numpy as np

from autocomp.hardware.profile import Profile
from autocomp.kernels import compute
from autocomp.kernels.intrinsics import DotProduct, dot_product
from autocomp.records.precisions import BFLOAT16

_BELOW, _UPPER = 0x7FFF, 16  # all bits below a half of the last that is kept, and how many are dropped
_NAN = 0x7FC0


def dot(profile: Profile) -> DotProduct:
    """How its products are added."""
    return dot_product(profile, BFLOAT16.name)


def product(profile: Profile) -> Any:
    """`compute.PRODUCT`, by which the peak is measured."""
    return compute.product_of("uint16", profile.lanes, dot(profile))


def bits_of(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of float32 values that are such numbers already, as uint16."""
    return (np.ascontiguousarray(values, "float32").view("uint32") >> _UPPER).astype("uint16")


def rounded(data: Any) -> Any:
    """Bits of the nearest bfloat16 of float32 ``data``, ties to even; not-a-number stays that."""
    from tvm import te

    return te.compute(data.shape, lambda *i: _bits(data[i]).astype("uint16"), name="to_bf16")


def rounded_in_float32(data: Any) -> Any:
    """The nearest bfloat16 of float32 ``data``, as float32."""
    from tvm import te, tirx

    def value(*i: Any) -> Any:
        return tirx.reinterpret("float32", _bits(data[i]) << tirx.const(_UPPER, "uint32"))

    return te.compute(data.shape, value, name="to_bf16")


def _bits(value: Any) -> Any:
    from tvm import tirx

    def constant(number: int) -> Any:
        return tirx.const(number, "uint32")

    bits = tirx.reinterpret("uint32", value)
    last = (bits >> constant(_UPPER)) & constant(1)
    return tirx.Select(value == value, (bits + constant(_BELOW) + last) >> constant(_UPPER), constant(_NAN))
