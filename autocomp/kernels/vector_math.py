"""Transcendental functions that vectorise: LLVM would call the scalar C library once for every lane.

Each is a polynomial or rational formula over whole vectors, accurate to a few units in the last place of float32 (the tests say how many).
"""

from __future__ import annotations

from typing import Any

# exp(r) on |r| <= ln(2) / 2, and ln(2) in two parts so that x - n ln(2) loses nothing [Cephes Math Library 2.8, expf.c].
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP_MAX, _EXP_MIN = 88.02, -87.33  # exp leaves the normal float32 range beyond these
# erf(x) = 1 - (a1 t + ... + a5 t^5) exp(-x^2), t = 1 / (1 + p x): 1.5e-7 absolute [Abramowitz and Stegun 1964, 7.1.26].
_ERF_P = 0.3275911
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
# tanh(x) below |x| = 0.55: its Taylor series to x^11, where 1 - 2 / (exp(2x) + 1) would cancel [Abramowitz and Stegun 1964, 4.5.64].
_TANH = (-1382 / 155925, 62 / 2835, -17 / 315, 2 / 15, -1 / 3)
_TANH_SMALL = 0.55
_SQRT_HALF = 0.7071067811865476
_GELU_TANH = (
    0.7978845608028654,
    0.044715,
)  # sqrt(2 / pi) and the cubic term [Hendrycks and Gimpel 2016, arXiv 1606.08415]


def exp(x: Any) -> Any:
    """e^x of a float32 expression; saturates where the result leaves the normal range."""
    from tvm import tirx

    x = tirx.max(tirx.min(x, _f(_EXP_MAX)), _f(_EXP_MIN))
    return _let(x, lambda v: _let(tirx.nearbyint(v * _f(1.4426950408889634)), lambda n: _exp_reduced(v, n)))


def _exp_reduced(x: Any, n: Any) -> Any:
    from tvm import tirx

    def polynomial(r: Any) -> Any:
        value = _f(_EXP[0])
        for coefficient in _EXP[1:]:
            value = value * r + _f(coefficient)
        return value * r * r + r + _f(1.0)

    power = tirx.reinterpret("float32", (n.astype("int32") + tirx.const(127, "int32")) << tirx.const(23, "int32"))
    return _let(x - n * _f(_LN2_HIGH) - n * _f(_LN2_LOW), polynomial) * power


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x); below x = -80 it stays at 2e-35, for a subnormal quotient takes the processor a hundred cycles."""
    from tvm import tirx

    return _f(1.0) / (_f(1.0) + exp(tirx.min(_f(0.0) - x, _f(80.0))))


def silu(x: Any) -> Any:
    return x * sigmoid(x)


def tanh(x: Any) -> Any:
    from tvm import tirx

    def value(v: Any) -> Any:
        def series(square: Any) -> Any:
            total = _f(_TANH[0])
            for coefficient in _TANH[1:]:
                total = total * square + _f(coefficient)
            return v + v * (square * total)

        large = _f(1.0) - _f(2.0) / (exp(v + v) + _f(1.0))
        return tirx.Select(tirx.abs(v) < _f(_TANH_SMALL), _let(v * v, series), large)

    return _let(x, value)


def erf(x: Any) -> Any:
    from tvm import tirx

    def value(v: Any) -> Any:
        def positive(t: Any) -> Any:
            total = _f(_ERF[0])
            for coefficient in _ERF[1:]:
                total = total * t + _f(coefficient)
            return _f(1.0) - total * t * exp(_f(0.0) - v * v)

        magnitude = _let(_f(1.0) / (_f(1.0) + _f(_ERF_P) * tirx.abs(v)), positive)
        return _let(magnitude, lambda m: tirx.Select(v < _f(0.0), _f(0.0) - m, m))

    return _let(x, value)


def has_power(exponent: float) -> bool:
    """Whether ``power`` computes this exponent: halves and whole numbers up to 16, by multiplications and a square root."""
    return 2 * exponent == int(2 * exponent) and abs(exponent) <= 16


def power(x: Any, exponent: float) -> Any:
    """x^exponent of a float32 expression, where the C library's function would be called for every lane."""
    from tvm import tirx

    def product(v: Any) -> Any:
        whole, half = divmod(abs(exponent), 1)
        result = tirx.sqrt(v) if half else None
        factor, left = v, int(whole)
        while left:
            if left % 2:
                result = factor if result is None else result * factor
            factor, left = factor * factor, left // 2
        result = _f(1.0) if result is None else result
        return _f(1.0) / result if exponent < 0 else result

    return _let(x, product)


def gelu(x: Any) -> Any:
    return _f(0.5) * x * (_f(1.0) + erf(x * _f(_SQRT_HALF)))


def gelu_tanh(x: Any) -> Any:
    scale, cubic = _GELU_TANH
    return _f(0.5) * x * (_f(1.0) + tanh(_f(scale) * (x + _f(cubic) * x * x * x)))


def _f(value: float) -> Any:
    from tvm import tirx

    return tirx.const(value, "float32")


def _let(value: Any, body: Any) -> Any:
    """Name a value that ``body`` uses more than once: expressions are trees, and would be repeated."""
    from tvm import tirx

    variable = tirx.Var("v", "float32")
    return tirx.Let(variable, value, body(variable))
