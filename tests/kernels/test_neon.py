"""Every precision's kernels for the Cortex-A76 against torch, run in the emulator; integers exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from emulated import lowered, run_function, run_module, run_te
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from wholes import quantise_all

from autocomp.compiler.verify import relative_error
from autocomp.devices.latency import LatencyModel, layer_work
from autocomp.graph.analyse import analyse
from autocomp.hardware.profile import Profile, load_profile
from autocomp.kernels import compute, fp16, packing, rows, templates, weight_only
from autocomp.kernels.intrinsics import dot_product
from autocomp.layers.fp16 import HalfConv2d, HalfLinear, halved
from autocomp.records.candidate import Method
from autocomp.records.precisions import Precision

torch.set_num_threads(1)

QUICK = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
# Of the largest output: fp16 sums of up to 256 products (kernels/fp16.py), with room for the worst of some thousand outputs.
HALF_TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("cortex-a76")


convolutions = st.fixed_dictionaries(
    {
        "size": st.tuples(st.integers(1, 11), st.integers(1, 11)),
        # (inputs, outputs, groups): few channels, ragged ones, many, groups, depthwise
        "channels": st.sampled_from(
            [(3, 16, 1), (1, 7, 1), (21, 33, 1), (24, 8, 1), (136, 16, 1), (16, 48, 1), (16, 16, 2), (8, 8, 8), (20, 20, 20)]
        ),
        "kernel": st.tuples(st.integers(1, 5), st.integers(1, 5)),
        "stride": st.integers(1, 3),
        "dilation": st.integers(1, 2),
        "pick": st.integers(0, 40),
        "seed": st.integers(0, 1000),
    }
)  # fmt: skip


def spec_of(case: dict, lanes: int) -> compute.ConvSpec | None:
    ci, co, groups = case["channels"]
    (kh, kw), step = case["kernel"], case["stride"]
    spec = compute.ConvSpec.of(
        (1, *case["size"], ci), (co, ci // groups, kh, kw), (step, step), [kh // 2, kw // 2] * 2, [case["dilation"]] * 2,
        groups, lanes,
    )  # fmt: skip
    return spec if min(spec.out_size) > 0 and spec.tileable else None


def convolved(x: np.ndarray, weight: np.ndarray, spec: compute.ConvSpec, fill: float = 0.0) -> np.ndarray:
    """The convolution of NHWC data in double precision."""
    padding = [spec.padding[1]] * 2 + [spec.padding[0]] * 2
    padded = nn.functional.pad(torch.from_numpy(x.astype("float64")).permute(0, 3, 1, 2), padding, value=fill)
    weight64 = torch.from_numpy(weight.astype("float64"))
    result = nn.functional.conv2d(padded, weight64, None, spec.stride, 0, spec.dilation, spec.groups)
    return result.permute(0, 2, 3, 1).numpy()


@QUICK
@given(case=convolutions)
def test_float32_convolution(profile: Profile, case: dict) -> None:
    from tvm import te

    if (spec := spec_of(case, profile.lanes)) is None:
        return
    rng = np.random.default_rng(case["seed"])
    x = rng.standard_normal((1, *spec.in_size, spec.in_channels)).astype("float32")
    weight = rng.standard_normal((spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)).astype("float32")
    packed = packing.pack_conv_weight(weight, spec, None)
    data, constant = te.placeholder(x.shape, name="data"), te.placeholder(packed.shape, name="weight")
    value = run_te([data, constant], compute.conv2d(data, constant, spec), [x, packed], profile, case["pick"])
    np.testing.assert_allclose(value, convolved(x, weight, spec), rtol=1e-4, atol=1e-4)


@QUICK
@given(case=convolutions)
def test_float16_convolution(profile: Profile, case: dict) -> None:
    from tvm import te

    if (spec := spec_of(case, 2 * profile.lanes)) is None:
        return
    rng = np.random.default_rng(case["seed"])
    x = rng.standard_normal((1, *spec.in_size, spec.in_channels)).astype("float16")
    weight = rng.standard_normal((spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)).astype("float16")
    packed = fp16.pack_conv_weight(weight, spec)
    data = te.placeholder(x.shape, "float16", name="data")
    constant = te.placeholder(packed.shape, "float16", name="weight")
    value = run_te([data, constant], fp16.conv2d(data, constant, spec), [x, packed], profile, case["pick"])
    depth = math.prod(spec.kernel) * spec.in_channels // spec.groups
    assert np.abs(value - convolved(x, weight, spec)).max() < HALF_TOLERANCE * 3 * math.sqrt(depth)


@QUICK
@given(case=convolutions, zero_point=st.integers(0, 255))
def test_integer_convolution_is_exact(profile: Profile, case: dict, zero_point: int) -> None:
    from tvm import te

    dot = dot_product(profile)
    if (spec := spec_of(case, profile.lanes)) is None:
        return
    rng = np.random.default_rng(case["seed"])
    stored = zero_point - dot.offset
    x = rng.integers(-128, 128, (1, *spec.in_size, spec.in_channels)).astype("int8")
    weight = rng.integers(-127, 128, (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)).astype("int8")
    packed = packing.pack_conv_weight(weight, spec, dot)
    data, zero = te.placeholder(x.shape, "int8", name="data"), te.placeholder((1,), "int32", name="zero")
    constant = te.placeholder(packed.shape, str(packed.dtype), name="weight")
    out = compute.conv2d(data, constant, spec, dot, zero)
    arrays = [x, packed, np.array([stored], "int32")]
    value = run_te([data, constant, zero], out, arrays, profile, case["pick"])
    np.testing.assert_array_equal(value, convolved(x, weight, spec, stored))


leading = st.sampled_from([(1,), (5,), (17,), (2, 3)])
depths = st.sampled_from([1, 3, 8, 17, 24, 40, 64, 256, 257, 389])


@QUICK
@given(
    lead=leading,
    depth=depths,
    out=st.sampled_from([1, 10, 16, 33]),
    pick=st.integers(0, 40),
    kind=st.sampled_from(["fp32", "fp16", "int8"]),
)
def test_dense(profile: Profile, lead: tuple, depth: int, out: int, pick: int, kind: str) -> None:
    from tvm import te

    rng = np.random.default_rng(depth)
    dot = dot_product(profile) if kind == "int8" else None
    lanes = profile.lanes * (2 if kind == "fp16" else 1)
    if dot:
        x, weight = (
            rng.integers(-128, 128, (*lead, depth)).astype("int8"),
            rng.integers(-127, 128, (out, depth)).astype("int8"),
        )
    else:
        dtype = "float16" if kind == "fp16" else "float32"
        x, weight = rng.standard_normal((*lead, depth)).astype(dtype), rng.standard_normal((out, depth)).astype(dtype)
    spec = compute.DenseSpec.of(x.shape, out, lanes)
    packed = fp16.pack_dense_weight(weight, lanes) if kind == "fp16" else packing.pack_dense_weight(weight, lanes, dot)
    data = te.placeholder(x.shape, str(x.dtype), name="data")
    constant = te.placeholder(packed.shape, str(packed.dtype), name="weight")
    product = fp16.dense(data, constant, spec) if kind == "fp16" else compute.dense(data, constant, spec, dot)
    value = run_te([data, constant], product, [x, packed], profile, pick)
    expected = x.astype("float64") @ weight.astype("float64").T
    if dot:
        np.testing.assert_array_equal(value, expected)
    else:
        tolerance = (HALF_TOLERANCE if kind == "fp16" else 1e-5) * 3 * math.sqrt(depth)
        assert np.abs(value - expected).max() < tolerance


@QUICK
@given(
    a=st.sampled_from([(4, 7), (2, 9, 5), (1, 3, 17, 8)]),
    out=st.sampled_from([5, 16]),
    pick=st.integers(0, 40),
    transposed=st.booleans(),
)
def test_batch_matmul(profile: Profile, a: tuple, out: int, pick: int, transposed: bool) -> None:
    from tvm import te

    rng = np.random.default_rng(out)
    x = rng.standard_normal(a).astype("float32")
    y = rng.standard_normal((*a[:-2], *((out, a[-1]) if transposed else (a[-1], out)))).astype("float32")
    left, right = te.placeholder(x.shape, name="left"), te.placeholder(y.shape, name="right")
    product = compute.batch_matmul(left, right, profile.lanes, transposed=transposed)
    value = run_te([left, right], product, [x, y], profile, pick)
    np.testing.assert_allclose(value, x @ (y.swapaxes(-1, -2) if transposed else y), rtol=1e-4, atol=1e-5)


@QUICK
@given(
    shape=st.sampled_from([(1, 37, 100), (3, 7, 64), (5, 9, 96), (33, 20, 130)]), bits=st.sampled_from([4, 8]), group=st.sampled_from([32, 64]),
    pick=st.integers(0, 40),
)  # fmt: skip
def test_weight_only(profile: Profile, shape: tuple[int, int, int], bits: int, group: int, pick: int) -> None:
    from tvm import te

    m, n, k = shape
    rng = np.random.default_rng(m)
    spec = weight_only.WeightOnlySpec((m,), k, n, bits, group, profile.lanes)
    levels = rng.integers(-7 if bits == 4 else -127, 8 if bits == 4 else 128, (n, spec.groups * group)).astype("int8")
    scales, x = rng.uniform(0.5, 2, (n, spec.groups)).astype("float32"), rng.standard_normal((m, k)).astype("float32")
    arrays = [x, weight_only.pack_weight(levels, spec), weight_only.pack_scales(scales, spec)]
    inputs = [te.placeholder(a.shape, str(a.dtype), name=f"input{i}") for i, a in enumerate(arrays)]
    value = run_te(inputs, weight_only.dense(*inputs, spec), arrays, profile, pick)
    expected = x.astype("float64") @ (levels * scales.repeat(group, 1).astype("float64"))[:, :k].T
    assert np.abs(value - expected).max() < 1e-5 * np.abs(expected).max()


@QUICK
@given(shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 5, 17, 64, 99])))
def test_rows(profile: Profile, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[1])
    x, gamma, beta = (rng.standard_normal(size).astype("float32") for size in (shape, shape[1], shape[1]))
    value = run_function(rows.softmax(*shape, profile.lanes), [x], profile)
    np.testing.assert_allclose(value, torch.softmax(torch.from_numpy(x).double(), -1), rtol=1e-5, atol=1e-7)
    value = run_function(rows.layer_norm(*shape, 1e-5, profile.lanes), [x, gamma, beta], profile)
    wide = [torch.from_numpy(array).double() for array in (x, gamma, beta)]
    expected = nn.functional.layer_norm(wide[0], shape[1:], wide[1], wide[2], 1e-5)
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=2e-5)


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1, groups=32), nn.ReLU6(), nn.Conv2d(32, 48, 1), nn.ReLU(),
        nn.Conv2d(48, 20, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 16, 10),
    )  # fmt: skip


def halve(model: nn.Sequential) -> nn.Sequential:
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            setattr(model, name, halved(layer))
    return model


def names(mod: Any, part: str) -> list[str]:
    return [name.name_hint for name in mod.functions if part in name.name_hint]


def test_integer_chain_equals_the_specification_bit_for_bit(profile: Profile) -> None:
    torch.manual_seed(0)
    model = quantise_all(chain().eval(), torch.randn(8, 3, 12, 12))
    x = torch.randn(1, 3, 12, 12)
    mod = lowered(model, x, profile)
    assert np.array_equal(run_module(mod, x, profile), model(x).numpy())
    alone = [name for name in names(mod, "quantise") if name.startswith("quantise")]
    assert len(alone) <= 1, "activations stay integers between quantised layers"


def test_half_chain_stays_in_half(profile: Profile) -> None:
    torch.manual_seed(0)
    model = halve(chain().eval())
    assert sum(isinstance(layer, HalfConv2d | HalfLinear) for layer in model) == 5
    x = torch.randn(1, 3, 12, 12)
    mod = lowered(model, x, profile)
    assert len([name for name in names(mod, "to_half") if name.startswith("to_half")]) <= 1
    assert len(names(mod, "fp16")) == 5
    assert relative_error(torch.from_numpy(run_module(mod, x, profile)), model(x)) < HALF_TOLERANCE


def test_half_layers_elsewhere_are_exact_products_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(halved(nn.Conv2d(3, 8, 3, 2, 1)), nn.ReLU(), nn.Flatten(), halved(nn.Linear(8 * 9, 5)))
    x = torch.randn(1, 3, 6, 6)
    bare = Profile("bare", "", {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}, "estimate", 4, 32, ("fp32",), "none")
    assert relative_error(torch.from_numpy(run_module(lowered(model, x, bare), x, bare)), model(x)) < 1e-5


@pytest.mark.parametrize("depth", [1, 24, 128, 192, 257, 389, 576, 960, 1000, 2048, 4608])
def test_runs_of_half_sums_are_short_and_cover_the_depth(depth: int) -> None:
    runs, run = fp16.split_depth(depth)
    assert depth <= runs * run < depth + 8 * runs
    assert run <= 256
    assert runs == 1 or run >= 96


def test_pools_and_transposes(profile: Profile) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(2))
    x = torch.randn(1, 20, 19, 19)
    value = run_module(lowered(model, x, profile), x, profile)
    assert relative_error(torch.from_numpy(value), model(x)) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8a8"])
def test_the_latency_model_knows_the_loops_of_every_kernel(profile: Profile, precision: Precision) -> None:
    torch.manual_seed(0)
    model, x = chain().eval(), torch.randn(1, 3, 12, 12)
    layers = [
        layer for layer in analyse(model, (x,)).layers.values() if layer.name != "6"
    ]  # whose groups are padded apart
    if precision == "w8a8":
        model = quantise_all(model, x)
    elif precision == "fp16":
        halve(model)
    mod = lowered(model, x, profile)
    anchors = [templates.describe(function) for name, function in mod.functions.items() if name.name_hint != "main"]
    loops = {(anchor.template, anchor.spatial, anchor.reduction) for anchor in anchors if anchor.spatial}
    peaks = {"fp32": 38e9, "fp16": 76e9, "int8": 150e9}
    for layer in layers:
        (work,) = layer_work(layer, Method(precision), profile)
        assert (work.template, work.spatial, work.reduction) in loops
        seconds, _ = LatencyModel(profile, peaks).layer_seconds(layer, Method(precision))
        assert layer.macs / 200e9 < seconds < 1e-3
