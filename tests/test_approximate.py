"""Groups whose channels a norm or a mean takes together: it is computed over those that are left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from autocomp.graph.analyse import analyse
from autocomp.graph.canonical import canonical
from autocomp.graph.graph import Graph, Group
from autocomp.graph.program import CanonicalModel
from autocomp.graph.removal import removed, reordered, swapped
from autocomp.hardware.profile import load_profile
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile
from autocomp.space.space import Space

torch.set_num_threads(1)
WIDTH = 32


class Scaled(nn.Module):
    """What all channels together give scales each of them; ``weight`` and ``bias`` are theirs."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def root_mean_square(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def response(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Global response normalisation (Woo et al. 2023, arXiv:2301.00808) over [N, L, C]."""
    size = x.norm(p=2, dim=1, keepdim=True)
    return x + bias + weight * x * (size / (size.mean(-1, keepdim=True) + 1e-6))


def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * weight + bias


def gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    both = torch.stack([x.mean(-1), x.amax(-1)], -1)
    return x * both.sum(-1, keepdim=True).sigmoid()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "rms_norm": lambda: nn.RMSNorm(WIDTH),
    "by hand": lambda: Scaled(by_hand),
    "root mean square": lambda: Scaled(root_mean_square),
    "response": lambda: Scaled(response),
    "gate": lambda: Scaled(gate),
    "one group": lambda: Swapped(nn.GroupNorm(1, WIDTH)),
}


class Swapped(nn.Module):
    """A module that takes channels second, given them last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Stream(nn.Module):
    """A residual stream of two blocks, each behind its norm."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.position = nn.Parameter(torch.randn(4, WIDTH))
        self.norms = nn.ModuleList(norm() for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 64) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(64, WIDTH) for _ in range(2))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.position
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            x = x + down(up(norm(x)).relu())
        return self.last(self.norms[-1](x))


def analysed(model: nn.Module, *inputs: Tensor) -> tuple[CanonicalModel, Graph]:
    plain = canonical(model.eval(), inputs)
    return plain, analyse(plain, inputs)


def stream(name: str) -> tuple[CanonicalModel, Group, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5)
    plain, graph = analysed(Stream(NORMS[name]), x)
    group = graph.groups["first"]
    assert group.prunable, group.reason
    assert group.approximate
    return plain, group, x


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_channels_that_are_there_twice_can_go(name: str) -> None:
    """The second half of the channels made copies of the first: without it, and with twice the weight on the first, nothing changes."""
    model, group, x = stream(name)
    half = WIDTH // 2
    twice = [unit % half for unit in range(WIDTH)]

    def copied(units: tuple[int, ...]) -> Tensor:
        place = {unit: index for index, unit in enumerate(units)}
        return torch.tensor([place[twice[unit]] for unit in units])

    for layer in group.producers:
        module = model.get_submodule(layer)
        module.weight.copy_(module.weight[copied(group.rows[layer])])
        module.bias.copy_(module.bias[copied(group.rows[layer])])
    for path, axis, units in group.slabs:
        owner, _, last = path.rpartition(".")
        tensor = getattr(model.get_submodule(owner), last)
        tensor.copy_(tensor.index_select(axis, copied(units)))
    expected = model(x)
    with swapped(model, removed(model, group, torch.arange(half))):
        for layer in group.consumers:
            module, columns = model.get_submodule(layer), torch.tensor(group.columns[layer])
            assert module.weight.shape[1] == half
            module.weight.zero_()
        assert not torch.allclose(model(x), expected, atol=1e-3)
    for layer in group.consumers:
        module, columns = model.get_submodule(layer), torch.tensor(group.columns[layer])
        kept, gone = columns < half, columns >= half
        module.weight[:, kept] += module.weight[:, gone]
        module.weight[:, gone] = 0
    with swapped(model, removed(model, group, torch.arange(half))):
        assert torch.allclose(model(x), expected, atol=1e-4)


@given(st.integers(0, 10**6), st.sampled_from(sorted(NORMS)))
@settings(max_examples=10, deadline=None)
def test_any_order_and_any_width(seed: int, name: str) -> None:
    model, group, x = stream(name)
    torch.manual_seed(seed)
    expected = model(x)
    with swapped(model, reordered(model, group, torch.randperm(WIDTH).tolist())):
        assert torch.allclose(model(x), expected, atol=1e-4)
    kept = torch.randperm(WIDTH)[: 1 + seed % (WIDTH - 1)].sort().values
    with swapped(model, removed(model, group, kept)):
        found = model(x)
        assert found.shape == expected.shape
        assert bool(found.isfinite().all())
    assert torch.equal(model(x), expected)


class Other(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(5, WIDTH), nn.Linear(width, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("function", "width", "why"),
    [
        (lambda x: torch.stack([x.mean(-1), x.amax(-1)], -1), 2, "summed up"),  # no channel of these is scaled
        (lambda x: x * x.logsumexp(-1, keepdim=True), WIDTH, "summed up"),
        (lambda x: x.softmax(-1), WIDTH, "mixed by softmax"),
        (lambda x: x * x.argmax(-1, keepdim=True), WIDTH, ""),
    ],
)
def test_what_does_not_scale_the_channels_keeps_them(
    function: Callable[[Tensor], Tensor], width: int, why: str
) -> None:
    _, graph = analysed(Other(function, width), torch.randn(2, 4, 5))
    group = graph.groups["first"]
    assert not group.prunable
    assert why in group.reason


def test_the_unit_sphere() -> None:
    _, graph = analysed(Other(lambda x: functional.normalize(x, dim=-1)), torch.randn(2, 4, 5))
    assert graph.groups["first"].prunable
    assert "norm" in graph.groups["first"].approximate


def space_of(graph: Graph, **keys: bool) -> Space:
    rules = [Rule(layers="*", keep=[1.0, 0.5])]
    return build_space(graph, SpaceFile(format_version=1, rules=rules, **keys), load_profile("x86-host"))


def test_approximate_groups_are_offered_where_there_are_no_others_or_when_asked() -> None:
    torch.manual_seed(0)
    _, graph = analysed(Stream(NORMS["layer_norm"]), torch.randn(2, 4, 5))
    space = space_of(graph)
    assert space.widths["first"] == (WIDTH,)
    assert [r.reason for r in space.refused if r.subject == "first" and "layer_norm" in r.reason]
    for key in ("approximate", "rotate"):
        space = space_of(graph, **{key: True})
        assert len(space.widths["first"]) == 2
        uniform = space.uniform(0.5)
        assert uniform.widths["first"] == WIDTH  # a recipe that treats all groups alike is none for these
        assert uniform.widths["ups.0"] == 32
    _, graph = analysed(Other(lambda x: functional.normalize(x, dim=-1)), torch.randn(2, 4, 5))
    assert space_of(graph).uniform(0.5).widths["first"] == WIDTH // 2
