"""Convolutions by fewer products, against float64: every shape, tile, vector length, and what is fused behind them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from emulated import run_function
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from autocomp.compiler import build
from autocomp.errors import AutocompError
from autocomp.hardware.profile import Profile, load_profile
from autocomp.kernels import templates, winograd
from autocomp.kernels.specs import ConvSpec
from autocomp.processes.outcome import Outcome
from autocomp.tuning import forms
from autocomp.tuning.store import KernelStore
from autocomp.tuning.timers import Job, compile_function
from autocomp.tuning.tune import Tuner

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
# of the largest output, by (taps, outputs of a tile): float32 sums take 1e-6 of it, and larger tiles lose digits in their transforms
BOUNDS = {
    (2, 2): 2e-6, (3, 2): 2e-6, (4, 2): 2e-5, (5, 2): 5e-5, (6, 2): 2e-4, (7, 2): 2e-4,
    (2, 4): 2e-5, (3, 4): 5e-5, (4, 4): 2e-4, (5, 4): 2e-4,
}  # fmt: skip

convolutions = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "size": st.tuples(st.integers(1, 23), st.integers(1, 23)),
        "channels": st.tuples(st.sampled_from([8, 11, 16, 20, 33]), st.sampled_from([8, 10, 16, 24, 33, 48])),
        "kernel": st.tuples(st.integers(1, 5), st.integers(1, 7)),
        "border": st.tuples(*[st.integers(0, 3)] * 4),
        "outputs": st.sampled_from(winograd.SIZES),
        "pick": st.integers(0, 60),
        "seed": st.integers(0, 1000),
    }
)


@pytest.fixture(scope="module", params=["x86-host", "x86-64-v3"])
def profile(request: pytest.FixtureRequest) -> Profile:
    return load_profile(request.param)


def spec_of(case: dict, lanes: int) -> ConvSpec | None:
    """A case's convolution, where it has output and has a form by fewer products."""
    (ci, co), (kh, kw) = case["channels"], case["kernel"]
    shape = (case["batch"], *case["size"], ci)
    (h, w), (top, left, bottom, right) = case["size"], case["border"]
    if h + top + bottom < kh or w + left + right < kw:
        return None
    spec = ConvSpec.of(shape, (co, ci, kh, kw), (1, 1), case["border"], (1, 1), 1, lanes)
    return spec if winograd.fits(spec, case["outputs"]) else None


def operands(spec: ConvSpec, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(data, OIHW weight, what they give in float64)."""
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((spec.batch, *spec.in_size, spec.in_channels)).astype("float32")
    weight = rng.standard_normal((spec.out_channels, spec.in_channels, *spec.kernel)).astype("float32")
    top, left, bottom, right = spec.padding
    picture = nn.functional.pad(torch.from_numpy(data).double().permute(0, 3, 1, 2), (left, right, top, bottom))
    exact = nn.functional.conv2d(picture, torch.from_numpy(weight).double()).permute(0, 2, 3, 1)
    return data, weight, exact.numpy()


def bound(spec: ConvSpec, outputs: int) -> float:
    return sum(BOUNDS[taps, outputs] for taps in spec.kernel if taps > 1)


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def run(spec: ConvSpec, outputs: int, arrays: Sequence[np.ndarray], profile: Profile, pick: int) -> np.ndarray:
    import tvm
    from tvm.target import Target

    function = forms.form(spec, outputs)
    anchor = templates.describe(function)
    tiles = templates.tiles(anchor, profile)
    scheduled = templates.apply(function, tiles[pick % len(tiles)], anchor, profile)
    result = tvm.runtime.tensor(np.zeros((spec.batch, *spec.out_size, spec.out_channels), "float32"))
    compile_function(scheduled, Target(dict(profile.target)))(*map(tvm.runtime.tensor, arrays), result)
    return result.numpy()


@QUICK
@given(case=convolutions)
def test_equals_float64_within_its_bound(profile: Profile, case: dict) -> None:
    spec, outputs = spec_of(case, profile.lanes), case["outputs"]
    if spec is None:
        return
    data, weight, exact = operands(spec, case["seed"])
    transformed = winograd.transformed_weight(weight, spec, outputs)
    assert transformed.shape == winograd.weight_shape(spec, outputs)
    assert error(run(spec, outputs, [data, transformed], profile, case["pick"]), exact) <= bound(spec, outputs)


@settings(QUICK, max_examples=5)
@given(case=convolutions)
def test_on_arm_equals_float64_within_its_bound(case: dict) -> None:
    profile = load_profile("cortex-a76")
    case = {**case, "size": (min(case["size"][0], 9), min(case["size"][1], 9))}
    spec, outputs = spec_of(case, profile.lanes), case["outputs"]
    if spec is None:
        return
    data, weight, exact = operands(spec, case["seed"])
    arrays = [data, winograd.transformed_weight(weight, spec, outputs)]
    assert error(run_function(forms.form(spec, outputs), arrays, profile, case["pick"]), exact) <= bound(spec, outputs)


@pytest.mark.parametrize("outputs", winograd.SIZES)
def test_weights_that_are_fetched_ahead_change_nothing(profile: Profile, outputs: int) -> None:
    spec = ConvSpec.of((1, 7, 7, 192), (256, 192, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, profile.lanes)
    function = forms.form(spec, outputs)
    anchor = templates.describe(function)
    assert "llvm.prefetch" in str(templates.apply(function, templates.tiles(anchor, profile)[0], anchor, profile))
    data, weight, exact = operands(spec, 0)
    arrays = [data, winograd.transformed_weight(weight, spec, outputs)]
    for pick in range(6):
        assert error(run(spec, outputs, arrays, profile, pick), exact) <= bound(spec, outputs)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups", "channels"),
    [((1, 1), 1, 1, 1, 32), ((3, 3), 2, 1, 1, 32), ((3, 3), 1, 2, 1, 32), ((3, 3), 1, 1, 2, 32), ((3, 3), 1, 1, 1, 3), ((9, 9), 1, 1, 1, 32)],
)  # fmt: skip
def test_what_has_no_such_form(kernel: tuple, stride: int, dilation: int, groups: int, channels: int) -> None:
    shape = (32, channels // groups, *kernel)
    spec = ConvSpec.of((1, 30, 30, channels), shape, [stride] * 2, [0] * 4, [dilation] * 2, groups, 16)
    assert not any(winograd.fits(spec, outputs) for outputs in winograd.SIZES)


def test_a_function_is_scheduled_again_and_again(profile: Profile) -> None:
    spec = ConvSpec.of((1, 4, 16, 16), (32, 16, 3, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, profile.lanes)
    function = forms.form(spec, 2)
    anchor, before = templates.describe(function), function.script()
    for tile in templates.tiles(anchor, profile):
        templates.apply(function, tile, anchor, profile)
        assert function.script() == before


class Gated(nn.Module):
    """Convolutions with what may follow them: a residual, gates that need all pixels, activations that read their input twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.wide = nn.Conv2d(24, 24, (3, 5), padding=(1, 2))
        self.last = nn.Conv2d(24, 40, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.first(x))
        y = self.wide(x)
        y = nn.functional.silu(y * torch.sigmoid(y.mean((2, 3), keepdim=True)) + x)
        y = nn.functional.hardswish(self.last(y * 2 + 1)) / 3
        return y.unflatten(2, (-1, 1)).relu()  # over five axes


@pytest.mark.parametrize("outputs", winograd.SIZES)
def test_a_model_of_them_equals_torch(monkeypatch: pytest.MonkeyPatch, tmp_path, outputs: int) -> None:
    torch.manual_seed(0)
    profile, model, x = load_profile("x86-host"), Gated().eval(), torch.randn(2, 3, 13, 17)

    def all_of_them(tuner: Tuner, specs: Sequence[ConvSpec]) -> dict[ConvSpec, int]:
        return {spec: outputs for spec in specs if winograd.fits(spec, outputs)}

    monkeypatch.setattr(forms, "choose", all_of_them)
    module = build.build(model, (x,), profile, Tuner(profile, KernelStore(tmp_path, {}), budget=1))
    assert [kernel.operator for kernel in module.kernels].count(winograd.NAME) == 2  # the first reads 3 channels
    torch.testing.assert_close(module.run(x), model(x), rtol=1e-4, atol=1e-4)


class Clock:
    """Says how long a kernel takes, by its template; None where it cannot be built."""

    how = "measured"

    def __init__(self, seconds: dict[str, float | None]) -> None:
        self.seconds = seconds
        self.asked: list[str] = []

    def attempt(self, jobs: Sequence[Job]) -> list[Outcome[float]]:
        found = []
        for job in jobs:
            template = templates.describe(job.function).template
            self.asked.append(template)
            seconds = self.seconds[template]
            found.append(Outcome(None, "refused") if seconds is None else Outcome(seconds, ""))
        return found


SPEC = ConvSpec.of((1, 56, 56, 64), (64, 64, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 16)
PEAK = {"dense": 24 * 256 * 64 * 2 / 1e11}  # the product of the peak: at 1e11 operations a second


@pytest.mark.parametrize(
    ("by_products", "direct", "expected", "asked"),
    [
        (1e-3, 9.0, 4, False),  # the direct form takes over 2.3 ms at the peak: it is not even tried
        (3e-3, 4e-3, 4, True),
        (4e-3, 3e-3, forms.DIRECT, True),
        (2.95e-3, 3e-3, forms.DIRECT, True),  # within the noise
        (None, 3e-3, forms.DIRECT, True),  # none of its schedules builds
    ],
)
def test_the_faster_form_is_chosen(
    tmp_path, by_products: float | None, direct: float, expected: int, asked: bool
) -> None:
    clock = Clock({**PEAK, winograd.NAME: by_products, "conv2d": direct})
    tuner = Tuner(load_profile("x86-host"), KernelStore(tmp_path, {}), clock, budget=2)
    assert forms.choose(tuner, [SPEC, SPEC]) == {SPEC: expected}
    assert ("conv2d" in clock.asked) == asked
    if by_products is not None:
        clock.asked.clear()
        assert forms.choose(tuner, [SPEC]) == {SPEC: expected}
        assert not clock.asked  # the store remembers


def test_no_form_that_builds_is_said(tmp_path) -> None:
    clock = Clock({**PEAK, winograd.NAME: None, "conv2d": None})
    tuner = Tuner(load_profile("x86-host"), KernelStore(tmp_path, {}), clock, budget=2)
    assert forms.choose(tuner, [SPEC]) == {SPEC: forms.DIRECT}  # and the build says why the kernel cannot be made
    with pytest.raises(AutocompError, match="could be built"):
        tuner.tune(forms.form(SPEC, forms.DIRECT))
