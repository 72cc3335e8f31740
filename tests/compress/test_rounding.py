"""Rounding with error feedback and codebooks: never worse than nearest, sizes exact, singular Hessians damped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.compress import kmeans
from autocomp.compress.rounding import Metric, round_levels
from autocomp.compress.scales import quantise_weight
from autocomp.layers import codebook

torch.set_num_threads(1)
F64 = torch.float64


def problem(seed, blocks, outputs, columns, rank=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(blocks, rank or 3 * columns, columns, generator=generator, dtype=F64)
    mixed = x @ torch.randn(columns, columns, generator=generator, dtype=F64)
    return torch.randn(outputs, columns, generator=generator, dtype=F64), Metric(
        mixed.transpose(1, 2) @ mixed / x.shape[1]
    )


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 5, 7), (1, 3, 130), (4, 4, 9), (2, 6, 12)]),
    bits=st.sampled_from([4, 8]),
    singular=st.booleans(),
)
def test_feedback_is_never_worse_than_nearest(seed, shape, bits, singular):
    blocks, outputs, columns = shape
    weight, metric = problem(seed, blocks, outputs, columns, rank=1 if singular else None)
    top = 2 ** (bits - 1) - 1
    grid = (weight.abs().amax(1) / top)[:, None].expand(-1, columns)
    levels = round_levels(weight, grid, -top, top, metric)
    assert levels.dtype == torch.int8
    assert int(levels.abs().max()) <= top
    nearest = (weight / grid).round()
    ours, theirs = metric.error(levels * grid - weight), metric.error(nearest * grid - weight)
    assert bool((ours <= theirs * (1 + 1e-9) + 1e-15).all())


def test_feedback_gains_where_inputs_are_correlated():
    weight, metric = problem(0, 1, 16, 64)
    grid = (weight.abs().amax(1) / 7)[:, None].expand(-1, 64)
    ours = metric.error(round_levels(weight, grid, -7, 7, metric) * grid - weight).sum()
    assert ours < 0.5 * metric.error((weight / grid).round() * grid - weight).sum()


def test_independent_inputs_are_rounded_to_nearest():
    weight, _ = problem(1, 1, 6, 20)
    grid = (weight.abs().amax(1) / 127)[:, None].expand(-1, 20)
    levels = round_levels(weight, grid, -127, 127, Metric(torch.eye(20, dtype=F64)))
    assert torch.equal(levels, (weight / grid).round().to(torch.int8))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_eight_bits_to_nearest_are_off_by_half_a_step(seed):
    weight = torch.randn(5, 11, generator=torch.Generator().manual_seed(seed))
    levels, scale = quantise_weight(weight)
    assert bool(
        (
            (levels.double() * scale.double()[:, None] - weight.double()).abs() <= scale.double()[:, None] * 0.5000001
        ).all()
    )


@pytest.mark.parametrize(("dim", "stages"), [(1, 1), (2, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize("blocks", [1, 8])
def test_codebooks_store_what_they_say_and_beat_the_zero_weight(dim, stages, blocks):
    weight, metric = problem(2, blocks, 16, 9 if blocks > 1 else 36)
    indices, books, scale = kmeans.fit(weight, metric, torch.ones(16, dtype=F64), dim, stages)
    runs = -(-weight.shape[1] // dim)
    assert (indices.shape, indices.dtype) == ((16, stages, runs), torch.uint8)
    assert (books.shape, books.dtype) == ((stages, 256, dim), torch.float16)
    decoded = codebook.decode(indices, books, scale, weight.shape[1])
    assert float(metric.error(decoded.double() - weight).sum()) < 0.3 * float(metric.error(weight).sum())
    again = kmeans.fit(weight, metric, torch.ones(16, dtype=F64), dim, stages)
    assert all(torch.equal(a, b) for a, b in zip((indices, books, scale), again, strict=True)), "seeded"


def test_stages_and_shorter_runs_lose_less():
    weight, metric = problem(3, 1, 64, 64)
    ones = torch.ones(64, dtype=F64)
    lost = {}
    for dim, stages in ((1, 1), (2, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 3)):
        decoded = codebook.decode(*kmeans.fit(weight, metric, ones, dim, stages), 64)
        lost[dim, stages] = float(metric.error(decoded.double() - weight).sum())
    assert lost[1, 1] < lost[2, 1] < lost[4, 1] < lost[8, 1]
    assert lost[8, 3] < lost[8, 2] < lost[8, 1]
    assert lost[4, 2] < lost[4, 1]


def test_a_weight_of_zeros_stays_zero():
    zero = torch.zeros(4, 8, dtype=F64)
    metric = Metric(torch.zeros(8, 8, dtype=F64))
    decoded = codebook.decode(*kmeans.fit(zero, metric, torch.ones(4, dtype=F64), 2, 1), 8)
    assert torch.equal(decoded, torch.zeros(4, 8))
