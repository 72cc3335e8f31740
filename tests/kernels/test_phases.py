"""Transposed convolutions by output phase, and regrouped weights: the arithmetic alone, over many shapes, with no compiler."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from autocomp.kernels.grouped import Regrouping
from autocomp.kernels.phases import Axis, plan


def along(axis: Axis, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A transposed convolution of one axis as its plan says it."""
    result = np.zeros(axis.stride * axis.count)
    for run in axis.runs:
        for phase, taps in zip(run.phases, run.taps, strict=True):
            for t, (step, tap) in itertools.product(range(axis.count), enumerate(taps)):
                source = t + run.first + step * run.dilation
                if tap >= 0 and 0 <= source < len(x):
                    result[t * axis.stride + phase] += x[source] * weight[tap]
    return result[axis.crop : axis.crop + axis.outputs]


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(1, 9), kernel=st.integers(1, 11), stride=st.integers(1, 6), padding=st.integers(0, 6), extra=st.integers(0, 5),
    dilation=st.integers(1, 4), channels=st.sampled_from([1, 3, 16, 200]),
)  # fmt: skip
def test_every_plan_is_the_transposed_convolution(
    size: int, kernel: int, stride: int, padding: int, extra: int, dilation: int, channels: int
) -> None:
    assume(extra < max(stride, dilation))
    outputs = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1
    assume(outputs > 0)
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal(size), rng.standard_normal(kernel)
    expected = functional.conv_transpose1d(
        torch.from_numpy(x)[None, None], torch.from_numpy(weight)[None, None], None, stride, padding, extra, 1, dilation
    )
    (axis,) = plan([kernel], [stride], [padding], [dilation], [outputs], channels, 16).axes
    np.testing.assert_allclose(along(axis, x, weight), expected[0, 0].numpy(), atol=1e-12)


def test_no_product_is_wasted_where_channels_are_many() -> None:
    """Four convolutions with 4 + 2 + 2 + 1 taps, where all phases alike would take four of each."""
    chosen = plan([3, 3], [2, 2], [1, 1], [1, 1], [64, 64], 256, 16)
    taps = [np.prod([run.length for run in runs]) for runs in chosen.convolutions()]
    assert sorted(taps) == [1, 2, 2, 4]


def test_few_channels_share_a_vector() -> None:
    """Three channels of four phases are twelve lanes of sixteen; apart they would be three of sixteen, four times."""
    (runs,) = plan([3, 3], [2, 2], [1, 1], [1, 1], [64, 64], 3, 16).convolutions()
    assert [len(run.phases) for run in runs] == [2, 2]


@pytest.mark.parametrize(
    ("groups", "outputs", "depth"), [(8, 4, 3), (3, 24, 2), (5, 2, 1), (6, 5, 4), (32, 1, 2), (4, 16, 1)]
)
@pytest.mark.parametrize("lanes", [4, 16])
def test_regrouped_weights_compute_the_same(groups: int, outputs: int, depth: int, lanes: int) -> None:
    weight, x = torch.randn(groups * outputs, depth, 3, 3), torch.randn(2, groups * depth, 5, 5)
    chosen = Regrouping.of(groups, groups * outputs, lanes)
    assert chosen.padded % lanes == 0
    wide = torch.from_numpy(chosen.weight(weight.numpy()))
    sums = functional.conv2d(x, wide, groups=chosen.fewer).unflatten(1, (chosen.fewer, chosen.padded))
    kept = sums[:, :, : chosen.merged * outputs].flatten(1, 2)
    torch.testing.assert_close(kept, functional.conv2d(x, weight, groups=groups))
