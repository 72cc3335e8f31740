"""16-bit layers: the specification, its modules, and what torch needs to know of the ops."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocomp.layers.fp16 import HalfConv1d, conv2d_fp16, halved, linear_fp16
from autocomp.records.candidate import Method
from autocomp.records.precisions import CODEBOOK, FORMATS, PRECISIONS, Precision, group_of

torch.set_num_threads(1)


@given(precision=st.sampled_from(PRECISIONS), ranks=st.lists(st.integers(1, 999), max_size=2))
def test_methods_are_read_back_as_written(precision, ranks):
    method = Method(precision, tuple(ranks))
    assert Method.parse(str(method)) == method


def test_every_precision_has_a_format():
    assert tuple(FORMATS) == get_args(Precision)
    for precision, form in FORMATS.items():
        if form.family is CODEBOOK:
            assert form.bits == 8 * form.stages / form.dim == int(precision[-1])
    assert (group_of("w4", 30), group_of("w4", 33), group_of("w4g128", 33), group_of("w4g32", 500)) == (32, 64, 64, 32)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), magnitude=st.sampled_from([1e-3, 1.0, 300.0]))
def test_a_linear_layer_is_off_by_the_rounding_of_its_operands(seed, magnitude):
    torch.manual_seed(seed)
    layer, x = nn.Linear(24, 7), torch.randn(3, 5, 24) * magnitude
    half = halved(layer)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    # Each operand is off by half a unit in the last place of 11 bits, or of the subnormals below 2^-14.
    terms = nn.functional.linear(x.abs().double() + 2**-14, layer.weight.abs().double() + 2**-14)
    assert bool(((half(x).double() - exact).abs() <= 2.1 * 2**-11 * terms + 1e-6 * magnitude).all())


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_convolution_is_the_float_one_on_rounded_operands(groups):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 8, 3, 2, 1, groups=groups), torch.randn(2, 8, 9, 7)
    expected = nn.functional.conv2d(
        x.half().double(), layer.weight.half().double(), layer.bias.double(), 2, 1, 1, groups
    )
    torch.testing.assert_close(halved(layer)(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_one_dimension_is_a_picture_one_row_high():
    torch.manual_seed(0)
    layer, x = nn.Conv1d(4, 6, 5, padding=2, bias=False), torch.randn(2, 4, 20)
    half = halved(layer)
    assert isinstance(half, HalfConv1d)
    torch.testing.assert_close(half(x), layer(x), rtol=0, atol=5e-3)


def test_padding_that_is_not_zeros_is_refused():
    with pytest.raises(ValueError, match="zero padding"):
        halved(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))


def test_torch_accepts_the_registrations_and_the_export():
    x, w, bias = torch.randn(1, 4, 6, 5), torch.randn(6, 4, 3, 3).half(), torch.randn(6)
    torch.library.opcheck(conv2d_fp16, (x, w, bias, [1, 2], [1, 1], [1, 1], 1))
    torch.library.opcheck(linear_fp16, (torch.randn(2, 3, 8), torch.randn(5, 8).half(), torch.randn(5)))
    model = nn.Sequential(halved(nn.Conv2d(4, 6, 3)), nn.Flatten(), halved(nn.Linear(72, 3))).eval()
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), model(x))
