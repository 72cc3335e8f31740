"""Attention as one kernel: against torch in double precision, whatever its sizes, and found in models as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from emulated import run_function
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocomp.compiler.build import build
from autocomp.devices.local import LocalDevice
from autocomp.hardware.profile import Profile, load_profile
from autocomp.kernels.attention import AttentionSpec, attention
from autocomp.tuning.timers import compile_function

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 33, 50, 64, 100]


@pytest.fixture(scope="module", params=["x86-host", "x86-64-v3"])
def profile(request: pytest.FixtureRequest) -> Profile:
    return load_profile(request.param)


@st.composite
def specs(draw: st.DrawFn, most: int = max(SIZES)) -> AttentionSpec:
    sizes = st.sampled_from([size for size in SIZES if size <= most])
    lead = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple))
    rows, columns, depth, width = (draw(sizes) for _ in range(4))
    bias_lead, bias_rows = (), 0
    if draw(st.booleans()):
        bias_lead = tuple(draw(st.sampled_from([1, size])) for size in lead)
        bias_rows = draw(st.sampled_from([1, rows]))
    scale = draw(st.sampled_from([1.0, depth**-0.5, -2.0]))
    return AttentionSpec(lead, rows, columns, depth, width, draw(st.booleans()), scale, bias_lead, bias_rows)


def operands(spec: AttentionSpec, masked: bool) -> list[np.ndarray]:
    """Queries, keys, values and the bias; ``masked``: of half of the columns, -infinity."""
    rng = np.random.default_rng(spec.rows * spec.columns)
    keys = (spec.columns, spec.depth) if spec.transposed else (spec.depth, spec.columns)
    shapes = [(spec.rows, spec.depth), keys, (spec.columns, spec.width)]
    arrays = [rng.standard_normal((*spec.lead, *shape)) for shape in shapes]
    if spec.bias_rows:
        bias = rng.standard_normal((*spec.bias_lead, spec.bias_rows, spec.columns))
        if masked:
            bias[..., spec.columns // 2 + 1 :] = -np.inf
        arrays.append(bias)
    return [array.astype("float32") for array in arrays]


def run(spec: AttentionSpec, arrays: list[np.ndarray], profile: Profile) -> np.ndarray:
    import tvm
    from tvm.target import Target

    flat = [tvm.runtime.tensor(array.reshape(-1, *array.shape[-2:])) for array in arrays]
    result = tvm.runtime.tensor(np.full((spec.heads, spec.rows, spec.width), np.nan, "float32"))
    compile_function(attention(spec, profile), Target(dict(profile.target)))(*flat, result)
    return result.numpy().reshape(*spec.lead, spec.rows, spec.width)


def exactly(spec: AttentionSpec, arrays: list[np.ndarray]) -> np.ndarray:
    queries, keys, values, *bias = (torch.from_numpy(array).double() for array in arrays)
    scores = queries @ (keys.mT if spec.transposed else keys) * spec.scale
    result: np.ndarray = (torch.softmax(sum(bias, scores), -1) @ values).numpy()
    return result


@QUICK
@given(spec=specs(), masked=st.booleans())
def test_equals_float64(profile: Profile, spec: AttentionSpec, masked: bool) -> None:
    arrays = operands(spec, masked)
    np.testing.assert_allclose(run(spec, arrays, profile), exactly(spec, arrays), rtol=1e-4, atol=1e-5)


@settings(QUICK, max_examples=5)
@given(spec=specs())
def test_two_threads_compute_the_same(profile: Profile, spec: AttentionSpec) -> None:
    arrays = operands(spec, masked=False)
    np.testing.assert_array_equal(run(spec, arrays, replace(profile, cores=2)), run(spec, arrays, profile))


@settings(QUICK, max_examples=4)
@given(spec=specs(most=17), masked=st.booleans())
def test_equals_float64_on_arm(spec: AttentionSpec, masked: bool) -> None:
    arrays, profile = operands(spec, masked), load_profile("cortex-a76")
    flat = [array.reshape(-1, *array.shape[-2:]) for array in arrays]
    found = run_function(attention(spec, profile), flat, profile).reshape(*spec.lead, spec.rows, spec.width)
    np.testing.assert_allclose(found, exactly(spec, arrays), rtol=1e-4, atol=1e-5)


def test_scores_of_finite_masks_and_large_ones(profile: Profile) -> None:
    """A row of the lowest float32 only, as some masks have it, weighs all columns alike; large scores do not overflow."""
    spec = AttentionSpec((1,), 3, 21, 4, 5, True, bias_lead=(1,), bias_rows=3)
    queries, keys, values, bias = operands(spec, masked=False)
    bias[0, 0], bias[0, 1, 4:] = np.finfo("float32").min, np.finfo("float32").min
    bias[0, 2, 7] = 1e5
    arrays = [queries, keys, values, bias]
    np.testing.assert_allclose(run(spec, arrays, profile), exactly(spec, arrays), rtol=1e-4, atol=1e-5)


HEADS, ROWS, DEPTH = 2, 12, 8


class Attention(nn.Module):
    """Queries, keys and values of a sequence, and what is made of them."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.parts = nn.Linear(HEADS * DEPTH, 3 * HEADS * DEPTH)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x).view(1, ROWS, 3, HEADS, DEPTH).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v)


def weigh(scores: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ values


CAUSAL = torch.full((ROWS, ROWS), -math.inf).triu(1)
BIAS = torch.randn(HEADS, ROWS, ROWS, generator=torch.Generator().manual_seed(0))
FUSED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "torch's": nn.functional.scaled_dot_product_attention,
    "causal": lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    "scaled": lambda q, k, v: weigh(q @ k.mT / math.sqrt(DEPTH), v),
    "masked": lambda q, k, v: weigh(q @ k.mT * 0.3 + CAUSAL, v),
    "two biases, then scaled": lambda q, k, v: weigh((q @ k.mT + BIAS + CAUSAL) * 0.3, v),
    "bias first": lambda q, k, v: weigh(BIAS + q @ k.mT, v),
    "a bias of a product": lambda q, k, v: weigh(q @ k.mT + v @ k.mT, v),
    "by batches": lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT), -1), v.flatten(0, 1)),
    "filled": lambda q, k, v: weigh((q @ k.mT).masked_fill(CAUSAL < 0, -math.inf), v),
    "where": lambda q, k, v: weigh(torch.where(CAUSAL == 0, q @ k.mT * 0.3, torch.finfo(torch.float32).min), v),
    "keys for all heads": lambda q, k, v: weigh(q @ k[:, :1].mT, v),
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bihd", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k), -1), v),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_found_however_it_is_written(name: str, device: LocalDevice) -> None:
    compiled, model, x = compile_attention(FUSED[name], device)
    assert [kernel.operator for kernel in compiled.kernels].count("attention") == 1
    assert not [kernel for kernel in compiled.kernels if kernel.name.startswith("softmax")]
    torch.testing.assert_close(compiled.run(x), model(x), rtol=1e-4, atol=1e-5)


def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v + weights.sum()


def scores_too(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return weigh(scores, v) + scores.amax()


NOT_FUSED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "weights are read elsewhere": both,
    "scores are read elsewhere": scores_too,
    "another axis": lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v,
    "a function of scores": lambda q, k, v: weigh(torch.tanh(q @ k.mT), v),
    "filled with a number that counts": lambda q, k, v: weigh((q @ k.mT).masked_fill(CAUSAL < 0, -1.0), v),
    "one query": lambda q, k, v: weigh(q[:, :, :1] @ k.mT, v),
    "values are scores": lambda q, k, v: v.mT @ torch.softmax(q @ k.mT, -1),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_is_none_stays(name: str, device: LocalDevice) -> None:
    compiled, model, x = compile_attention(NOT_FUSED[name], device)
    assert "attention" not in [kernel.operator for kernel in compiled.kernels]
    torch.testing.assert_close(compiled.run(x), model(x), rtol=1e-4, atol=1e-5)


def compile_attention(attend: Callable[[Tensor, Tensor, Tensor], Tensor], device: LocalDevice):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model, x = Attention(attend).eval(), torch.randn(1, ROWS, HEADS * DEPTH)
    with torch.no_grad():
        return build(model, (x,), device.profile, device.tuner), model, x
