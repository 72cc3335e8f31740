"""One rule says whether outputs agree: sharp against what is wrong, large or small, and deaf to a few values that rounded the other way."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from wholes import quantise_all

from autocomp.compiler.verify import CHAOTIC, coarsest, compare, reference_outputs
from autocomp.errors import MismatchError
from autocomp.layers.fp16 import halved
from autocomp.records.precisions import ARITHMETICS, FLOAT32, INT8

torch.set_num_threads(1)


def quantised(model: nn.Module, x: Tensor) -> nn.Module:
    return quantise_all(model.eval(), x)


class Dense(nn.Module):
    """A segmentation head: input [1, 3, 64, 64], output [1, 21, 64, 64]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 21, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def images(count: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(1, 3, 64, 64, generator=generator),) for _ in range(count)]


def altered(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """What computes as the model does, but for a change of its output."""
    return lambda *inputs: change(reference_outputs(model, inputs)[0])


def flipped(share: float, size: float) -> Callable[[Tensor], Tensor]:
    """Moves a share of the values by so many parts of the range, as a rounding that went the other way does."""

    def change(output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        chosen = torch.rand(output.shape, generator=generator) < share
        return output + chosen * size * output.abs().max()

    return change


def test_dense_outputs_may_have_some_values_that_rounded_the_other_way() -> None:
    """A limit of 5 % for any value is meant for few outputs: of 86 000 some are always further off."""
    inputs = images(3)
    model = quantised(Dense(), inputs[0][0])
    found = compare(model, altered(model, flipped(5e-4, 0.07)), inputs, "the file")
    assert found.errors.worst > 0.06, "which no value of a few outputs may be off"
    assert found.errors.typical < 1e-2
    assert not found.note


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y * 1.05, "typically"),
        (lambda y: torch.cat([y[..., :1] * 0, y[..., 1:]], -1), "99.9 %"),  # a border that was left out
        (lambda y: torch.cat([y[:, :1] * 0, y[:, 1:]], 1), "99.9 %"),  # a channel
        (lambda y: y.roll(1, 1), "decisions"),
        (
            lambda y: y.index_put((torch.tensor([0]),) * 4, y.abs().max() * 2),
            "of the output's range",
        ),  # one value, far off
        (flipped(0.2, 0.1), "typically"),
        (lambda y: y[:, :20], "shapes"),
        (lambda y: y.index_put((torch.tensor([0]),) * 4, torch.tensor(float("nan"))), "not finite"),
    ],
    ids=["scale", "border", "channel", "order", "one value", "too many", "shape", "nan"],
)
def test_what_is_wrong_is_refused_however_large_the_output(change: Callable[[Tensor], Tensor], words: str) -> None:
    inputs = images(2)
    model = quantised(Dense(), inputs[0][0])
    with pytest.raises(MismatchError, match=f"the file differs from torch by .*{words}"):
        compare(model, altered(model, change), inputs, "the file")


@pytest.mark.parametrize("size", [0.3, 2e-3])
def test_floats_have_no_such_leave(size: float) -> None:
    inputs = images(1)
    model = Dense().eval()
    assert compare(model, altered(model, flipped(0.5, 1e-5)), inputs, "it").errors.worst < 1e-4
    with pytest.raises(MismatchError):
        compare(model, altered(model, flipped(1e-4, size)), inputs, "it")


class Chaotic(nn.Module):
    """Doubles a fraction ``steps`` times: what enters as a part in a million leaves 2 ** steps times larger."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for _ in range(self.steps):
            x = (2 * x).remainder(1.0)
        return x


def one_ulp(model: Chaotic) -> Callable[..., Tensor]:
    """The same model on inputs that differ in the last bit, as another order of sums would have it."""
    return lambda x: reference_outputs(model, (torch.nextafter(x, torch.ones(())),))[0]


def test_chaos_is_named_and_has_its_limit() -> None:
    inputs = [(0.3 + 0.4 * torch.rand(64, generator=torch.Generator().manual_seed(1)),)]
    slight, wild = Chaotic(12).eval(), Chaotic(20).eval()
    found = compare(slight, altered(slight, lambda y: y + 2e-3), inputs, "it")
    assert "chaotic" in found.note
    assert found.errors.within(CHAOTIC)
    with pytest.raises(MismatchError, match="the model is chaotic: parts in a million of its inputs and weights move"):
        compare(wild, one_ulp(wild), inputs, "it")
    steady = Chaotic(0).eval()
    with pytest.raises(MismatchError) as refused:
        compare(steady, altered(steady, lambda y: y + 2e-3), inputs, "it")
    assert "chaotic" not in str(refused.value)


class AtAnEdge(nn.Module):
    """A sum of almost nothing, whose sign decides: one of 64 values jumps by the whole range when the others do not move at all."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(64, generator=torch.Generator().manual_seed(2))
        weight[-1] = -weight[:-1].sum()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.tanh(1e12 * (x[:, :1] * self.weight).sum(1, keepdim=True))], 1)


def test_a_value_at_the_edge_of_a_jump_may_be_over_it() -> None:
    model = AtAnEdge().eval()
    x = torch.rand(1, 2000, generator=torch.Generator().manual_seed(3)) + 1
    other = altered(
        model, lambda y: torch.cat([y[:, :-1], y[:, -1:] + 0.2], 1)
    )  # the jump is of up to 1 in a range of 2
    assert "chaotic" in compare(model, other, [(x,)], "it").note


def test_decisions_that_are_no_floats_are_counted() -> None:
    class Decided(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.argmax(-1), x > 0

    inputs = [(torch.randn(1, 4000, 5, generator=torch.Generator().manual_seed(1)),)]
    model = Decided().eval()

    def wrong(count: int) -> Callable[..., tuple[Tensor, ...]]:
        def run(x: Tensor) -> tuple[Tensor, ...]:
            chosen, positive = (output.clone() for output in model(x))
            chosen[:, :count] += 1
            return chosen, positive

        return run

    assert compare(model, wrong(2), inputs, "it").errors.decisions == pytest.approx(2 / 4000)
    with pytest.raises(MismatchError, match="decisions"):
        compare(model, wrong(40), inputs, "it")


def test_infinities_of_a_mask_agree_with_themselves_alone() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 0, -torch.inf)

    inputs, model = [(torch.randn(1, 50, generator=torch.Generator().manual_seed(1)),)], Masked().eval()
    assert compare(model, model, inputs, "it").errors.worst == 0.0
    with pytest.raises(MismatchError):
        compare(model, altered(model, lambda y: y.clamp(min=-1e9)), inputs, "it")


def test_a_model_whose_own_output_is_no_number_proves_nothing() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sqrt()

    with pytest.raises(MismatchError, match="torch's own output 0 holds values that are not numbers"):
        compare(Root(), Root(), [(-torch.ones(1, 3),)], "it")


def test_each_precision_has_its_row() -> None:
    x = torch.randn(1, 3, 8, 8)
    assert coarsest(Dense()) is FLOAT32
    assert coarsest(nn.Sequential(quantised(Dense(), x), halved(nn.Linear(4, 4)))) is INT8
    finest_first = [arithmetic.tolerance for arithmetic in ARITHMETICS.values()]
    for finer, coarser in itertools.pairwise([*finest_first, CHAOTIC]):
        assert finer.within(coarser)
