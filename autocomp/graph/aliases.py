"""torch's other names for its operations → the name that every rule and translation knows."""

from __future__ import annotations

from typing import Any

import torch

_ALIASES = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "absolute": "abs", "clip": "clamp", "concat": "cat",
    "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose", "negative": "neg", "moveaxis": "movedim", "greater": "gt",
    "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne", "special_expit": "sigmoid", "special_logsumexp": "logsumexp",
    "special_softmax": "softmax", "special_log_softmax": "log_softmax", "special_exp2": "exp2", "special_expm1": "expm1",
    "special_log1p": "log1p", "special_erf": "erf", "special_round": "round", "special_sinc": "sinc", "fix": "trunc", "arctan": "atan",
    "arcsin": "asin", "arccos": "acos", "arctan2": "atan2", "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh",
    "linalg_matmul": "matmul",
}  # fmt: skip
_OVERLOADS = {"transpose": {"default": "int"}, "softmax": {"default": "int"}, "log_softmax": {"default": "int"}}


def usual(target: Any) -> Any:
    """The operation by its usual name; itself where it has no other, or takes other arguments there."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return target
    name = _ALIASES.get(target._schema.name.partition("::")[2])
    if name is None:
        return target
    overload = _OVERLOADS.get(name, {}).get(target._overloadname, target._overloadname)
    return getattr(getattr(torch.ops.aten, name), overload or "default", target)
