"""Unary and binary operations on every pair of types."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from operation_cases.draw import (
    CASES,
    MAP,
    B,
    Draw,
    I,
    X,
    Y,
    bools,
    case,
    floats,
    integers,
    positive,
    unit,
)

# ---------------------------------------------------------------- unary, on floats, ints and bools
for _name in [
    "abs",
    "ceil",
    "floor",
    "round",
    "trunc",
    "frac",
    "neg",
    "sign",
    "sgn",
    "exp",
    "exp2",
    "expm1",
    "sin",
    "cos",
    "tan",
    "tanh",
    "sinh",
    "cosh",
    "atan",
    "asinh",
    "sigmoid",
    "erf",
    "erfc",
    "square",
    "relu",
    "positive",
    "isnan",
    "isinf",
    "isfinite",
    "signbit",
    "deg2rad",
    "rad2deg",
    "sinc",
    "logical_not",
    "nan_to_num",
    "bitwise_not",
]:
    _f = getattr(torch, _name)
    if _name != "bitwise_not":
        case(f"{_name}", _f, X)
    if _name not in ("frac", "signbit", "nan_to_num"):
        case(f"{_name} int", _f, I)
    if _name in ("exp", "sigmoid", "tanh", "sin", "logical_not", "bitwise_not", "square"):
        case(f"{_name} bool", _f, B) if _name != "square" else None
for _name in ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma", "digamma"]:
    case(_name, getattr(torch, _name), positive(2, 3, 4))
    if _name not in ("digamma", "lgamma"):
        case(f"{_name} int", getattr(torch, _name), integers(2, 3, 4, low=1, high=9))
for _name in ["asin", "acos", "atanh", "erfinv"]:
    case(_name, getattr(torch, _name), unit(2, 3, 4))
case("acosh", torch.acosh, Draw(lambda g: torch.rand(2, 3, generator=g) + 1.1))
case("logit", lambda x: torch.logit(x, 1e-6), Draw(lambda g: torch.rand(2, 3, generator=g)))
case("round decimals", lambda x: torch.round(x, decimals=1), X)
case("round half", torch.round, Draw(lambda g: torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])))
case("mvlgamma", lambda x: torch.special.gammaln(x), positive(2, 3))
case("i0", torch.special.i0, X)
case("xlogy", torch.special.xlogy, X, positive(2, 3, 4))
case("entr", torch.special.entr, positive(2, 3))
case("ndtr", torch.special.ndtr, X)
case("log_ndtr", torch.special.log_ndtr, X)


# ---------------------------------------------------------------- activations
for _name, _f in {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "elu alpha": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": F.celu,
    "celu alpha": lambda x: F.celu(x, 2.0),
    "leaky_relu": F.leaky_relu,
    "leaky_relu 0.2": lambda x: F.leaky_relu(x, 0.2),
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardtanh range": lambda x: F.hardtanh(x, -0.3, 0.4),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "softshrink 0.3": lambda x: F.softshrink(x, 0.3),
    "tanhshrink": F.tanhshrink,
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, 2.0, 1.0),
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "threshold": lambda x: F.threshold(x, 0.1, -3.0),
    "softmin": lambda x: F.softmin(x, 1),
    "softmax 0": lambda x: F.softmax(x, 0),
    "softmax -1": lambda x: F.softmax(x, -1),
    "softmax dtype": lambda x: F.softmax(x, 1, dtype=torch.float32),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "log_softmax -1": lambda x: F.log_softmax(x, -1),
    "glu": lambda x: F.glu(x, -1),
    "glu 2": lambda x: F.glu(torch.cat([x, x + 1], 1), 1),
    "rrelu": F.rrelu,
    "normalize": lambda x: F.normalize(x, dim=-1),
    "normalize 1": lambda x: F.normalize(x, p=1.0, dim=1),
    "gumbel-free softmax temperature": lambda x: F.softmax(x / 0.7, -1),
    "relu_": lambda x: F.relu_(x.clone()),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=False),
}.items():
    case(_name, _f, X)
case("prelu", lambda x, w: F.prelu(x, w), MAP, Draw(lambda g: torch.rand(4, generator=g)))
case("prelu one", lambda x, w: F.prelu(x, w), MAP, Draw(lambda g: torch.rand(1, generator=g)))
case("prelu 2d", lambda x, w: F.prelu(x, w), floats(3, 4), Draw(lambda g: torch.rand(4, generator=g)))
case("softmax of ints", lambda i: F.softmax(i.float(), -1), I)
case("softmax of a mask row", lambda x, m: F.softmax(x.masked_fill(m, -1e9), -1), X, B)
case("softmax with -inf", lambda x, m: F.softmax(x.masked_fill(m & (torch.arange(4) > 0), float("-inf")), -1), X, B)


# ---------------------------------------------------------------- binary and type promotion
_PAIRS = {
    "ff": (X, Y),
    "fi": (X, I),
    "if": (I, X),
    "ii": (I, integers(2, 3, 4)),
    "bf": (B, X),
    "bi": (B, I),
    "bb": (B, bools(2, 3, 4)),
    "i32 i64": (integers(2, 3, 4, dtype=torch.int32), I),
    "u8 i64": (integers(2, 3, 4, low=0, dtype=torch.uint8), I),
}
for _kind, _inputs in _PAIRS.items():
    for _name in ["add", "mul", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge"]:
        case(f"{_name} {_kind}", getattr(torch, _name), *_inputs)
    if "b" not in _kind:
        case(f"sub {_kind}", torch.sub, *_inputs)
    case(f"logical_and {_kind}", torch.logical_and, *_inputs)
    case(f"logical_xor {_kind}", torch.logical_xor, *_inputs)
    case(f"where {_kind}", lambda m, a, b: torch.where(m, a, b), B, *_inputs)
for _kind, (_a, _b) in {
    "ff": (X, positive(2, 3, 4)),
    "fi": (X, integers(2, 3, 4, low=1)),
    "if": (I, positive(2, 3, 4)),
    "ii": (I, integers(2, 3, 4, low=1)),
    "negative ii": (I, integers(2, 3, 4, low=-4, high=0)),
    "negative ff": (X, Draw(lambda g: -torch.rand(2, 3, 4, generator=g) - 0.1)),
}.items():
    for _name in ["div", "floor_divide", "remainder", "fmod", "true_divide"]:
        case(f"{_name} {_kind}", getattr(torch, _name), _a, _b)
    case(f"div floor {_kind}", lambda a, b: torch.div(a, b, rounding_mode="floor"), _a, _b)
    case(f"div trunc {_kind}", lambda a, b: torch.div(a, b, rounding_mode="trunc"), _a, _b)
for _name, _f in {
    "x // 2": lambda x: x // 2,
    "x % 3": lambda x: x % 3,
    "x % -3": lambda x: x % -3,
    "x + 1": lambda x: x + 1,
    "x + 0.5": lambda x: x + 0.5,
    "1 - x": lambda x: 1 - x,
    "1.5 - x": lambda x: 1.5 - x,
    "x * 2": lambda x: x * 2,
    "x * 2.5": lambda x: x * 2.5,
    "x / 2": lambda x: x / 2,
    "x / 2.5": lambda x: x / 2.5,
    "2 / (x*x+1)": lambda x: 2 / (x * x + 1),
    "x // 0.7": lambda x: x // 0.7,
    "x ** 2": lambda x: x**2,
    "x ** 3": lambda x: x**3,
    "x ** 0": lambda x: x**0,
    "2 ** x": lambda x: 2 ** x.clamp(min=0),
    "2.0 ** x": lambda x: 2.0**x,
    "x > 1": lambda x: x > 1,
    "x > 0.5": lambda x: x > 0.5,
    "x == 2": lambda x: x == 2,
    "x != 0": lambda x: x != 0,
    "x <= 0.5": lambda x: x <= 0.5,
    "clamp": lambda x: x.clamp(-1, 2),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: x.clamp_max(1),
    "clamp floats": lambda x: x.clamp(-0.5, 0.5),
    "clamp min": lambda x: x.clamp(min=-1),
    "clamp max": lambda x: x.clamp(max=1),
    "rsub alpha": lambda x: torch.rsub(x, 2, alpha=3),
    "add alpha": lambda x: torch.add(x, x, alpha=2),
    "sub alpha": lambda x: torch.sub(x, 1, alpha=2),
    "x.float()": lambda x: x.float(),
    "x.long()": lambda x: x.long(),
    "x.int()": lambda x: x.int(),
    "x.bool()": lambda x: x.bool(),
    "x.double()": lambda x: x.double(),
    "x.half().float()": lambda x: x.half().float(),
    "x.to(uint8)": lambda x: x.abs().to(torch.uint8),
    "x.to(int8)": lambda x: x.to(torch.int8),
    "x.to(int16)": lambda x: x.to(torch.int16),
    "pow tensor": lambda x: torch.pow(x.abs() + 1, x),
    "float_power": lambda x: torch.float_power(x.abs() + 1, 2).float(),
    "mean of float": lambda x: x.float().mean(),
    "sum": lambda x: x.sum(),
    "sum 1": lambda x: x.sum(1),
    "sum keep": lambda x: x.sum(-1, keepdim=True),
    "sum dims": lambda x: x.sum((0, 2)),
    "sum dtype": lambda x: x.sum(1, dtype=torch.float32),
    "prod": lambda x: x.prod(),
    "prod 1": lambda x: x.prod(1),
    "cumsum": lambda x: x.cumsum(-1),
    "cumsum 0": lambda x: torch.cumsum(x, 0),
    "cumprod": lambda x: x.cumprod(1),
    "cumsum dtype": lambda x: torch.cumsum(x, 1, dtype=torch.float32),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "max dim": lambda x: x.max(1),
    "min dim": lambda x: x.min(-1, keepdim=True),
    "max values": lambda x: x.max(1).values,
    "max indices": lambda x: x.max(1)[1],
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin((0, 1)),
    "amax all": lambda x: x.amax(),
    "amax keep": lambda x: torch.amax(x, dim=(1, 2), keepdim=True),
    "aminmax": lambda x: torch.aminmax(x, dim=1),
    "argmax": lambda x: x.argmax(),
    "argmax 1": lambda x: x.argmax(1),
    "argmin": lambda x: x.argmin(-1, keepdim=True),
    "any": lambda x: x.any(),
    "all": lambda x: x.all(),
    "any 1": lambda x: x.any(1),
    "all -1": lambda x: x.all(-1, keepdim=True),
    "count_nonzero": lambda x: x.count_nonzero(1),
    "sort": lambda x: x.sort(-1),
    "sort descending": lambda x: x.sort(1, descending=True).values,
    "argsort": lambda x: torch.argsort(x, dim=-1, stable=True),
    "topk": lambda x: x.topk(2, -1).values,
    "topk smallest": lambda x: x.topk(2, 1, largest=False).values,
    "kthvalue": lambda x: x.kthvalue(2, -1).values,
    "cummax": lambda x: x.cummax(-1).values,
    "diff": lambda x: x.diff(dim=-1),
    "trace": lambda x: x[0, :3, :3].trace(),
    "unique-free flip": lambda x: x.flip(-1, 0),
    "roll": lambda x: x.roll(1, -1),
    "roll 2": lambda x: x.roll((1, -2), (0, 2)),
    "roll flat": lambda x: x.roll(3),
    "abs().sqrt()": lambda x: x.abs().sqrt(),
    "new_zeros": lambda x: x.new_zeros(2, 4) + x[:, 0],
    "zeros_like": lambda x: torch.zeros_like(x) + x,
    "ones_like": lambda x: torch.ones_like(x) * x,
    "full_like": lambda x: torch.full_like(x, 2) + x,
    "new_full": lambda x: x.new_full((4,), 3) + x,
    "tril": lambda x: x.tril(),
    "triu": lambda x: x.triu(1),
    "tril -1": lambda x: torch.tril(x, -1),
    "rot90": lambda x: x.rot90(1, (1, 2)),
    "equal to its max": lambda x: (x == x.amax(-1, keepdim=True)).float(),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "sum of bool": lambda x: (x > 0).sum(-1),
    "mean of bool": lambda x: (x > 0).float().mean(-1),
    "nonzero-free cumsum of bool": lambda x: (x > 0).cumsum(-1),
    "not (x > 0)": lambda x: ~(x > 0),
    "and": lambda x: (x > 0) & (x < 2),
    "or": lambda x: (x > 1) | (x < -1),
    "xor": lambda x: (x > 1) ^ (x < 2),
    "where scalar": lambda x: torch.where(x > 0, x, 0),
    "where two scalars": lambda x: torch.where(x > 0, 1.0, -1.0),
    "where float scalar": lambda x: torch.where(x > 0, x, 0.5),
    "lerp-free mix": lambda x: x * 0.3 + (1 - 0.3) * x.flip(0),
    "x.type_as": lambda x: x.type_as(torch.zeros(1)),
    "neg": lambda x: -x,
}.items():
    case(f"{_name}: float", _f, X)
    case(f"{_name}: int", _f, I)
for _name in [
    "x // 2",
    "x + 1",
    "x + 0.5",
    "x * 2",
    "x * 2.5",
    "x / 2",
    "sum",
    "sum 1",
    "cumsum",
    "any 1",
    "all -1",
    "x == 2",
    "x.float()",
    "x.long()",
    "flip",
    "roll",
    "where scalar",
    "prod 1",
    "amax",
    "max",
    "cumsum dtype",
    "sort",
]:
    _key = next((key for key in CASES if key.split(":")[0] in (_name, f"unique-free {_name}")), None)
    if _key is not None:
        case(f"{_name}: bool", CASES[_key][0], B)
case("int32 cumsum", lambda x: x.cumsum(0), integers(5, dtype=torch.int32))
case("int32 sum", lambda x: x.sum(), integers(5, dtype=torch.int32))
case("int32 mean", lambda x: x.float().mean(0), integers(5, dtype=torch.int32))
case("x ** 0.5", lambda x: x**0.5, positive(2, 3))
case("x ** -1", lambda x: x**-1, positive(2, 3))
case("x ** -0.5", lambda x: x**-0.5, positive(2, 3))
case("x ** 1.5", lambda x: x**1.5, positive(2, 3))
case("pow ii", torch.pow, I, integers(2, 3, 4, low=0, high=4))
case("pow fi", torch.pow, X, integers(2, 3, 4, low=0, high=4))
case("pow if", torch.pow, integers(2, 3, 4, low=1), X)
case("pow negative base", lambda x: x.pow(3), X)
case("pow tensor of negative base", torch.pow, X, Draw(lambda g: torch.tensor(3.0)))
case("atan2", torch.atan2, X, Y)
case("hypot", torch.hypot, X, Y)
case("copysign", torch.copysign, X, Y)
case("heaviside", torch.heaviside, X, Y)
case("logaddexp", torch.logaddexp, X, Y)
case("nextafter-free max", torch.max, X, Y)
case("torch.min(a, b)", torch.min, X, Y)
case("torch.max of ints", torch.max, I, integers(2, 3, 4))
case("torch.min fi", torch.min, X, I)
case("fmax", torch.fmax, X, Y)
case("fmin", torch.fmin, X, Y)
case("lerp", torch.lerp, X, Y, Draw(lambda g: torch.rand(2, 3, 4, generator=g)))
case("lerp scalar", lambda a, b: torch.lerp(a, b, 0.3), X, Y)
case("addcmul", lambda a, b, c: torch.addcmul(a, b, c, value=0.5), X, Y, X)
case("addcdiv", lambda a, b, c: torch.addcdiv(a, b, c, value=0.5), X, Y, positive(2, 3, 4))
case(
    "clamp tensors",
    lambda x, a, b: torch.clamp(x, a, b),
    X,
    floats(4, shift=-2.0, scale=0.1),
    floats(4, shift=1.0, scale=0.1),
)
case("clamp tensor min", lambda x, a: torch.clamp(x, min=a), X, floats(3, 1))
case("clamp grows", lambda x, a: torch.clamp(x, min=a), floats(4), floats(3, 1))
case("bitwise and", lambda a, b: a & b, I, integers(2, 3, 4))
case("bitwise or", lambda a, b: a | b, I, integers(2, 3, 4))
case("bitwise xor", lambda a: a ^ 3, I)
case("bitwise shift left", lambda a: a << 2, I)
case("bitwise shift right", lambda a: a >> 1, I)
case("gcd-free isclose", lambda a, b: torch.isclose(a, b, atol=0.5), X, Y)
case("broadcast", lambda a, b, c: a + b * c, floats(3, 1, 4), floats(2, 1), floats(4))
case("broadcast zero dim", lambda a, b: a * b, X, Draw(lambda g: torch.tensor(2.5)))
case("zero dim int with float", lambda a, b: a * b, X, Draw(lambda g: torch.tensor(2)))
case("zero dim float with int", lambda a, b: a * b, I, Draw(lambda g: torch.tensor(2.5)))
case("zero dim double with float", lambda a, b: a * b, X, Draw(lambda g: torch.tensor(2.5, dtype=torch.float64)))
case("python constant tensor", lambda a: a + torch.tensor([1.0, 2.0, 3.0, 4.0]), X)
case("scalar tensor", lambda a: a * torch.tensor(2.0), X)
case("isin", lambda a: torch.isin(a, torch.tensor([1, 3])), I)
