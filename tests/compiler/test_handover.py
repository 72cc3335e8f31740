"""What ``autocomp.compile`` hands over: compared on more than its example, on a second call, and of a model that repeats itself."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autocomp
from autocomp.compiler import handover
from autocomp.compiler.build import CompiledModel
from autocomp.compiler.handover import checked_inputs, describe_outputs, describe_writing, varied
from autocomp.errors import ExportError, MismatchError, UsageError

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("short_tuning")


class Applied(nn.Module):
    """A model that is one function of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


class Counting(nn.Module):
    """A model that keeps how often it was called where no export sees it."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_integers_stay_in_their_table_and_values_in_their_range() -> None:
    tokens, mask = torch.tensor([[5, 2, 9, 2]]), torch.ones(1, 4, dtype=torch.long)
    values, flags = torch.rand(2, 3, 40), torch.tensor([[True, False, True, True]])
    seen = [varied((tokens, mask, values, flags, torch.zeros(1, 20)), seed) for seed in range(20)]
    assert {int(t) for made in seen for t in made[0].flatten()} == set(range(2, 10))
    for _, ones, numbers, booleans, zeros in seen:
        assert torch.equal(ones, mask)
        assert float(numbers.min()) >= float(values.min())
        assert float(numbers.max()) <= float(values.max())
        assert booleans.dtype == torch.bool
        assert float(zeros.std()) > 0, "a constant example says nothing of the range"
    assert not torch.equal(seen[0][2], seen[1][2])


def test_a_model_need_not_take_what_was_made_up() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.equal(x, torch.ones(1, 3)):
                raise ValueError("not mine")
            return x

    example = (torch.ones(1, 3),)
    assert len(checked_inputs(Picky(), example)) == 2
    assert len(checked_inputs(nn.Identity(), example)) == 2 + handover.VARIED


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.dropout(x, 0.5, training=True),
        lambda x: x + torch.rand_like(x),
        lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    ],
    ids=["dropout", "rand", "bernoulli"],
)
def test_a_random_model_is_said_to_be(function: Callable[[Tensor], Tensor]) -> None:
    model, x = Applied(function).eval(), torch.randn(1, 8)
    state = torch.random.get_rng_state()
    with pytest.raises(ExportError, match="the model is random: two calls on the same inputs differ"):
        autocomp.compile(model, (x,))
    assert torch.equal(torch.random.get_rng_state(), state), "asking leaves the user's own chance alone"


def test_a_model_with_a_state_is_said_to_have_one() -> None:
    with pytest.raises(ExportError, match="the model keeps a state"):
        autocomp.compile(Counting(), (torch.randn(1, 8),))


def test_a_constant_model_is_said_to_be() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            nn.init.constant_(self.layer.bias, -100.0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x))

    with pytest.warns(UserWarning, match="outputs are the same for 3 different inputs"):
        autocomp.compile(Dead().eval(), (torch.randn(1, 8),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autocomp.compile(Applied(torch.tanh).eval(), (torch.randn(1, 8),))
    assert describe_outputs(Applied(torch.tanh).eval(), [(torch.randn(1, 8),)]) == ""


def test_what_agrees_on_the_example_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled module that gives back its first answer for ever."""
    honest, kept = CompiledModel.run, {}

    def stuck(self: CompiledModel, *inputs: Tensor) -> Any:
        return kept.setdefault(id(self), honest(self, *inputs))

    monkeypatch.setattr(CompiledModel, "run", stuck)
    with pytest.raises(MismatchError, match="differs from torch"):
        autocomp.compile(Applied(torch.tanh).eval(), (torch.randn(1, 8),))


def test_what_agrees_on_the_first_call_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled module that keeps a state."""
    honest = CompiledModel.run
    calls = []

    def drifting(self: CompiledModel, *inputs: Tensor) -> Any:
        calls.append(inputs)
        result = honest(self, *inputs)
        return result if len(calls) <= 1 + handover.VARIED else result * 1.5

    monkeypatch.setattr(CompiledModel, "run", drifting)
    with pytest.raises(MismatchError, match="differs from torch"):
        autocomp.compile(Applied(torch.tanh).eval(), (torch.randn(1, 8),))


def test_an_input_that_the_model_writes_to_is_left_alone() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sub_(x.mean())

    x = torch.randn(1, 8)
    before = x.clone()
    checked_inputs(Centred(), (x,))
    assert torch.equal(x, before)


def test_decisions_and_counts_are_handed_over() -> None:
    """Booleans have no difference, and whole numbers wrap around: both are compared as numbers."""

    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x > 0, (x > 0).sum(1)

    x = torch.randn(2, 8)
    decided, counted = autocomp.compile(Deciding().eval(), (x,)).run(x)
    assert torch.equal(decided, x > 0)
    assert torch.equal(counted, (x > 0).sum(1))


@pytest.fixture(scope="module")
def compiled(short_tuning: None) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    return model, autocomp.compile(model, (torch.randn(1, 8),))


def test_calls_from_several_threads_are_each_their_own(compiled: tuple[nn.Module, Any]) -> None:
    model, module = compiled
    inputs = [torch.randn(1, 8) for _ in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong: list[str] = []

    def call(first: int) -> None:
        for k in range(first, first + 300):
            try:
                torch.testing.assert_close(module.run(inputs[k % 8]), expected[k % 8], rtol=1e-4, atol=1e-5)
            except Exception as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=call, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.zeros(1, 9),), (torch.zeros(2, 8),), (torch.zeros(1, 8, dtype=torch.int64),), (), (torch.zeros(1, 8), torch.zeros(1, 8)),
        (torch.zeros(1, 8).numpy(),), ([0.0] * 8,), (torch.zeros(1, 8).to_sparse(),), (torch.zeros(1, 8, device="meta"),),
    ],
)  # fmt: skip
def test_other_inputs_are_refused_in_our_words(compiled: tuple[nn.Module, Any], inputs: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        compiled[1].run(*inputs)
    assert len(str(caught.value)) < 1000


def test_a_tensor_with_the_negative_bit_is_taken(compiled: tuple[nn.Module, Any]) -> None:
    model, module = compiled
    x = torch.complex(torch.randn(1, 8), torch.randn(1, 8)).conj().imag
    assert x.is_neg()
    with torch.no_grad():
        torch.testing.assert_close(module.run(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_model_in_training_mode_is_left_in_it() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.BatchNorm1d(16).eval(), nn.Linear(16, 4)).train()
    model[2].eval()
    before = {name: module.training for name, module in model.named_modules()}
    autocomp.compile(model, (torch.randn(1, 8),))
    autocomp.measure(model, (torch.randn(1, 8),))
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_model_that_writes_into_its_inputs_is_said_to() -> None:
    class Cached(nn.Module):
        def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            cache.index_copy_(1, torch.tensor([1]), x)
            return cache.sum(1)

    x, cache = torch.randn(1, 1, 4), torch.zeros(1, 3, 4)
    with torch.no_grad():
        said = describe_outputs(Cached(), [(x, cache)])
    assert "writes into its input 1, which a compiled module leaves as it is" in said
    assert float(cache.abs().max()) == 0.0
    assert describe_writing(nn.Linear(4, 4), (x,)) == ""
