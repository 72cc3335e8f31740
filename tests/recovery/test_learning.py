"""Beside answers and labels: attention maps, weights that a recipe leaves open; 16 bits, and what does not bear them."""

from __future__ import annotations

import copy
import math

import pytest
import tiny_task
import torch
from hypothesis import given
from hypothesis import strategies as some
from test_train import PLAIN, damaged, task, teaching
from torch import Tensor, nn
from torch.nn import functional

import autocomp
from autocomp.recovery.attention import Maps, attention_loss
from autocomp.recovery.autocast import Autocast, sensitive
from autocomp.recovery.forms.whole import trainable
from autocomp.recovery.one import recovered
from autocomp.recovery.recipe import Recipe, load_recipe
from autocomp.recovery.schedules import Span
from autocomp.recovery.train import train
from autocomp.recovery.weights import search_weights


class Attends(nn.Module):
    """A layer of attention, once by torch's own and once written out. Input [N, T, 16], output [N, 3]."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.head = nn.Linear(16, 3 * 4 * heads), nn.Linear(4 * heads, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, 4)).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        fused = functional.scaled_dot_product_attention(query, key, value)
        written = torch.softmax(query @ key.transpose(-1, -2), -1) @ value
        return self.head((fused + written).transpose(1, 2).flatten(2).mean(1))


def attending(heads: int = 4, seed: int = 0) -> Attends:
    torch.manual_seed(seed)
    return Attends(heads).eval()


@given(
    batch=some.integers(1, 3), heads=some.integers(1, 3), rows=some.integers(1, 5), columns=some.integers(1, 5),
    causal=some.booleans(),
)  # fmt: skip
def test_a_map_is_what_attention_weighs_values_with(
    batch: int, heads: int, rows: int, columns: int, causal: bool
) -> None:
    torch.manual_seed(rows)
    query, key = torch.randn(batch, heads, rows, 8), torch.randn(batch, heads, columns, 8)
    value = torch.randn(batch, heads, columns, 8)
    with Maps() as maps:
        functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    scores = query @ key.transpose(-1, -2) / math.sqrt(8)
    if causal:
        scores = scores.masked_fill(~torch.ones(rows, columns).tril().bool(), -math.inf)
    torch.testing.assert_close(maps.found[0], scores.softmax(-1).mean(1))


def test_heads_may_differ_and_the_same_maps_cost_nothing() -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    with Maps() as four, torch.no_grad():
        attending(4)(x)
    with Maps() as two:
        student = attending(2, seed=3)
        student(x)
    assert [tuple(one.shape) for one in four.found] == [(2, 5, 5)] * 2 == [tuple(one.shape) for one in two.found]
    loss = attention_loss(four.found, two.found)
    assert float(loss) > 0
    loss.backward()
    assert float(student.qkv.weight.grad.abs().sum()) > 0
    assert float(attention_loss(four.found, four.found)) == pytest.approx(0, abs=1e-6)


def test_attention_is_learnt_from_in_the_exported_form() -> None:
    x = torch.randn(64, 5, 16, generator=torch.Generator().manual_seed(1))
    made = autocomp.Task(
        attending(), (x[:1],), [(x,)], lambda net: {"kept": -float(net(x).var())}, outputs="classes@1", name="attends"
    )
    student = copy.deepcopy(made.model)
    with torch.no_grad():
        student.get_submodule("qkv").weight.add_(0.3 * torch.randn(48, 16, generator=torch.Generator().manual_seed(2)))

    def apart(model: nn.Module) -> float:
        with torch.no_grad(), Maps() as theirs:
            made.model(x)
        with torch.no_grad(), Maps() as ours:
            model(x)
        assert len(ours.found) == 2
        return float(attention_loss(theirs.found, ours.found))

    alone = {"stages": [PLAIN.stages[0].model_copy(update={"logits": 0.0, "labels": 0.0, "attention": 1.0})]}
    done = train(student, teaching(made), PLAIN.model_copy(update=alone), Span(steps=60), 3e-3)
    assert not done.failure
    assert apart(done.model) < 0.5 * apart(student)


def test_weights_that_are_left_open_are_found_by_short_trainings() -> None:
    recipe = load_recipe("weighed")
    assert recipe.left_open == {"labels", "features"}
    made = task()
    model, lessons = damaged(made.model), teaching(made)
    asked: list[float] = []

    def read(trained: nn.Module) -> tuple[float, float]:
        asked.append(0.5 + 0.1 * len(asked))
        return asked[-1], 0.05

    found = search_weights(model, lessons, recipe, 3e-3, {"conv2": None}, read)
    assert found is not None
    assert len(found.tried) == 6 == len(asked)
    assert found.taken == found.tried[-1][0]  # each was better than the one before by more than the error
    assert all(
        stage.weights == {"logits": 1.0, "attention": 0.0, **found.taken}
        for stage in recipe.weighed(found.taken).stages
    )
    alike = search_weights(model, lessons, recipe, 3e-3, {"conv2": None}, lambda trained: (0.5, 0.1))
    assert alike is not None
    assert dict(alike.taken) == {"labels": 0.0, "features": 0.0}  # the fewest things to learn from
    assert search_weights(model, lessons, PLAIN, 3e-3, None, read) is None
    unlabelled = tiny_task.task()
    without = search_weights(damaged(unlabelled.model), teaching(unlabelled), recipe, 3e-3, {"conv2": None}, read)
    assert without is not None
    assert {weights["labels"] for weights, _ in without.tried} == {0.0}


def test_a_model_is_recovered_by_weights_that_were_found() -> None:
    made = task()
    recipe = load_recipe("weighed").model_copy(update={"learning_rate": 3e-3})
    done = recovered(damaged(made.model), made, recipe, Span(steps=40), {"conv2": None})
    assert done.better
    assert any(note.startswith("weights: labels ") for note in done.notes)


def test_a_stage_that_may_learn_from_something_is_one() -> None:
    Recipe(format_version=1, stages=[{"name": "open", "logits": 0.0, "labels": None}])
    with pytest.raises(ValueError, match="learns from nothing"):
        Recipe(format_version=1, stages=[{"name": "shut", "logits": 0.0, "labels": 0.0}])


# torch computes fp16 on processors forty times slower
@pytest.mark.parametrize(("kind", "steps"), [("bf16", 40), ("fp16", 8)])
def test_sixteen_bits_train_and_what_is_delivered_is_whole(kind: str, steps: int) -> None:
    made = task()
    done = recovered(damaged(made.model), made, PLAIN.model_copy(update={"autocast": kind}), Span(steps=steps))
    assert done.better
    assert {tensor.dtype for tensor in done.model.state_dict().values() if tensor.is_floating_point()} == {
        torch.float32
    }
    assert not any("forward" in vars(module) for module in done.model.modules())


def test_layers_that_do_not_bear_sixteen_bits_stay_in_fp32() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    x = torch.randn(16, 8)
    with torch.no_grad():
        net[1].weight.mul_(1e6)  # past 65504
        net[2].weight.copy_(torch.ones(4, 8)).mul_(1e-3)
        net[2].weight[:, 1::2] *= -1  # what is left of sums that cancel is rounding
        net[1].weight.copy_(net[1].weight[:1] + 1e-4 * net[1].weight)
        net[1].bias.zero_()
        net[2].bias.zero_()
    assert "1" in sensitive(net, (x,), torch.float16)
    assert "0" not in sensitive(net, (x,), torch.float16)
    assert "2" in sensitive(net, (x,), torch.bfloat16)
    kept, found = Autocast("bf16"), sensitive(net, (x,), torch.bfloat16)
    assert kept.protect(net, [(x,)]) == found
    with kept(), torch.no_grad():
        assert net[2](x.bfloat16()).dtype == torch.float32
        assert net[0](x).dtype == torch.bfloat16
    kept.release()
    with kept(), torch.no_grad():
        assert net[2](x).dtype == torch.bfloat16


def test_a_note_names_what_was_kept() -> None:
    made = task()
    model = damaged(made.model)
    with torch.no_grad():
        model.get_submodule("head").weight.mul_(1e-6)
        model.get_submodule("head").weight[:, ::2] = 1e5
    done = train(model, teaching(made), PLAIN.model_copy(update={"autocast": "fp16"}), Span(steps=3), 1e-6)
    assert any(note.startswith("kept in fp32, as fp16") and "head" in note for note in done.notes)


def test_gradients_that_overflow_leave_the_weights_alone() -> None:
    precision = Autocast("fp16")
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    before = layer.weight.detach().clone()
    precision.backward(layer(torch.full((1, 2), 1e36)).sum() * 1e3)
    precision.unscale(optimizer)
    precision.step(optimizer)
    assert torch.equal(before, layer.weight)
    state = precision.state()
    again = Autocast("fp16")
    again.take_up(state)
    assert again.state() == state
    assert trainable(nn.Sequential(layer))[0].weight.requires_grad
