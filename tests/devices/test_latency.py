"""The latency model: it recovers what made the times it is fitted to, and always says something usable."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from pipeline import pipeline

from autocomp.devices.latency import LatencyModel, Work, layer_work
from autocomp.graph.shapes import resized
from autocomp.hardware.profile import Profile, load_profile
from autocomp.records.candidate import Method
from autocomp.tuning.store import KernelRecord

PEAKS = {"fp32": 2e11, "int8": 6e11}
STORE_RATE = 16e9  # the scale of the model's own features


@pytest.fixture(scope="module")
def profile() -> Profile:
    return replace(load_profile("x86-64-v3"), lanes=8)


def shapes(count: int, seed: int = 0) -> list[Work]:
    """Convolutions and dense products, fp32 and int8, of all sizes."""
    rng = np.random.default_rng(seed)
    works = []
    for _ in range(count):
        h, w, c, o = rng.integers(1, 24), 4 * rng.integers(1, 6), 4 * rng.integers(1, 32), 8 * rng.integers(1, 16)
        works.append(Work("conv2d", (1, int(h), int(w), int(o)), (3, 3, int(c))))
        works.append(Work("conv2d_int8", (1, int(h), int(w), int(o)), (3, 3, int(c) // 4, 4)))
        works.append(Work("dense", (int(w), int(o)), (int(c),)))
        works.append(Work("dense_int8", (int(w), int(o)), (int(c) // 4, 4)))
    return works


def true_seconds(
    work: Work, efficiency: float = 0.8, write: float = 2.0, copy: float = 0.5, call: float = 1e-7
) -> float:
    outputs, depth = math.prod(work.spatial), math.prod(work.reduction)
    peak = PEAKS["int8" if work.template.endswith("int8") else "fp32"]
    rows = math.prod(work.spatial[:-1])
    inputs = rows * (math.prod(work.reduction[2:]) if len(work.spatial) == 4 else depth)
    return 2 * outputs * depth / peak / efficiency + (write * outputs + copy * inputs) / STORE_RATE + call


def record(key: int, work: Work, seconds: float) -> KernelRecord:
    return KernelRecord(str(key), work.template, {}, seconds, 0, 1, work.spatial, work.reduction)


@pytest.mark.parametrize(("noise", "within"), [(0.0, 1e-6), (0.05, 0.06)])
def test_fit_recovers_what_made_the_times(profile: Profile, noise: float, within: float) -> None:
    rng = np.random.default_rng(1)
    records = [record(k, w, true_seconds(w) * (1 + noise * rng.standard_normal())) for k, w in enumerate(shapes(40))]
    model = LatencyModel(profile, PEAKS)
    model.fit_kernels(records)
    assert model.kernel_error is not None
    assert model.kernel_error <= within
    unseen = shapes(20, seed=2)
    errors = [abs(model.kernel_seconds(work) / true_seconds(work) - 1) for work in unseen]
    assert np.median(errors) <= within


def test_few_kernels_leave_the_prior(profile: Profile) -> None:
    model, fitted = LatencyModel(profile, PEAKS), LatencyModel(profile, PEAKS)
    fitted.fit_kernels([record(k, work, 1.0) for k, work in enumerate(shapes(1))])
    assert fitted.kernel_error is None
    for work in shapes(5):
        assert fitted.kernel_seconds(work) == model.kernel_seconds(work) > 0


@pytest.mark.parametrize("kind", ["plain", "depthwise", "flat", "odd"])
@pytest.mark.parametrize("fitted", [False, True])
def test_every_layer_and_method_has_a_time(profile: Profile, kind: str, fitted: bool) -> None:
    model, made = LatencyModel(profile, PEAKS), pipeline(kind)
    if fitted:
        model.fit_kernels([record(k, work, true_seconds(work)) for k, work in enumerate(shapes(10))])
        model.fit_modules([(1e-5, 4), (2e-5, 4), (3e-5, 8)], [1.3e-5, 2.4e-5, 3.5e-5])
    for name, layer in made.graph.layers.items():
        widths = made.space.widths.get(layer.out_group or "", (layer.out_channels,))
        for width in widths:
            inputs = made.space.columns(name, width) if layer.conv_groups > 1 else layer.in_channels
            shape = resized(layer, inputs, made.space.rows(name, width))
            for method in made.space.methods[name]:
                usable = made.space.effective(name, shape.in_channels, shape.out_channels, method)
                seconds, kernels = model.layer_seconds(shape, usable)
                assert 0 < seconds < 1e-2, (name, width, method)
                assert kernels == len(usable.ranks) + 1, "a factorised layer runs as one kernel a factor"
                assert 0 < model.module_seconds(seconds, kernels) < 1e-2


def test_more_work_takes_more_time(profile: Profile) -> None:
    model = LatencyModel(profile, PEAKS)
    layer = pipeline("plain").graph.layers["block1.conv1"]
    whole, _ = model.layer_seconds(layer, Method())
    narrow, _ = model.layer_seconds(resized(layer, layer.in_channels, layer.out_channels // 2), Method())
    eight_bits, _ = model.layer_seconds(layer, Method("w8a8"))
    assert narrow < whole
    (work,) = layer_work(layer, Method(), profile)
    assert eight_bits < model.kernel_seconds(replace(work, instead=None))
    assert work.template == "conv2d"
    assert work.instead is not None, "a 3x3 kernel of stride 1 may be computed by fewer products"
    assert (
        math.prod(work.instead.spatial) * math.prod(work.instead.reduction)
        < math.prod(work.spatial) * math.prod(work.reduction) / 2
    )
    assert whole == min(model.kernel_seconds(replace(work, instead=None)), model.kernel_seconds(work.instead))
    assert 2 * math.prod(work.spatial) * math.prod(work.reduction) >= 2 * layer.macs, "padding adds work, never less"


def test_modules_refit_the_sum(profile: Profile) -> None:
    model = LatencyModel(profile, PEAKS)
    sums = [(total * 1e-5, count) for total, count in ((1, 8), (2, 6), (3, 12), (5, 9), (8, 10))]
    assert model.module_seconds(3e-5, 5) == pytest.approx(3e-5), "before any module is measured, the plain sum"
    model.fit_modules(sums[:2], [1.0, 1.0])
    assert model.module_error is None, "two modules are too few to fit"
    model.fit_modules(sums, [1.2 * total + 3e-7 * count + 2e-6 for total, count in sums])
    assert model.module_error is not None
    assert model.module_error < 1e-6
    assert model.module_seconds(4e-5, 7) == pytest.approx(1.2 * 4e-5 + 3e-7 * 7 + 2e-6, rel=1e-5)
