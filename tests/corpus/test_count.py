"""The denominator of the corpus's shares is what can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from corpus.count import count


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


# name: (what is computed of [2, 6, 10] or [2, 6, 10, 10], layers, shape, products by weights, products of inputs)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[nn.Module, ...], tuple[int, ...], int, int]] = {
    "linear": (lambda m, x: m.layers[0](x), (nn.Linear(10, 7),), (2, 6, 10), 2 * 6 * 10 * 7, 0),
    "a parameter's product": (lambda m, x: m.weight @ x, (), (2, 6, 10), 2 * 8 * 6 * 10, 0),
    "einsum": (lambda m, x: torch.einsum("oc,bct->bot", m.weight, x), (), (2, 6, 10), 2 * 8 * 6 * 10, 0),
    "grouped convolution": (
        lambda m, x: m.layers[0](x), (nn.Conv2d(6, 12, 3, stride=2, groups=3),), (2, 6, 10, 10), 2 * 12 * 4 * 4 * 2 * 9, 0,
    ),
    "transposed convolution": (
        lambda m, x: m.layers[0](x), (nn.ConvTranspose1d(6, 4, 3, stride=2),), (2, 6, 10), 2 * 6 * 10 * 4 * 3, 0,
    ),
    "attention": (lambda m, x: functional.scaled_dot_product_attention(x, x, x), (), (2, 6, 10), 0, 2 * 6 * 6 * 20),
    "attention spelt out": (lambda m, x: (x @ x.mT).softmax(-1) @ x, (), (2, 6, 10), 0, 2 * 6 * 6 * 20),
    "a weight computed from weights": (
        lambda m, x: functional.linear(x, torch.tanh(m.layers[0].weight)), (nn.Linear(10, 7),), (2, 6, 10), 2 * 6 * 10 * 7, 0,
    ),
    "a constant product": (lambda m, x: x + (m.weight @ m.weight.T).sum(), (), (2, 6, 10), 0, 0),
    # the first of six steps starts from zeros, whose product is a constant
    "lstm": (
        lambda m, x: m.layers[0](x)[0], (nn.LSTM(10, 4, batch_first=True),), (2, 6, 10), 2 * 16 * (6 * 10 + 5 * 4), 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name: str) -> None:
    function, layers, shape, weights, activations = CASES[name]
    found = count(Function(function, *layers).eval(), (torch.randn(shape),))
    assert (found.weights, found.activations) == (weights, activations)
