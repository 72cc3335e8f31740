"""Transcendental functions that vectorise: LLVM would call the scalar C library once for every lane.

Each is a polynomial or rational formula over whole vectors, accurate to a few units in the last place of float32 (the tests say how many).
"""

from __future__ import annotations

from typing import Any

# exp(r) on |r| <= ln(2) / 2, and ln(2) in two parts so that x - n ln(2) loses nothing [Cephes Math Library 2.8, expf.c].
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP_MAX, _EXP_MIN = 88.02, -87.33  # exp leaves the normal float32 range beyond these
# erf(x) = x p(x^2) / q(x^2) up to the x from which erf is 1 to half a unit in the last place, lowest power first: fitted by us, weighted least
# squares repeated until the largest error, 3.3e-8, is the same everywhere; 2.8e-7 as float32 computes it.
_ERF_MAX = 3.8325069
_ERF_P = (1.128378867, 1.980364837e-1, 5.034053071e-2, 3.647245538e-3, 1.427304334e-4, -2.010668493e-6, 2.085066767e-8)
_ERF_Q = (1.0, 5.088350287e-1, 1.142385476e-1, 1.421358885e-2, 9.501553138e-4)
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

    return exp_below_zero(tirx.min(x, _f(_EXP_MAX)))


def exp_below_zero(x: Any) -> Any:
    """e^x where x is known not to be so large that the result overflows."""
    from tvm import tirx

    x = tirx.max(x, _f(_EXP_MIN))
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
        return _let(v * v, lambda square: v * _polynomial(_ERF_P, square) / _polynomial(_ERF_Q, square))

    return _let(tirx.max(tirx.min(x, _f(_ERF_MAX)), _f(-_ERF_MAX)), value)


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    """Of ``coefficients`` by power, the lowest first."""
    total = _f(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + _f(coefficient)
    return total


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
