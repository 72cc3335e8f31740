"""Row-wise kernels and vector functions against torch in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocomp.hardware.profile import load_profile
from autocomp.kernels import rows, templates, vector_math


def run(function: object, arrays: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    import tvm

    profile = load_profile("x86-host")
    scheduled = templates.apply(function, templates.Tile(), templates.describe(function), profile)
    module = tvm.IRModule({"main": scheduled.with_attr("global_symbol", "main")})
    executable = tvm.compile(module, tvm.target.Target(dict(profile.target)))
    result = tvm.runtime.tensor(np.zeros(shape, "float32"))
    executable(*[tvm.runtime.tensor(array) for array in arrays], result)
    return result.numpy()


QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
shapes = st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 5, 15, 16, 17, 31, 64, 100, 197]))


@QUICK
@given(shape=shapes, lanes=st.sampled_from([4, 8, 16]), scale=st.sampled_from([1.0, 30.0]))
def test_softmax(shape: tuple[int, int], lanes: int, scale: float) -> None:
    x = np.random.default_rng(shape[1]).standard_normal(shape).astype("float32") * np.float32(scale)
    expected = torch.softmax(torch.from_numpy(x).double(), -1).numpy()
    np.testing.assert_allclose(run(rows.softmax(*shape, lanes), [x], shape), expected, rtol=1e-5, atol=1e-7)


@QUICK
@given(shape=shapes, lanes=st.sampled_from([4, 8, 16]), offset=st.sampled_from([0.0, 100.0]))
def test_layer_norm(shape: tuple[int, int], lanes: int, offset: float) -> None:
    rng = np.random.default_rng(shape[1])
    x = (rng.standard_normal(shape) + offset).astype("float32")
    gamma, beta = rng.standard_normal((2, shape[1])).astype("float32")
    expected = torch.nn.functional.layer_norm(
        torch.from_numpy(x).double(), shape[1:], torch.from_numpy(gamma).double(), torch.from_numpy(beta).double(), 1e-5
    )
    value = run(rows.layer_norm(*shape, 1e-5, lanes), [x, gamma, beta], shape)
    np.testing.assert_allclose(value, expected.numpy(), rtol=1e-3, atol=2e-4 if offset else 2e-5)


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("exp", torch.exp, 3e-7),
        ("sigmoid", torch.sigmoid, 3e-7),
        ("silu", torch.nn.functional.silu, 3e-6),
        ("tanh", torch.tanh, 3e-6),
        ("erf", torch.erf, 1e-6),
        ("gelu", torch.nn.functional.gelu, 2e-6),
        ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh"), 2e-6),
    ],
)
def test_vector_functions(name: str, reference: object, tolerance: float) -> None:
    from tvm import te

    x = np.concatenate([np.linspace(-30, 30, 4080), np.linspace(-1e-3, 1e-3, 16)]).astype("float32").reshape(16, 256)
    data = te.placeholder(x.shape, name="x")
    function = te.create_prim_func(
        [data, te.compute(x.shape, lambda *i: getattr(vector_math, name)(data[i]), name="y")]
    )
    expected = reference(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(run(function, [x], x.shape), expected, rtol=tolerance, atol=tolerance)


def test_exp_saturates_instead_of_overflowing() -> None:
    from tvm import te

    x = np.array([[-1e4, -104.0, 89.0, 1e4]], "float32")
    data = te.placeholder(x.shape, name="x")
    function = te.create_prim_func([data, te.compute(x.shape, lambda *i: vector_math.exp(data[i]), name="y")])
    value = run(function, [x], x.shape)[0]
    assert np.isfinite(value).all()
    assert value[0] < 1e-37
    assert value[3] > 1e38
