"""Groups whose channels a norm or a mean takes together: it is computed over those that are left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import NORMS, WIDTH, Other, Stream, analysed
from torch import Tensor
from torch.nn import functional

from autocomp.graph.graph import Graph, Group
from autocomp.graph.program import CanonicalModel
from autocomp.graph.removal import removed, reordered, swapped
from autocomp.hardware.profile import load_profile
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile
from autocomp.space.space import Space

torch.set_num_threads(1)


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
