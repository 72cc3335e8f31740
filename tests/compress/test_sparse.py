"""Masks of single weights: what is kept, what it costs, and that sizes are those of the stored form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import pipeline

from autocomp.accuracy.sensitivity import masks
from autocomp.compress.prune import damped, output_error
from autocomp.compress.sparse import (
    bitmap_bytes,
    csr_bytes,
    pack_bitmap,
    pattern_mask,
    saliency,
    study,
    unpack_bitmap,
    unstructured_mask,
    updated,
)

torch.set_num_threads(1)
F64 = torch.float64


def problem(seed, outputs=6, columns=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=F64) @ torch.randn(
        columns, columns, generator=generator, dtype=F64
    )
    return torch.randn(outputs, columns, generator=generator), x.T @ x / len(x)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), share=st.floats(0.1, 1.0))
def test_the_update_never_does_worse_than_masking(seed, share):
    weight, covariance = problem(seed)
    mask = unstructured_mask(saliency(weight, covariance), share)
    h = damped(covariance)
    after = updated(weight, covariance, mask)
    assert bool((after[~mask] == 0).all())
    masked = output_error(weight.double() * ~mask, h)
    assert bool((output_error(weight.double() - after, h) <= masked * (1 + 1e-9) + 1e-12).all())
    if bool(mask.all()):
        torch.testing.assert_close(after, weight.double())


def test_obs_removes_the_weight_that_costs_least():
    """For one weight of one row, the saliency is the error that removing it causes (to the factor that all share)."""
    weight, covariance = problem(3, outputs=1, columns=8)
    costs = []
    for k in range(8):
        mask = torch.ones(1, 8, dtype=torch.bool)
        mask[0, k] = False
        costs.append(float(output_error(weight.double() - updated(weight, covariance, mask), damped(covariance))))
    torch.testing.assert_close(saliency(weight, covariance)[0], torch.tensor(costs, dtype=F64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 16), (1, 4, 15), (4, 8, 20)])
def test_patterns_keep_n_of_every_m(n, m, columns):
    weight, covariance = problem(1, columns=columns)
    mask = pattern_mask(saliency(weight, covariance), n, m)
    for start in range(0, columns, m):
        assert bool((mask[:, start : start + m].sum(1) == min(n, columns - start)).all())


@pytest.mark.filterwarnings("ignore:Sparse CSR")  # torch's own form, only read for its size
@given(seed=st.integers(0, 999), outputs=st.integers(1, 9), columns=st.integers(1, 21))
@settings(max_examples=25, deadline=None)
def test_bitmaps_read_back_and_are_as_large_as_said(seed, outputs, columns):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, columns, generator=generator)
    mask = torch.rand(outputs, columns, generator=generator) < 0.4
    bits, values = pack_bitmap(weight, mask)
    assert torch.equal(unpack_bitmap(bits, values, (outputs, columns)), weight * mask)
    assert bits.nbytes + values.nbytes == bitmap_bytes(mask)
    rows = (weight * mask).to_sparse_csr()
    stored = rows.values().nbytes + rows.col_indices().numel() * 2 + rows.crow_indices().numel() * 4
    assert csr_bytes(mask) == stored  # columns in 16 bits, row starts in 32


def test_a_study_orders_as_it_should():
    weight, covariance = problem(0, 8, 32)
    points = study("layer", weight, covariance, torch.ones(8, dtype=F64))
    free = [point for point in points if point.pattern == "unstructured"]
    assert [point.error for point in free] == sorted(point.error for point in free)
    half = next(point for point in points if point.pattern == "2:4")
    assert half.kept == 0.5
    assert half.error > next(point.error for point in free if point.kept == 0.5)
    assert half.positions is not None
    assert half.bytes <= min(half.csr, half.bitmap)
    with pytest.raises(ValueError, match="one Hessian"):
        study("depthwise", weight, torch.zeros(8, 9, 9), torch.ones(8))


def test_every_ungrouped_layer_of_a_model_is_studied():
    made = pipeline()
    rows = [row for found in masks(made.model, made.graph, made.statistics) for row in found]
    studied = {name for name, layer in made.graph.layers.items() if layer.conv_groups == 1 and not layer.fixed}
    assert {row.subject for row in rows} == studied
    for name in studied:
        by_option = {row.option: row for row in rows if row.subject == name}
        assert {"75%", "50%", "25%", "2:4", "1:4", "4:8"} <= by_option.keys()
        assert by_option["75%"].error <= by_option["50%"].error <= by_option["25%"].error
        assert by_option["1:4"].share < by_option["2:4"].share < 1
        assert {row.kind for row in by_option.values()} == {"mask"}
