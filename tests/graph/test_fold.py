"""Folding BatchNorm changes no output."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
from torch import nn

from autocomp.compress.scales import activation_parameters, quantised
from autocomp.graph.canonical import canonical
from autocomp.graph.fold import dense_bytes, dense_parameters, fold_batchnorm, folded_bytes
from autocomp.run.prepare_task import said_of_size

torch.set_num_threads(1)


def norms_left(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("depthwise", [False, True])
def test_folding_preserves_outputs(depthwise):
    x = nets.images(4)
    model = canonical(nets.make(depthwise=depthwise), (x,))
    folded = fold_batchnorm(model)
    assert norms_left(folded) == 0
    assert norms_left(model) == 6
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_folding_into_integers_keeps_them():
    x = nets.images(4)
    model = canonical(nets.make(), (x,))
    conv = quantised(model.block1.conv1, *activation_parameters(0.0, 4.0))
    model.block1.conv1 = conv
    folded = fold_batchnorm(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    negative = model.block1.bn1.weight < 0
    sign = torch.where(negative, -1, 1).view(-1, 1, 1, 1)
    assert torch.equal(folded.block1.conv1.weight, (conv.weight * sign).to(torch.int8))
    assert bool((folded.block1.conv1.scale > 0).all())


def test_a_layer_with_two_readers_is_left_alone():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y + self.bn(y)

    model, x = nets.randomise(Two()), nets.images(2)
    model = canonical(model, (x,))
    assert model.code.norms == {}
    with torch.no_grad():
        torch.testing.assert_close(fold_batchnorm(model)(x), model(x))


def test_a_factorised_layer_folds_into_its_last_factor():
    x = nets.images(2)
    model = canonical(nets.make(), (x,))
    model.block1.conv1 = nn.Sequential(nn.Conv2d(16, 4, 3, padding=1, bias=False), nn.Conv2d(4, 16, 1, bias=False))
    for norms in (None, {"block1.conv1": "block1.bn1"}):
        folded = fold_batchnorm(model, norms)
        assert isinstance(folded.block1.bn1, nn.Identity)
        with torch.no_grad():
            torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder turned over."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.relu(self.inner(x)), self.inner.weight.t())


class Small(nn.Module):
    """A weight in 8 bits, made wide when it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (64, 64), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(64, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.float() * self.scale)


class Repeated(nn.Module):
    """A weight that is there many times."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.repeat(8, 1))


@pytest.mark.parametrize(("made", "parameters"), [(Tied, 64 * 128 + 128), (Small, 64), (Repeated, 8 * 64)])
def test_a_model_is_as_large_as_what_it_holds(made: type[nn.Module], parameters: int) -> None:
    given = made().eval()
    model = canonical(given, (torch.randn(2, 64),))
    stored = sum(tensor.nbytes for tensor in (*given.parameters(), *given.buffers()))
    assert dense_bytes(model) == stored < folded_bytes(model)
    assert dense_parameters(model) == parameters
    assert len(said_of_size(model)) == 1
    assert dense_bytes(copy.deepcopy(model)) == stored


def test_what_only_training_needs_is_not_counted() -> None:
    class Aided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aid = nn.Linear(8, 8), nn.Linear(8, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.aid(self.used(x)) if self.training else self.used(x)

    model = canonical(Aided().eval(), (torch.randn(2, 8),))
    assert dense_bytes(model) == folded_bytes(model) == 4 * 72
    assert said_of_size(model) == []
