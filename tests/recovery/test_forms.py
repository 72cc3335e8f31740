"""Every stored layer in training: it begins where the layer is, learns, and what is delivered computes what was trained, to the last bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocomp.compress.rounding import Metric
from autocomp.database.store import Inputs, store
from autocomp.layers.convolution import Geometry
from autocomp.layers.part import Place, Stored
from autocomp.layers.recurrent import Recurrence
from autocomp.records.precisions import FORMATS, FP32, PRECISIONS, Precision, load
from autocomp.recovery.forms.form import Training
from autocomp.recovery.forms.whole import converted, frozen, trainable

torch.set_num_threads(1)
STORED = [name for name in PRECISIONS if name != FP32]


def made(precision: Precision, place: Place, outputs: int, columns: int, seed: int) -> Stored:
    """A stored layer of random weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, columns, generator=generator, dtype=torch.float64) / math.sqrt(columns)
    inputs = Inputs(torch.randn(32, columns, generator=generator), -3.0, 4.0, Metric(torch.ones(columns).double()))
    part = store(weight, precision, inputs, torch.ones(outputs).double(), place.linear).part
    if not place.linear and not FORMATS[precision].family.flat:
        part = replace(part, weight=part.weight.view(outputs, *place.kernel))
    bias = torch.randn(outputs, generator=generator)
    layer = load(FORMATS[precision].family.layer)(replace(part, bias=bias), place)
    assert isinstance(layer, Stored)
    return layer


@st.composite
def layers(draw: st.DrawFn) -> tuple[Stored, Tensor]:
    """A layer of any precision and kind, and an input for it."""
    precision, seed = draw(st.sampled_from(STORED)), draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        columns, outputs = draw(st.integers(1, 70)), draw(st.integers(1, 20))
        layer = made(precision, Place(True, False, (), Geometry((), (), (), 1)), outputs, columns, seed)
        return layer, torch.randn(draw(st.integers(1, 4)), columns, generator=generator)
    groups, each, outputs = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    one_d, height, width = draw(st.booleans()), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    stride, transposed = draw(st.integers(1, 2)), draw(st.booleans())
    kernel = (each, 1 if one_d else height, width)
    more = (0, stride - 1) if transposed else None
    geometry = Geometry((1 if one_d else stride, stride), (0, width // 2), (1, 1), groups, (0, 0) if more else None)
    layer = made(precision, Place(False, one_d, kernel, geometry), outputs * groups, math.prod(kernel), seed)
    size = (4,) if one_d else (4, 5)
    return layer, torch.randn(draw(st.integers(1, 3)), each * groups, *size, generator=generator)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers hold the same tensors and settings."""
    a, b = one.state_dict(), other.state_dict()
    settings = [(getattr(m, "inv_xs", 0), getattr(m, "zp", 0), m.extra_repr()) for m in (one, other)]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and settings[0] == settings[1]


def steps(model: nn.Module, x: Tensor, count: int, rate: float) -> list[float]:
    """Adam towards outputs that are larger, and by more than a step; the losses."""
    target = model(x).detach() + 3 + 0.5 * torch.randn(model(x).shape, generator=torch.Generator().manual_seed(7))
    optimizer, losses = torch.optim.Adam(model.parameters(), rate), []
    for _ in range(count):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@settings(max_examples=150)
@given(case=layers())
def test_training_begins_where_the_layer_is_and_what_is_delivered_is_what_was_trained(
    case: tuple[Stored, Tensor],
) -> None:
    layer, x = case
    form = trainable(layer)
    assert isinstance(form, Training)
    assert same(layer, converted(form))
    torch.testing.assert_close(form(x), layer(x), rtol=2e-6, atol=2e-6)  # sums in another order, the last bit
    losses = steps(form, x, 12, 0.02)
    assert min(losses[1:]) < losses[0]
    delivered = converted(form)
    assert not same(layer, delivered)
    assert type(delivered) is type(layer)
    assert {k: (v.shape, v.dtype) for k, v in delivered.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in layer.state_dict().items()
    }
    assert torch.equal(form.eval()(x), delivered(x))
    with torch.no_grad():
        torch.testing.assert_close(form.train()(x), delivered(x), rtol=1e-5, atol=1e-5)
    assert same(delivered, converted(trainable(delivered)))  # and from there on again


@pytest.mark.parametrize("precision", STORED)
def test_every_parameter_of_a_form_learns(precision: Precision) -> None:
    layer = made(precision, Place(True, False, (), Geometry((), (), (), 1)), 6, 64, 1)
    torch.manual_seed(0)
    form, x = trainable(layer), torch.randn(5, 64)
    with torch.no_grad():  # where it begins every weight is a level, and no scale of them would be nearer
        for parameter in form.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    form(x).square().sum().backward()
    trained = [name for name, p in form.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert set(trained) == {name for name, _ in form.named_parameters()}


class Mixed(nn.Module):
    """A factorised layer, a norm and a plain layer, as a stitched candidate has them."""

    def __init__(self) -> None:
        super().__init__()
        flat = Geometry((), (), (), 1)
        place = Place(True, False, (), flat)
        self.factors = nn.Sequential(made("w8a8", place, 8, 24, 0), made("w8a8", place, 16, 8, 1))
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.factors(x))))


def test_a_model_of_mixed_layers_trains_as_a_whole_and_the_given_one_is_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(64, 24)
    before = copy.deepcopy(model.state_dict())
    form = trainable(model)
    with torch.no_grad():
        assert torch.equal(form.eval()(x), model(x))
    losses = steps(form.train(), x, 30, 0.01)
    assert losses[-1] < losses[0]
    delivered = converted(form)
    with torch.no_grad():
        assert torch.equal(form.eval()(x), delivered(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, Training) for module in delivered.modules())
    assert not any(parameter.requires_grad for parameter in delivered.parameters())
    assert frozen(model) == []


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_the_weight_of_a_loop_over_time_trains_in_floats_and_stays_in_integers(precision: Precision) -> None:
    torch.manual_seed(0)
    loop = Recurrence("lstm", 8, True, False, True)
    if precision != FP32:
        loop.hidden = made(precision, Place(True, False, (), Geometry((), (), (), 1)), 32, 8, 0)
    model = nn.Sequential(nn.Linear(5, 32), loop)
    x, wanted = torch.randn(4, 6, 5), torch.randn(4, 6, 8)
    assert frozen(model) == ([] if precision == FP32 else ["1.hidden"])
    form, losses = trainable(model), []
    optimizer = torch.optim.Adam([p for p in form.parameters() if p.requires_grad], 0.01)
    for _ in range(20):
        loss = (form(x)[0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    moved = not same(loop.hidden, converted(form)[1].hidden)
    assert moved == (precision == FP32)
