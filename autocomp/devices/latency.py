"""Tier-0 latency: what a candidate's kernels should take, by a small model fitted to kernels measured on this target.

A kernel's time is modelled as ``arithmetic / peak + write-back + input copy + constant``, each with a coefficient fitted (non-negative
least squares on relative errors) to the target's own tuned kernels. A module's time is ``alpha * sum(kernels) + beta * kernels + gamma``,
refitted on every whole module that is measured. Of attention the products over heads that can be removed are counted, not the softmax
between them, which alpha takes up. Estimates only choose what is measured; they never make the front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from autocomp.hardware.profile import Profile
from autocomp.kernels import fp16, winograd
from autocomp.kernels.compute import round_up
from autocomp.kernels.intrinsics import dot_product
from autocomp.kernels.specs import ConvSpec, live_taps, padded_rows, padding_left
from autocomp.kernels.tile import lanes_in
from autocomp.records.candidate import Method
from autocomp.records.precisions import FLOAT32, FORMATS, Arithmetic, arithmetic_of, load, weight_bytes_of
from autocomp.tuning.store import KernelRecord

if TYPE_CHECKING:
    from autocomp.graph.graph import Group, Layer

_FEATURES = 4
# Before enough kernels were measured: near the peak, one store and one load a vector, 50 ns a call.
_PRIOR = np.array([1.1, 1.0, 1.0, 5e-8])
# A loop over time of a few rows reads a vector of weights for every product, from the second-level cache.
_LOOP_PRIOR = np.array([4.0, 1.0, 1.0, 5e-8])
_ENOUGH = 8  # kernels of a class before its own fit is trusted over the prior
_STORE_RATE = 16e9  # elements a second that one core reads or writes, a scale for the features only


@dataclass(frozen=True)
class Work:
    """One kernel to come: which class of template runs it, and the extents of its loops.

    ``instead`` is the other form that it may have, of which the faster is compiled.
    """

    template: str
    spatial: tuple[int, ...]
    reduction: tuple[int, ...]
    instead: Work | None = None


def layer_work(layer: Layer, method: Method, profile: Profile) -> list[Work]:
    """The kernels that a layer of this shape becomes with a method."""
    from autocomp.graph.shapes import factor_shapes

    parts = factor_shapes(layer, method.ranks) if method.ranks else [layer]
    form = FORMATS[method.precision]
    arithmetic = form.family.arithmetic
    if layer.loop:  # one kernel for all steps
        outputs = round_up(layer.out_channels, profile.lanes)
        return [Work(arithmetic.template("loop"), (layer.calls, layer.out_size[1], outputs), (layer.in_channels,))]
    if form.family.kernel and layer.kind == "linear":
        loops = load(form.family.kernel)
        return [Work(*loops(form, p.out_size[1], p.in_channels, p.out_channels, profile.lanes)) for p in parts]
    if form.family.decodes and method.precision not in profile.precisions:
        arithmetic = FLOAT32  # what has no kernels is computed in fp32 on decoded weights
    return [_work(part, arithmetic, profile) for part in parts]


def _work(layer: Layer, arithmetic: Arithmetic, profile: Profile) -> Work:
    if layer.kind == "linear":
        return _dense(layer.out_size[1], layer.in_channels, layer.out_channels, arithmetic, profile)
    if not layer.is_plain:
        layer = _flat(layer)
    layer = _reaching(layer)
    if layer.kind == "depthwise":
        spatial = (1, layer.out_size[0], padded_rows(layer.out_size[1]), layer.out_channels)
        return Work(arithmetic.template("depthwise"), spatial, layer.kernel)
    return _conv(layer, arithmetic, profile)


def _reaching(layer: Layer) -> Layer:
    """The convolution without the taps that read padding alone, as it is compiled."""
    pads = [(size, size) for size in layer.padding]
    sides = zip(layer.kernel, layer.in_size, layer.stride, pads, layer.dilation, strict=True)
    taps = [live_taps(*side) for side in sides]
    kernel = tuple(map(len, taps))
    if kernel == layer.kernel:
        return layer
    left = [padding_left(*side) for side in zip(layer.kernel, taps, pads, layer.dilation, strict=True)]
    return replace(layer, kernel=kernel, padding=tuple(max(0, *pair) for pair in left))


def _flat(layer: Layer) -> Layer:
    """The plain two-dimensional convolution nearest to one in three dimensions, or transposed: of as many products."""
    one, zero = (1, 1), (0, 0)
    if layer.output_padding is not None:  # each input makes a patch of outputs
        *lead, width = layer.in_size
        patch = replace(layer, kernel=one, in_size=(math.prod(lead), width), stride=one, padding=zero, dilation=one)
        return replace(patch, out_size=patch.in_size, out_channels=layer.out_channels * layer.taps, output_padding=None)
    (depth, *kernel), (frames, *sizes) = layer.kernel, layer.out_size
    channels = layer.in_channels * (
        1 if layer.kind == "depthwise" else depth
    )  # the frames that are read lie side by side
    height = 1 if layer.kind != "depthwise" else depth
    return replace(
        layer, kernel=(height * kernel[0], kernel[1]), in_channels=channels, stride=layer.stride[1:], padding=layer.padding[1:],
        dilation=layer.dilation[1:], in_size=(frames * layer.in_size[1], layer.in_size[2]), out_size=(frames * sizes[0], sizes[1]),
    )  # fmt: skip


def _dense(rows: int, depth: int, out: int, arithmetic: Arithmetic, profile: Profile) -> Work:
    spatial = (padded_rows(rows), round_up(out, lanes_in(arithmetic, profile)))
    template = arithmetic.template("dense")
    if arithmetic.runs:
        runs, run = fp16.split_depth(depth)
        return Work(template, spatial, (runs, run) if runs > 1 else (run,))
    return Work(template, spatial, _steps(depth, arithmetic, profile))


def _conv(layer: Layer, arithmetic: Arithmetic, profile: Profile) -> Work:
    if layer.kernel == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.conv_groups == 1:
        return _dense(layer.out_size[0] * layer.out_size[1], layer.in_channels, layer.out_channels, arithmetic, profile)
    lanes = lanes_in(arithmetic, profile)
    spatial = (1, layer.out_size[0], padded_rows(layer.out_size[1]), round_up(layer.out_channels, lanes))
    kh, kw = layer.kernel
    depth = layer.in_channels // layer.conv_groups
    spec = ConvSpec.of(
        (1, *layer.in_size, layer.in_channels), (layer.out_channels, depth, kh, kw), layer.stride, [*layer.padding] * 2,
        layer.dilation, layer.conv_groups, lanes,
    )  # fmt: skip
    if arithmetic.dot and spec.folds(dot_product(profile, arithmetic.name)):
        kw, depth = 1, kw * depth
    template, fewer = arithmetic.template("conv2d"), None
    if arithmetic is FLOAT32 and (sizes := [size for size in winograd.SIZES if winograd.fits(spec, size)]):
        fewer = Work(winograd.NAME, winograd.extents(spec, sizes[0]), (depth,))
    return Work(template, spatial, (kh, kw, *_steps(depth, arithmetic, profile)), fewer)


def _steps(depth: int, arithmetic: Arithmetic, profile: Profile) -> tuple[int, ...]:
    if not arithmetic.dot:
        return (depth,)
    width = dot_product(profile, arithmetic.name).fit(depth).width
    return round_up(depth, width) // width, width


class LatencyModel:
    """Seconds of layers and of whole modules on one profile, fitted to what was measured there."""

    def __init__(self, profile: Profile, peaks: Mapping[str, float]) -> None:
        self.profile = profile
        self.peaks = dict(peaks)  # operations a second by the name of an arithmetic: of those with kernels
        # elements a second that are read or written: one vector a cycle where the clock is known
        self._rate = (
            _STORE_RATE if profile.reach == "local" else min(_STORE_RATE, profile.lanes * (profile.clock_hz or 4e9))
        )
        self._coefficients: dict[str, np.ndarray] = {}
        self._module = np.array([1.0, 0.0, 0.0])
        self.kernel_error: float | None = None
        self.module_error: float | None = None

    def to_json(self) -> dict[str, list[float]]:
        """What `fit_kernels` found."""
        return {name: [float(value) for value in values] for name, values in self._coefficients.items()}

    def restore(self, fitted: Mapping[str, Sequence[float]]) -> None:
        """Take what ``to_json`` gave in place of a fit."""
        self._coefficients = {name: np.array(values) for name, values in fitted.items()}

    def fit_kernels(self, records: Sequence[KernelRecord]) -> None:
        """Fit each class of kernel to measured records; ``kernel_error`` becomes the median relative error over them."""
        from scipy.optimize import nnls

        errors: list[float] = []
        for name in {_family(record.operator) for record in records if record.spatial}:
            members = [record for record in records if record.spatial and _family(record.operator) == name]
            if len(members) < _ENOUGH:
                continue
            matrix = np.array([self._features(Work(r.operator, r.spatial, r.reduction)) for r in members])
            seconds = np.array([record.seconds for record in members])
            self._coefficients[name] = nnls(matrix / seconds[:, None], np.ones(len(members)))[0]
            errors += list(np.abs(matrix @ self._coefficients[name] / seconds - 1))
        self.kernel_error = float(np.median(errors)) if errors else None

    def fit_modules(self, sums: Sequence[tuple[float, int]], seconds: Sequence[float]) -> None:
        """Refit ``alpha, beta, gamma`` on (sum of predicted kernels, kernels) against measured modules' seconds."""
        from scipy.optimize import nnls

        if len(seconds) < 3:
            return
        matrix = np.array([[total, count * 1e-6, 1e-6] for total, count in sums])
        target = np.array(seconds)
        self._module = nnls(matrix / target[:, None], np.ones(len(target)))[0] * np.array([1, 1e-6, 1e-6])
        fitted = np.array([self.module_seconds(total, count) for total, count in sums])
        self.module_error = float(np.median(np.abs(fitted / target - 1)))

    def kernel_seconds(self, work: Work) -> float:
        if work.instead is not None:
            return min(self.kernel_seconds(replace(work, instead=None)), self.kernel_seconds(work.instead))
        prior = _LOOP_PRIOR if work.template.startswith("loop") else _PRIOR
        coefficients = self._coefficients.get(_family(work.template), prior)
        return float(self._features(work) @ coefficients)

    def layer_seconds(self, layer: Layer, method: Method) -> tuple[float, int]:
        """Predicted (seconds, kernels) of all calls of one layer of this shape; none where nothing is left of it."""
        if not layer.in_channels or not layer.out_channels:
            return 0.0, 0
        work = [item for call in layer.each_call for item in layer_work(call, method, self.profile)]
        return sum(self.kernel_seconds(item) for item in work), len(work)

    def attention_seconds(self, group: Group, width: int) -> tuple[float, int]:
        """Predicted (seconds, kernels) of the products of attention, when a group keeps ``width`` units (heads)."""
        if not width:
            return 0.0, 0
        lanes = self.profile.lanes
        work = [
            Work("batch_matmul", (max(1, round(a.batch * width)), padded_rows(a.m), round_up(a.n, lanes)), (a.k,))
            for a in group.attention
        ]
        return sum(self.kernel_seconds(item) for item in work), len(work)

    def module_seconds(self, total: float, count: int) -> float:
        """Predicted seconds of a whole module from the sum of its layers' kernels and their number."""
        alpha, beta, gamma = self._module
        return float(alpha * total + beta * count + gamma)

    def _features(self, work: Work) -> np.ndarray:
        outputs = math.prod(work.spatial)
        operations = 2 * outputs * math.prod(work.reduction)
        depth = math.prod(work.reduction[2:]) if len(work.spatial) == 4 else math.prod(work.reduction)
        inputs = math.prod(work.spatial[:-1]) * max(depth, 1)
        peak = self.peaks[arithmetic_of(work.template).name]
        seconds = max(operations / peak, self._weight_seconds(work))
        return np.array([seconds, outputs / self._rate, inputs / self._rate, 1.0])

    def _weight_seconds(self, work: Work) -> float:
        """Seconds to read the weights, where they come from main memory at a rate that the profile states."""
        caches, rate = self.profile.caches, self.profile.memory_bandwidth.get("read")
        if rate is None or work.template.startswith("depthwise"):
            return 0.0
        size = weight_bytes_of(work.template) * work.spatial[-1] * math.prod(work.reduction)
        if work.template.startswith("gemv"):  # whose second axis numbers groups of weights
            size *= work.spatial[1]
        times = work.spatial[0] if work.template.startswith("loop") else 1  # each step reads them again
        return times * size / rate if size > max(caches.values(), default=0) else 0.0


def _family(template: str) -> str:
    return template.replace("batch_matmul", "dense")
