"""Every structure that can be pruned: its groups are found, removal is exact, and candidates are stitched rightly."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, make, samples
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.graph.analyse import analyse
from autocomp.graph.graph import balanced
from autocomp.graph.removal import masked, removed

torch.set_num_threads(1)
ANALYSED: dict = {}


def analysed(name):
    if name not in ANALYSED:
        model = make(name)
        ANALYSED[name] = model, analyse(model, (samples(name, 1),))
    return ANALYSED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_group_is_found_and_offered(name):
    _, graph = analysed(name)
    _, subject, width = FAMILIES[name]
    group = graph.groups[subject]
    assert group.prunable, group.reason
    assert group.width == width
    reasons = {g.name: g.reason for g in graph.groups.values() if not g.prunable}
    allowed = ("output", "fixed width", "normalised", "summed")
    assert all(any(word in why for word in allowed) for why in reasons.values()), reasons


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(list(FAMILIES)), seed=st.integers(0, 2**31), data=st.data())
def test_a_smaller_model_equals_the_masked_one(name, seed, data):
    """Whatever units go, of one group or of several at once."""
    model, graph = analysed(name)
    small, full = copy.deepcopy(model), copy.deepcopy(model)
    prunable = [group for group in graph.groups.values() if group.prunable]
    chosen = data.draw(st.lists(st.sampled_from(prunable), min_size=1, unique_by=lambda group: group.name))
    generator = torch.Generator().manual_seed(seed)
    for group in chosen:
        kept = balanced(group, data.draw(st.integers(1, group.width - 1)), generator)
        removed(small, group, kept).apply(small)
        masked(full, group, kept).apply(full)
    x = samples(name, 3)
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in full.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small(x), full(x), rtol=1e-4, atol=1e-5)
