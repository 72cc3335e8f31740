"""The estimate of a kernel on a core that is not here: results of emulated code, and cycles of known kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from autocomp.estimate import compile_object, core_of, estimate_kernel, run_kernel
from autocomp.hardware.profile import load_profile
from autocomp.kernels import compute, packing, templates

NEON = load_profile("cortex-a76")


def scheduled(outputs: list[Any], inputs: list[Any], pick: int = 0) -> Any:
    from tvm import te

    function = te.create_prim_func([*inputs, *outputs])
    anchor = templates.describe(function)
    return templates.apply(function, templates.tiles(anchor, NEON)[pick], anchor, NEON)


@pytest.fixture(scope="module")
def dense() -> tuple[bytes, list[np.ndarray]]:
    """A 96 x 128 x 256 product: its object, and arrays (data, packed weight, space for the result)."""
    from tvm import te

    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((96, 256), "float32"), rng.standard_normal((128, 256), "float32")
    packed = packing.pack_dense_weight(weight, 4, None)
    data, constant = te.placeholder(x.shape, name="data"), te.placeholder(packed.shape, name="weight")
    product = compute.dense(data, constant, compute.DenseSpec.of(x.shape, 128, 4))
    return compile_object(scheduled([product], [data, constant]), NEON.target), [
        x,
        packed,
        np.zeros((96, 128), "float32"),
    ]


def test_emulated_product_equals_numpy(dense: tuple[bytes, list[np.ndarray]]) -> None:
    code, arrays = dense
    *_, result = run_kernel(code, arrays)
    weight = arrays[1].transpose(0, 2, 1).reshape(128, 256)
    np.testing.assert_allclose(result, arrays[0] @ weight.T, rtol=1e-4, atol=1e-4)
    assert not arrays[2].any(), "the caller's arrays stay as they are"


def test_product_comes_near_the_peak(dense: tuple[bytes, list[np.ndarray]]) -> None:
    code, arrays = dense
    estimate = estimate_kernel(code, [(str(a.dtype), a.shape) for a in arrays], core_of(NEON))
    rate = 2 * 96 * 128 * 256 / estimate.cycles
    assert 13 < rate < 16, "two pipelines of four lanes: 16 operations a cycle at most"
    assert estimate.sampled == 1.0
    assert estimate.unknown_share == 0.0, estimate.unknown


def test_every_instruction_of_our_row_kernels_has_a_row() -> None:
    from tvm import te, tirx

    from autocomp.kernels import rows, vector_math

    x = te.placeholder((64,), name="x")
    functions = {
        "softmax": rows.softmax(6, 50, 4),
        "layer_norm": rows.layer_norm(6, 50, 1e-5, 4),
        "gelu": scheduled([te.compute((64,), lambda i: vector_math.gelu(x[i]), name="y")], [x]),
        "tanh": scheduled([te.compute((64,), lambda i: vector_math.tanh(x[i]), name="y")], [x]),
        "quantise": scheduled([te.compute((64,), lambda i: tirx.nearbyint(x[i]).astype("int8"), name="y")], [x]),
    }
    for name, function in functions.items():
        tensors = [(str(p.ty.dtype).removeprefix("T."), p.ty.shape) for p in function.params]
        estimate = estimate_kernel(compile_object(function, NEON.target), tensors, core_of(NEON), store=False)
        assert estimate.unknown == (), name
        assert estimate.calls == 0, name
