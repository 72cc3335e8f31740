"""Every template against torch, over random shapes; integers exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocomp.hardware.profile import Profile, load_profile
from autocomp.kernels import compute, packing, prefetch, requantise, rewrite, templates
from autocomp.kernels.intrinsics import dot_product
from autocomp.kernels.specs import DenseSpec

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def run_kernel(
    outputs: list, inputs: list, arrays: list[np.ndarray], profile: Profile, pick: int = 0
) -> tuple[np.ndarray, int]:
    """Schedule TE outputs with the ``pick``-th tile (wrapping), run them, and return the result and the number of tiles."""
    import tvm
    from tvm import te

    function = te.create_prim_func([*inputs, *outputs])
    anchor = templates.describe(function)
    tiles = templates.tiles(anchor, profile)
    scheduled = templates.apply(function, tiles[pick % len(tiles)], anchor, profile)
    executable = tvm.compile(
        tvm.IRModule({"main": scheduled.with_attr("global_symbol", "main")}), tvm.target.Target(dict(profile.target))
    )
    result = tvm.runtime.tensor(np.zeros([int(s) for s in outputs[0].shape], str(outputs[0].dtype).removeprefix("T.")))
    executable(*[tvm.runtime.tensor(array) for array in arrays], result)
    return result.numpy(), len(tiles)


@pytest.fixture(scope="module", params=["x86-host", "x86-64-v3"])
def profile(request: pytest.FixtureRequest) -> Profile:
    return load_profile(request.param)


convolutions = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "size": st.tuples(st.integers(1, 19), st.integers(1, 19)),
        "channels": st.tuples(st.integers(1, 21), st.sampled_from([1, 7, 10, 16, 24, 33, 48])),
        "kernel": st.tuples(st.integers(1, 5), st.integers(1, 5)),
        "stride": st.integers(1, 3),
        "dilation": st.integers(1, 2),
        "pick": st.integers(0, 40),
        "seed": st.integers(0, 1000),
    }
)


def conv_spec(case: dict, lanes: int, groups: int = 1) -> compute.ConvSpec | None:
    (h, w), (ci, co), (kh, kw) = case["size"], case["channels"], case["kernel"]
    padding = [kh // 2, kw // 2] * 2
    spec = compute.ConvSpec.of(
        (case["batch"], h, w, ci),
        (co, ci // groups, kh, kw),
        [case["stride"]] * 2,
        padding,
        [case["dilation"]] * 2,
        groups,
        lanes,
    )
    return spec if min(spec.out_size) > 0 else None


@QUICK
@given(case=convolutions)
def test_float_convolution_equals_torch(profile: Profile, case: dict) -> None:
    from tvm import te

    spec = conv_spec(case, profile.lanes)
    if spec is None:
        return
    rng = np.random.default_rng(case["seed"])
    n, (h, w), ci = spec.batch, spec.in_size, spec.in_channels
    x = rng.standard_normal((n, h, w, ci)).astype("float32")
    weight = rng.standard_normal((spec.out_channels, ci, *spec.kernel)).astype("float32")
    packed = packing.pack_conv_weight(weight, spec, None)
    data, constant = te.placeholder(x.shape, name="data"), te.placeholder(packed.shape, name="weight")
    value, _ = run_kernel([compute.conv2d(data, constant, spec)], [data, constant], [x, packed], profile, case["pick"])
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2),
        torch.from_numpy(weight),
        None,
        spec.stride,
        spec.padding[:2],
        spec.dilation,
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(value, expected.numpy(), rtol=1e-4, atol=1e-4)


@QUICK
@given(case=convolutions, zero_point=st.integers(0, 255))
def test_integer_convolution_is_exact(profile: Profile, case: dict, zero_point: int) -> None:
    from tvm import te

    dot = dot_product(profile)
    spec = conv_spec(case, profile.lanes)
    if spec is None:
        return
    rng = np.random.default_rng(case["seed"])
    x = rng.integers(0, 256, (spec.batch, *spec.in_size, spec.in_channels)).astype(dot.activation)
    weight = rng.integers(-127, 128, (spec.out_channels, spec.in_channels, *spec.kernel)).astype("int8")
    packed = packing.pack_conv_weight(weight, spec, dot)
    data = te.placeholder(x.shape, dot.activation, name="data")
    constant = te.placeholder(packed.shape, str(packed.dtype), name="weight")
    zero = te.placeholder((1,), "int32", name="zero")
    out = compute.conv2d(data, constant, spec, dot, zero)
    value, _ = run_kernel(
        [out], [data, constant, zero], [x, packed, np.array([zero_point], "int32")], profile, case["pick"]
    )
    padding = torch.nn.functional.pad(
        torch.from_numpy(x.astype("float64")).permute(0, 3, 1, 2),
        [spec.padding[1]] * 2 + [spec.padding[0]] * 2,
        value=zero_point,
    )
    expected = torch.nn.functional.conv2d(
        padding, torch.from_numpy(weight).double(), None, spec.stride, 0, spec.dilation
    )
    np.testing.assert_array_equal(value, expected.permute(0, 2, 3, 1).numpy().astype("int64"))


@QUICK
@given(
    rows=st.sampled_from([(1,), (5,), (17,), (2, 3), (3, 1, 29)]), depth=st.integers(1, 40), out=st.sampled_from([1, 10, 16, 33, 64]),
    pick=st.integers(0, 40), integer=st.booleans(),
)  # fmt: skip
def test_dense_equals_numpy(profile: Profile, rows: tuple, depth: int, out: int, pick: int, integer: bool) -> None:
    from tvm import te

    rng = np.random.default_rng(depth)
    dot = dot_product(profile) if integer else None
    if dot:
        x = rng.integers(0, 256, (*rows, depth)).astype(dot.activation)
        weight = rng.integers(-127, 128, (out, depth)).astype("int8")
    else:
        x = rng.standard_normal((*rows, depth)).astype("float32")
        weight = rng.standard_normal((out, depth)).astype("float32")
    spec = compute.DenseSpec.of(x.shape, out, profile.lanes)
    packed = packing.pack_dense_weight(weight, profile.lanes, dot)
    data = te.placeholder(x.shape, str(x.dtype), name="data")
    constant = te.placeholder(packed.shape, str(packed.dtype), name="weight")
    value, _ = run_kernel([compute.dense(data, constant, spec, dot)], [data, constant], [x, packed], profile, pick)
    expected = x.astype("float64") @ weight.astype("float64").T
    if integer:
        np.testing.assert_array_equal(value, expected.astype("int64"))
    else:
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


@QUICK
@given(
    channels=st.sampled_from([3, 8, 16, 40, 64]), size=st.integers(3, 17), kernel=st.integers(1, 5), stride=st.integers(1, 2),
    pick=st.integers(0, 40),
)  # fmt: skip
def test_depthwise_equals_torch(
    profile: Profile, channels: int, size: int, kernel: int, stride: int, pick: int
) -> None:
    from tvm import te

    rng = np.random.default_rng(size)
    x = rng.standard_normal((1, size, size, channels)).astype("float32")
    weight = rng.standard_normal((channels, 1, kernel, kernel)).astype("float32")
    spec = compute.ConvSpec.of(
        x.shape, weight.shape, (stride, stride), [kernel // 2] * 4, (1, 1), channels, profile.lanes
    )
    packed = packing.pack_conv_weight(weight, spec, None)
    data, constant = te.placeholder(x.shape, name="data"), te.placeholder(packed.shape, name="weight")
    value, _ = run_kernel([compute.conv2d(data, constant, spec)], [data, constant], [x, packed], profile, pick)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(weight), None, stride, kernel // 2, 1, channels
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(value, expected.numpy(), rtol=1e-4, atol=1e-5)


@QUICK
@given(
    a=st.sampled_from([(4, 7), (2, 9, 5), (1, 3, 17, 8)]), out=st.sampled_from([5, 16, 64]), pick=st.integers(0, 40),
    transposed=st.booleans(),
)  # fmt: skip
def test_batch_matmul_equals_numpy(profile: Profile, a: tuple, out: int, pick: int, transposed: bool) -> None:
    from tvm import te

    rng = np.random.default_rng(out)
    x = rng.standard_normal(a).astype("float32")
    y = rng.standard_normal((*a[:-2], *((out, a[-1]) if transposed else (a[-1], out)))).astype("float32")
    left, right = te.placeholder(x.shape, name="left"), te.placeholder(y.shape, name="right")
    value, _ = run_kernel(
        [compute.batch_matmul(left, right, profile.lanes, transposed=transposed)], [left, right], [x, y], profile, pick
    )
    np.testing.assert_allclose(value, x @ (y.swapaxes(-1, -2) if transposed else y), rtol=1e-4, atol=1e-5)


@given(rows=st.integers(1, 5000))
def test_padded_rows_have_a_good_tile_and_little_waste(rows: int) -> None:
    padded = compute.padded_rows(rows)
    assert padded >= rows
    assert rows <= 14 or any(padded % tile == 0 for tile in range(6, 15))
    assert padded <= 1.07 * rows


def test_quantise_rounds_half_to_even_and_saturates(profile: Profile) -> None:
    from tvm import te

    x = np.array([[-1e9, -0.5, 0.5, 1.5, 2.5, 254.5, 1e9, 3.0]], "float32")
    data = te.placeholder(x.shape, name="data")
    inverse, zero = te.placeholder((1,), name="inverse"), te.placeholder((1,), name="zero")
    out = requantise.quantise(data, inverse, zero, "uint8")
    value, _ = run_kernel([out], [data, inverse, zero], [x, np.ones(1, "float32"), np.zeros(1, "float32")], profile)
    np.testing.assert_array_equal(value[0], [0, 0, 0, 2, 2, 254, 255, 3])


@pytest.mark.parametrize(("rows", "fetched"), [(1, False), (4, True), (96, True), (3000, False)])
def test_weights_are_fetched_ahead_where_rows_share_them(rows: int, fetched: bool) -> None:
    """Each line of the next block once, spread over the rows; not where one row, or thousands, are multiplied with them."""
    from tvm import te

    profile = replace(load_profile("x86-host"), lanes=16, vector_registers=32)
    data, weight = te.placeholder((rows, 256), name="data"), te.placeholder((40, 256, 16), name="weight")
    function = te.create_prim_func([data, weight, compute.dense(data, weight, DenseSpec((rows,), 256, 640, 16))])
    anchor = templates.describe(function)
    script = str(templates.apply(function, templates.tiles(anchor, profile)[0], anchor, profile))
    assert ("llvm.prefetch" in script) is fetched


@settings(QUICK, max_examples=10)
@given(rows=st.integers(1, 32), taps=st.integers(1, 3), depth=st.sampled_from([64, 96]), vectors=st.integers(1, 3))
def test_every_line_of_the_next_weights_is_fetched(rows: int, taps: int, depth: int, vectors: int) -> None:
    from tvm import tirx

    block, row, tap, step = (tirx.Var(name, "int32") for name in ("block", "row", "tap", "step"))
    buffer = tirx.decl_buffer((256, taps, depth, 16), "float32")
    loops = [
        tirx.For(variable, 0, extent, tirx.ForKind.SERIAL, tirx.Evaluate(0))
        for variable, extent in ((block, 200), (row, rows), (tap, taps), (step, depth))
    ]
    found = prefetch.fetch(buffer, [block, tap, step, tirx.const(0, "int32")], 0, vectors, loops, 8)
    statements = list(found) if isinstance(found, tirx.SeqStmt) else [found]
    places = [statement.value.args[1].args[0].indices for statement in statements]
    assert all(int(rewrite.substitute([block], [place[0]], [3])[0]) == 3 + vectors for place in places)
    flat = [tirx.IndexMap([row, tap, step], [place[-1]], None) for place in places]
    lines = {
        int(each.map_indices([r, t, k])[0]) // 16
        for each in flat for r in range(rows) for t in range(taps) for k in range(depth)
    }  # fmt: skip
    assert set(range(vectors * taps * depth)) <= lines
    assert max(lines) < 2 * vectors * taps * depth + 40
