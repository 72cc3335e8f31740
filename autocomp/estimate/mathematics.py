"""The C library's mathematics for emulated kernels, computed by numpy: fallbacks call it, the kernels of the package do not."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_UNARY = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "sinh", "cosh", "tanh"),
    *("sqrt", "cbrt", "fabs", "floor", "ceil", "trunc", "rint"),
)
_RENAMED = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh",
    "nearbyint": "rint",
}  # fmt: skip
_BINARY = {"pow": "power", "fmod": "fmod", "atan2": "arctan2", "fmax": "fmax", "fmin": "fmin", "hypot": "hypot"}


def _functions() -> Mapping[str, tuple[int, Callable[..., Any]]]:
    import math

    table: dict[str, tuple[int, Callable[..., Any]]] = {name: (1, getattr(np, name)) for name in _UNARY}
    table |= {name: (1, getattr(np, ours)) for name, ours in _RENAMED.items()}
    table |= {name: (2, getattr(np, ours)) for name, ours in _BINARY.items()}
    table["erf"] = (1, math.erf)
    table["round"] = (1, lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x))
    return table


FUNCTIONS = _functions()


def is_mathematics(name: str) -> bool:
    """Whether a function is one of the C library's mathematics, float (``expf``) or double (``exp``)."""
    return name in FUNCTIONS or (name.endswith("f") and name[:-1] in FUNCTIONS)


def call_function(engine: Any, name: str) -> str:
    """Do what a called function does, in the emulated registers; a message if it cannot be done."""
    from unicorn import arm64_const as arm

    if not is_mathematics(name):
        if name.startswith("TVMFFIErrorSetRaised"):
            return f"the kernel refused its arguments: {_text_of_error(engine, name)}"
        return f"the kernel calls {name}, which is unknown to the emulator: it cannot be run"
    double = name in FUNCTIONS
    count, function = FUNCTIONS[name if double else name[:-1]]
    form, kind = ("<d", np.float64) if double else ("<f", np.float32)
    values = []
    for register in (arm.UC_ARM64_REG_Q0, arm.UC_ARM64_REG_Q1)[:count]:
        raw = int(engine.reg_read(register)).to_bytes(16, "little")
        values.append(kind(struct.unpack_from(form, raw)[0]))
    with np.errstate(all="ignore"):
        result = kind(function(*values))
    engine.reg_write(arm.UC_ARM64_REG_Q0, int.from_bytes(struct.pack(form, result), "little"))
    return ""


def _text_of_error(engine: Any, name: str) -> str:
    """The message a kernel raises: one C string, or an array of parts with its length."""
    from unicorn import arm64_const as arm

    def text(address: int) -> str:
        if not address:
            return ""
        data = bytearray()
        while len(data) < 400 and (byte := engine.mem_read(address + len(data), 1)[0]):
            data.append(byte)
        return data.decode(errors="replace")

    where = engine.reg_read(arm.UC_ARM64_REG_X1)
    if not name.endswith("Parts"):
        return text(where)
    count = min(engine.reg_read(arm.UC_ARM64_REG_W2), 16)
    return "".join(text(int.from_bytes(engine.mem_read(where + 8 * index, 8), "little")) for index in range(count))
