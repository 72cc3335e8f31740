"""The integer ops against a plain int64 reference, and the bounds of rounding."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocomp.compress.scales import activation_parameters, observe, quantise_weight, quantised
from autocomp.errors import UsageError
from autocomp.layers.w8a8 import QuantConv2d, QuantLinear, conv2d_w8a8, linear_w8a8, sums_in_float32

torch.set_num_threads(1)


def reference_q(x: np.ndarray, inv_xs: float, zp: int) -> np.ndarray:
    scaled = np.rint((x * np.float32(inv_xs)).astype(np.float32))
    return np.clip(scaled.astype(np.int64) + zp, 0, 255)


def reference_y(acc: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    assert np.abs(acc).max(initial=0) < 2**31
    return (acc.astype(np.float32).astype(np.float64) * scale + bias).astype(np.float32)


def reference_conv(x, w, scale, bias, inv_xs, zp, stride, padding, dilation, groups):
    """Loops over output positions in int64; padding is zp, which contributes nothing."""
    q = reference_q(x, inv_xs, zp)
    (n, _, height, width), (o, i, kh, kw) = x.shape, w.shape
    padded = np.full((n, x.shape[1], height + 2 * padding[0], width + 2 * padding[1]), zp, np.int64)
    padded[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = q
    oh = (padded.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (padded.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    acc = np.zeros((n, o, oh, ow), np.int64)
    per = o // groups
    for out in range(o):
        first = out // per * i
        for y in range(oh):
            for z in range(ow):
                rows = slice(y * stride[0], y * stride[0] + dilation[0] * (kh - 1) + 1, dilation[0])
                cols = slice(z * stride[1], z * stride[1] + dilation[1] * (kw - 1) + 1, dilation[1])
                patch = padded[:, first : first + i, rows, cols] - zp
                acc[:, out, y, z] = (patch * w[out].astype(np.int64)).sum((1, 2, 3))
    return reference_y(acc, scale[:, None, None].astype(np.float64), bias[:, None, None].astype(np.float64))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    groups=st.sampled_from([1, 2, 4]),
    depthwise=st.booleans(),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    zp=st.integers(0, 255),
)
def test_conv_equals_the_int64_reference(seed, groups, depthwise, kernel, stride, padding, dilation, zp):
    rng = np.random.default_rng(seed)
    per_in = 1 if depthwise else int(rng.integers(1, 5))
    x = (rng.standard_normal((2, groups * per_in, 6, 7)) * 3).astype(np.float32)
    w = rng.integers(-127, 128, (groups * 2, per_in, *kernel)).astype(np.int8)
    scale = rng.uniform(1e-4, 1e-2, groups * 2).astype(np.float32)
    bias = rng.standard_normal(groups * 2).astype(np.float32)
    inv_xs = float(np.float32(rng.uniform(1, 60)))
    arguments = (inv_xs, zp, list(stride), list(padding), list(dilation), groups)
    got = conv2d_w8a8(*(torch.from_numpy(array) for array in (x, w, scale, bias)), *arguments)
    np.testing.assert_array_equal(got.numpy(), reference_conv(x, w, scale, bias, *arguments))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 300), n=st.integers(1, 9), zp=st.integers(0, 255))
def test_linear_equals_the_int64_reference(seed, k, n, zp):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((2, 3, k)) * 3).astype(np.float32)
    w = rng.integers(-127, 128, (n, k)).astype(np.int8)
    scale = rng.uniform(1e-4, 1e-2, n).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    inv_xs = float(np.float32(rng.uniform(1, 60)))
    got = linear_w8a8(*(torch.from_numpy(array) for array in (x, w, scale, bias)), inv_xs, zp)
    acc = (reference_q(x, inv_xs, zp) - zp) @ w.astype(np.int64).T
    np.testing.assert_array_equal(got.numpy(), reference_y(acc, scale.astype(np.float64), bias.astype(np.float64)))


@pytest.mark.parametrize("groups", [1, 2])
def test_sums_past_float32_stay_exact(groups):
    """The worst case: every product is 127 x 255, far over 2**24; an odd total shows a lost unit."""
    channels = 2400
    x = torch.full((1, channels, 2, 2), 1000.0)
    w = torch.full((2, channels // groups, 1, 1), 127, dtype=torch.int8)
    w[:, 0] = 126
    one, zero = torch.ones(2), torch.zeros(2)
    got = conv2d_w8a8(x, w, one, zero, 1.0, 0, [1, 1], [0, 0], [1, 1], groups)
    exact = 255 * (127 * channels // groups - 1)
    assert torch.equal(got, torch.full_like(got, float(exact)).float())
    wide = linear_w8a8(x[:, :, 0, 0], torch.full((1, channels), 127, dtype=torch.int8), one[:1], zero[:1], 1.0, 0)
    assert wide.item() == float(np.float32(255 * 127 * channels))


def test_sums_in_float32_are_off_by_rounding_only_and_end_with_the_block():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 2048, 3, 3, generator=generator)
    w = torch.randint(-127, 128, (4, 2048, 3, 3), dtype=torch.int8, generator=generator)
    scale, bias = torch.rand(4, generator=generator), torch.zeros(4)

    def convolved() -> torch.Tensor:
        return conv2d_w8a8(x, w, scale, bias, 255.0, 0, [1, 1], [1, 1], [1, 1], 1)

    exact = convolved()
    with sums_in_float32():
        close = convolved()
    torch.testing.assert_close(close, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    with pytest.raises(ValueError, match="inside"), sums_in_float32():
        raise ValueError("inside")
    assert torch.equal(convolved(), exact)


def test_a_single_channel_with_a_huge_kernel_stays_exact():
    x = torch.full((1, 2, 24, 24), 1000.0)
    w = torch.full((1, 2, 24, 24), 127, dtype=torch.int8)
    got = conv2d_w8a8(x, w, torch.ones(1), torch.zeros(1), 1.0, 0, [1, 1], [0, 0], [1, 1], 1)
    assert got.item() == float(np.float32(255 * 127 * 24 * 24 * 2))


def test_rounding_is_half_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]])
    w = torch.eye(5, dtype=torch.int8)
    got = linear_w8a8(x, w, torch.ones(5), torch.zeros(5), 1.0, 128)
    assert got.tolist() == [[0.0, 2.0, 2.0, 0.0, -2.0]]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(1e-6, 1e6))
def test_weight_error_is_at_most_half_a_step(seed, spread):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) * spread
    weight[2] = 0
    integers, scale = quantise_weight(weight)
    step = scale.double().view(-1, 1, 1, 1)
    # The scale is stored in float32: the row's peak may lie past 127 steps by that rounding.
    bound = step / 2 * (1 + 1e-4)
    assert bool(((weight.double() - integers.double() * step).abs() <= bound).all())
    assert int(integers.abs().max()) <= 127


@settings(max_examples=50, deadline=None)
@given(low=st.floats(-1e4, 1e4), width=st.floats(1e-3, 1e4))
def test_activation_parameters_hold_zero_exactly(low, width):
    inv_xs, zp = activation_parameters(low, low + width)
    assert 0 <= zp <= 255
    x = torch.tensor([[0.0]])
    assert linear_w8a8(x, torch.ones(1, 1, dtype=torch.int8), torch.ones(1), torch.zeros(1), inv_xs, zp).item() == 0.0


def test_observers_nest_inside_the_extremes():
    sample = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)), torch.tensor([40.0])])
    low, high = float(sample.min()), float(sample.max())
    assert observe(sample, low, high, "minmax") == (low, high)
    for kind in ("percentile", "mse"):
        narrow = observe(sample, low, high, kind)
        assert low <= narrow[0] < narrow[1] <= high
        assert kind == "mse" or narrow[1] < high


def test_an_unseen_input_is_harmless():
    assert activation_parameters(0.0, 0.0) == (1.0, 0)


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.Linear(12, 7)])
def test_module_is_close_to_the_float_layer_and_exports(layer):
    torch.manual_seed(0)
    x = torch.rand(2, 6, 9, 9) if isinstance(layer, nn.Conv2d) else torch.rand(2, 12)
    module = quantised(layer, *activation_parameters(0.0, 1.0))
    assert isinstance(module, QuantConv2d | QuantLinear)
    with torch.no_grad():
        assert (module(x) - layer(x)).abs().max() < 0.02
        program = torch.export.export(module, (x,))
        assert torch.equal(program.module()(x), module(x))
        targets = {str(node.target) for node in program.graph.nodes}
        assert targets & {"autocomp.conv2d_w8a8.default", "autocomp.linear_w8a8.default"}
        again = io.BytesIO()
        torch.save(copy.deepcopy(module), again)
        again.seek(0)
        assert torch.equal(torch.load(again, weights_only=False)(x), module(x))


def test_overflow_of_int32_is_refused():
    weight = torch.full((1, 70000), 127, dtype=torch.int8)
    with pytest.raises(UsageError, match="int32"):
        QuantLinear(weight, torch.ones(1), torch.zeros(1), 1.0, 0)


def test_opcheck():
    arguments = (torch.rand(1, 2, 5, 5), torch.ones(3, 2, 3, 3, dtype=torch.int8), torch.ones(3), torch.zeros(3))
    torch.library.opcheck(conv2d_w8a8, (*arguments, 9.0, 3, [1, 2], [1, 1], [1, 1], 1))
    arguments = (torch.rand(2, 4), torch.ones(3, 4, dtype=torch.int8), torch.ones(3), torch.zeros(3))
    torch.library.opcheck(linear_w8a8, (*arguments, 9.0, 3))
