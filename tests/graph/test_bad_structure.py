"""Modules that cannot be narrowed: each is left as it is, and the reason says why and, where there is one, what to do."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from autocomp.errors import ExportError
from autocomp.graph.analyse import analyse

torch.set_num_threads(1)


class Net(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: nn.Module, width: int = 16, after: int = 16) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(8, width), between, nn.Linear(after, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def reason_of(model: nn.Module, group: str = "first", shape: tuple[int, ...] = (2, 5, 8)) -> str:
    found = analyse(model.eval(), (torch.randn(shape),)).groups[group]
    assert bool(found.reason) != found.prunable
    return found.reason


class Times(nn.Module):
    """A product with a bare parameter, whose columns nobody may take."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mixing


class Scale(nn.Module):
    """A factor and a shift for each channel, one of them a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(16) + 0.5)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.factor + self.shift)


class Call(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_bare_parameters_along_the_channels_follow():
    group = analyse(Net(Scale()), (torch.randn(2, 8),)).groups["first"]
    assert group.prunable
    assert [(slab.path, slab.axis) for slab in group.slabs] == [("between.factor", 0), ("between.shift", 0)]


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (Times(), ""),
        (nn.Softmax(-1), "mixed by softmax"),
        (Call(lambda x: x.cumsum(-1)), "mixed by cumsum"),
        (Call(lambda x: torch.fft.rfft(x).abs().repeat(1, 1, 2)[..., :16]), "no layer reads its channels"),
        (Call(lambda x: x + torch.arange(16.0)), ""),
        (Call(lambda x: x + x.sum((0, 1)).prod() * torch.arange(16.0)), "summed up at prod"),
        (Call(lambda x: x[..., :8].repeat(1, 1, 2)), ""),
        (Call(lambda x: x.chunk(2, -1)[0].repeat(1, 1, 2)), ""),
        (Call(lambda x: x.reshape(2, 80)[:, :80].reshape(2, 5, 16)), ""),
        (Call(lambda x: x * x.prod(-1, keepdim=True)), "summed up at prod"),
    ],
)
def test_what_mixes_channels_is_named(between, why):
    reason = reason_of(Net(between))
    assert re.search(why, reason), reason
    assert bool(reason) == bool(why)


def test_frozen_weights_can_be_narrowed_all_the_same():
    assert reason_of(Net(nn.ReLU()).requires_grad_(False)) == ""


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_computed_weight_is_a_weight(norm):
    model = Net(nn.ReLU()).eval()
    norm(model.last)
    graph = analyse(model, (torch.randn(2, 8),))
    assert "last" in graph.layers
    assert graph.groups["first"].prunable


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_cannot_be_copied_is_read_all_the_same():
    model = Net(nn.ReLU()).eval()
    nn.utils.weight_norm(model.last)
    assert analyse(model, (torch.randn(2, 8),)).groups["first"].prunable


def test_tied_weights_are_named():
    class Tied(nn.Module):
        """Input embedding and output layer share one matrix, as language models have it."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(self.embed(x))))

    graph = analyse(Tied().eval(), (torch.randint(0, 20, (2, 6)),))
    assert set(graph.layers) == {"body", "head"}


def test_fixed_numbers_of_a_reshape_follow():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x).view(x.shape[0], x.shape[1], 4, 4).transpose(1, 2)
            return self.out((y @ y.transpose(-2, -1) @ y).transpose(1, 2).reshape(x.shape[0], x.shape[1], 16))

    group = analyse(Fixed().eval(), (torch.randn(2, 5, 8),)).groups["q"]
    assert group.prunable, group.reason
    assert group.width == 4


def test_the_feature_size_of_a_single_head_stays():
    """Its square root divides the scores: a narrower head would be another attention."""

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))

    graph = analyse(Single().eval(), (torch.randn(2, 5, 8),))
    assert "scale" in graph.groups["q"].reason
    assert graph.groups["v"].prunable


def test_groups_of_one_unit_have_nothing_to_lose():
    assert "single" in reason_of(Net(nn.ReLU(), 1, 1))


def test_control_flow_on_values_is_refused_with_its_line():
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.mean() > 0 else -x

    with pytest.raises(ExportError, match=r"return x if x\.mean"):
        analyse(Net(Branch()), (torch.randn(2, 8),))
