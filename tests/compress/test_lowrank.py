"""Low-rank factors: full rank is dense, errors fall with rank, the data decide what is kept."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocomp.compress.lowrank import svd, tucker2
from autocomp.compress.prune import damped, output_error

torch.set_num_threads(1)
F64 = torch.float64


def problem(seed, outputs, channels, taps):
    generator = torch.Generator().manual_seed(seed)
    k = channels * taps
    x = torch.randn(3 * k, k, generator=generator, dtype=F64) @ torch.randn(k, k, generator=generator, dtype=F64)
    weight = torch.randn(outputs, k, generator=generator, dtype=F64)
    return weight, x.T @ x / len(x), torch.rand(outputs, generator=generator, dtype=F64) + 0.1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), outputs=st.integers(1, 9), k=st.integers(1, 12))
def test_full_rank_svd_equals_dense(seed, outputs, k):
    weight, covariance, fisher = problem(seed, outputs, k, 1)
    torch.testing.assert_close(svd(weight, covariance, fisher, min(outputs, k)).product, weight, rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), outputs=st.integers(1, 6), channels=st.integers(1, 5))
def test_full_rank_tucker_equals_dense(seed, outputs, channels):
    weight, covariance, fisher = problem(seed, outputs, channels, 4)
    full = tucker2(weight, covariance, fisher, 4, (channels, min(outputs, channels * 4)))
    torch.testing.assert_close(full.product, weight, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 5))
def test_svd_is_the_best_of_its_rank_on_the_data(seed, rank):
    """It beats the plain SVD of the weights in the error it is made for."""
    weight, covariance, fisher = problem(seed, 8, 6, 1)

    def error(matrix):
        return float((output_error(weight - matrix, damped(covariance)) * fisher).sum())

    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ vt[:rank]
    best = svd(weight, covariance, fisher, rank)
    assert error(best.product) <= error(plain) * (1 + 1e-9)
    assert best.parts[0].shape == (rank, 6)
    assert best.parts[1].shape == (8, rank)


def test_tucker_errors_fall_with_rank_and_beat_the_data_free_form():
    weight, covariance, fisher = problem(0, 12, 8, 9)

    def error(matrix):
        return float((output_error(weight - matrix, damped(covariance)) * fisher).sum())

    errors = [error(tucker2(weight, covariance, fisher, 9, (r, r)).product) for r in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    free = tucker2(weight, torch.eye(72, dtype=F64), torch.ones(12, dtype=F64), 9, (4, 4))
    assert errors[1] < error(free.product)


def test_stages_compose():
    weight, covariance, fisher = problem(1, 6, 4, 9)
    factors = tucker2(weight, covariance, fisher, 9, (3, 4))
    x = torch.randn(5, 4, 9, dtype=F64)
    features = torch.einsum("rct,bc->rbt", x, factors.parts[0]).flatten(1)
    torch.testing.assert_close(features @ factors.after(1).T, x.flatten(1) @ factors.product.T)
    torch.testing.assert_close(factors.after(2), factors.parts[2])
