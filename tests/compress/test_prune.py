"""Removal, orderings and the least-squares update."""

from __future__ import annotations

import copy
from itertools import pairwise

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import pipeline
from torch import nn

from autocomp.compress import prune
from autocomp.compress.prune import keep, least_squares, output_error, spread
from autocomp.database import orders
from autocomp.graph.removal import removed
from autocomp.layers.narrow import take

torch.set_num_threads(1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_a_pruned_model_equals_the_masked_one_before_the_update(seed, data):
    """Smaller tensors compute what the full model computes when the consumers' columns are zero."""
    made = pipeline(data.draw(st.sampled_from(["plain", "depthwise", "flat", "odd"])))
    graph, x = made.graph, nets.images(3)
    generator = torch.Generator().manual_seed(seed)
    name = data.draw(st.sampled_from([group.name for group in graph.groups.values() if group.prunable]))
    group = graph.groups[name]
    count = data.draw(st.integers(1, group.width - 1))
    kept = torch.randperm(group.width, generator=generator)[:count].sort().values
    small, masked = copy.deepcopy(made.model), copy.deepcopy(made.model)
    removed(made.model, group, kept).apply(small)
    for member in group.consumers:
        columns = group.columns_kept(member, kept)
        weight = masked.get_submodule(member).weight.data
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[columns] = False
        weight[:, gone] = 0
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_the_update_never_hurts(seed, data):
    generator = torch.Generator().manual_seed(seed)
    k, o = data.draw(st.integers(2, 24)), data.draw(st.integers(1, 6))
    x = torch.randn(200, k, generator=generator, dtype=torch.float64) @ torch.randn(
        k, k, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(o, k, generator=generator, dtype=torch.float64)
    covariance = x.T @ x / len(x)
    columns = torch.randperm(k, generator=generator)[: data.draw(st.integers(1, k))].sort().values
    updated = least_squares(weight, covariance, columns)

    def error(small):
        difference = weight.clone()
        difference[:, columns] -= small
        return output_error(difference, prune.damped(covariance))

    assert bool((error(updated) <= error(weight[:, columns]) * (1 + 1e-9) + 1e-9).all())
    if len(columns) == k:
        torch.testing.assert_close(updated, weight)


def test_output_error_is_the_mean_squared_difference():
    x = torch.randn(500, 6, dtype=torch.float64)
    difference = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(output_error(difference, x.T @ x / 500), (x @ difference.T).square().mean(0))


def test_orderings_are_nested_permutations_and_the_better_one_wins():
    made = pipeline()
    for group in made.graph.groups.values():
        widths = made.space.widths[group.name]
        order, by = orders.order_group(made.model, made.graph, made.statistics, group, widths)
        assert sorted(order.tolist()) == list(range(group.width))
        assert by in orders.ORDERINGS
        for larger, smaller in pairwise(widths):
            assert set(keep(order, smaller).tolist()) <= set(keep(order, larger).tolist())


def reader_of(weight, covariance, fisher, block):
    units = torch.arange(weight.shape[1] // block)
    blocks = tuple(torch.arange(unit * block, (unit + 1) * block) for unit in units.tolist())
    return orders.Reader(weight, covariance, fisher, units, blocks)


def test_obs_removes_the_channel_that_others_explain():
    """Channel 2 is the sum of channels 0 and 1: whichever goes first, the two that are left can make up for it."""
    x = torch.randn(400, 3, dtype=torch.float64)
    x[:, 2] = x[:, 0] + x[:, 1]

    weight = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0]], dtype=torch.float64)
    reader = reader_of(weight, x.T @ x / 400, torch.ones(2, dtype=torch.float64), 1)
    order = orders.obs_order([reader], 3, 1)
    # Not zero: the damping of H pulls the update short of the exact solution.
    assert float(reader.errors(order)[2]) < 0.02 * float(output_error(weight, reader.covariance).sum())


def test_obs_saliency_is_the_error_of_the_removal():
    x = torch.randn(300, 8, dtype=torch.float64)
    weight, fisher = torch.randn(4, 8, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    reader = reader_of(weight, x.T @ x / 300, fisher, 2)
    state = orders._Obs(reader)
    saliency = torch.zeros(4, dtype=torch.float64)
    state.add_saliency(saliency)
    for channel in range(4):
        left = torch.tensor([c for c in range(4) if c != channel])
        columns = spread(left, 2)
        difference = weight.clone()
        difference[:, columns] -= least_squares(weight, reader.covariance, columns)
        expected = (output_error(difference, prune.damped(reader.covariance)) * fisher).sum()
        torch.testing.assert_close(saliency[channel], expected)
    state.remove(torch.tensor([1]))
    torch.testing.assert_close(
        state.weight[:, state.left], least_squares(weight, reader.covariance, spread(torch.tensor([0, 2, 3]), 2))
    )
    saliency.zero_()
    state.add_saliency(saliency)
    assert saliency[1] == 0
    assert bool((saliency[[0, 2, 3]] > 0).all())


@pytest.mark.parametrize("block", [1, 3])
def test_one_factorisation_gives_the_error_at_every_width(block):
    units, generator = 7, torch.Generator().manual_seed(block)
    x = torch.randn(200, units * block, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, units * block, generator=generator, dtype=torch.float64)
    fisher, order = torch.rand(5, generator=generator, dtype=torch.float64), torch.randperm(units, generator=generator)
    reader = reader_of(weight, x.T @ x / 200, fisher, block)
    errors, damped = reader.errors(order), prune.damped(reader.covariance)
    assert errors.shape == (units + 1,)
    for width in range(1, units + 1):
        columns = spread(keep(order, width), block)
        difference = weight.clone()
        difference[:, columns] -= least_squares(weight, reader.covariance, columns)
        torch.testing.assert_close(errors[width], (output_error(difference, damped) * fisher).sum())
    torch.testing.assert_close(errors[0], (output_error(weight, damped) * fisher).sum())


def test_obs_goes_on_in_smaller_tensors():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 24, generator=generator, dtype=torch.float64)
    reader = reader_of(weight, x.T @ x / 200, torch.ones(4, dtype=torch.float64), 2)
    state = orders._Obs(reader)
    for gone in ([1, 5], [0], [3, 11], [7]):
        state.remove(torch.tensor(gone))
    assert len(state.left) < 24, "copied into smaller tensors"
    left = spread(torch.tensor([2, 4, 6, 8, 9, 10]), 2)
    torch.testing.assert_close(state.weight[:, state.left], least_squares(weight, reader.covariance, left))


def test_take_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="LayerNorm"):
        take(nn.LayerNorm(4), torch.tensor([0]))


def test_an_input_that_never_changes_is_no_obstacle():
    weight = torch.randn(2, 4, dtype=torch.float64)
    updated = least_squares(weight, torch.zeros(4, 4, dtype=torch.float64), torch.tensor([0, 2]))
    torch.testing.assert_close(updated, weight[:, [0, 2]])
