"""Masks of single weights while a model is trained: as many as asked, growing, moving, and zero in what is delivered."""

from __future__ import annotations

import pytest
import tiny_task
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autocomp.compress.scales import quantised
from autocomp.recovery.forms.whole import trainable
from autocomp.recovery.lessons import Teaching
from autocomp.recovery.masks import Masks
from autocomp.recovery.recipe import Phase, Recipe, load_recipe
from autocomp.recovery.schedules import Span
from autocomp.recovery.train import train

torch.set_num_threads(1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), quantised(nn.Linear(16, 12), 20.0, 3), nn.ReLU(), nn.Linear(12, 4)
    )


@given(sparsity=st.floats(0.05, 0.95), together=st.booleans())
def test_as_many_weights_are_masked_as_asked(sparsity: float, together: bool) -> None:
    masks = Masks(trainable(net()))
    assert list(masks.weights) == ["0.weight", "2.latent"]  # the last layer is left alone
    masks.set(sparsity, together)
    assert masks.masked() == pytest.approx(sparsity, abs=0.03)  # a few levels of integers are zero by themselves
    if not together:
        assert [float((~kept).double().mean()) for kept in masks.kept.values()] == pytest.approx(
            [sparsity] * 2, abs=0.03
        )


def test_a_cubic_mask_grows_and_never_lets_go() -> None:
    masks, stage, before = Masks(trainable(net())), Phase(name="a", sparsity=0.8, masks="cubic"), -1.0
    for step in range(0, 101, 20):
        held = dict(masks.kept)
        masks.begin(stage, step, step / 100)
        assert masks.masked() >= before
        assert all(bool((old | ~masks.kept[name]).all()) for name, old in held.items())
        before = masks.masked()
    assert before == pytest.approx(0.8, abs=0.03)


def test_a_dynamic_mask_moves_and_keeps_its_number() -> None:
    form = trainable(net())
    masks, stage = Masks(form), Phase(name="a", sparsity=0.5, masks="dynamic")
    masks.begin(stage, 0, 0.0)
    before = {name: kept.clone() for name, kept in masks.kept.items()}
    form(torch.randn(32, 8)).square().sum().backward()
    masks.move(stage, 20, 0.2)
    for name, kept in masks.kept.items():
        assert int(kept.sum()) == int(before[name].sum())
        assert not torch.equal(kept, before[name])
        assert not masks.weights[name][~kept].any()


STEPPED = Recipe(
    format_version=1,
    stages=[
        {"name": "coarse", "share": 0.3, "sparsity": 0.3, "masks": "cubic"},
        {"name": "fine", "share": 0.4, "sparsity": 0.7, "masks": "cubic"},
        {"name": "settle", "share": 0.3, "sparsity": 0.7},
    ],
)


@pytest.mark.parametrize("recipe", [STEPPED, load_recipe("dynamic-sparse")], ids=["in steps", "dynamic-sparse"])
def test_what_is_delivered_has_the_zeros(recipe: Recipe) -> None:
    task = tiny_task.learning()
    teaching = Teaching.of(task)
    teaching.lessons.draw()
    model = tiny_task.model()
    model.set_submodule("conv1", quantised(model.get_submodule("conv1"), 20.0, 0))
    done = train(model, teaching, recipe, Span(steps=60), 1e-3)
    weights = [done.model.get_submodule(layer).weight for layer in ("stem", "conv1", "conv2")]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros == pytest.approx(0.7, abs=0.05)
    assert done.curve[-1][1] < done.curve[len(done.curve) // 2][1] * 2
