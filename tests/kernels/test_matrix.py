"""Kernels in matrix registers: their shapes, their code for any machine that has them, and, on such a machine, their sums to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from autocomp.hardware import host
from autocomp.hardware.profile import Profile, load_profile
from autocomp.kernels import compute, matrix, packing, templates
from autocomp.kernels.intrinsics import dot_product
from autocomp.kernels.matrix_code import REGISTERS, Registers
from autocomp.kernels.specs import ConvSpec, DenseSpec
from autocomp.kernels.tile import Anchor, Tile
from autocomp.tuning.timers import compile_function

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
TARGET = {
    "kind": "llvm", "mcpu": "x86-64-v4", "num-cores": 1, "mattr": ["+avx512vnni", *(f"+{host.FEATURES[flag]}" for flag in host.MATRIX)],
}  # fmt: skip
here = pytest.mark.skipif(not load_profile("x86-host").matrix, reason="this processor has no matrix registers (AMX)")


@pytest.fixture(scope="module")
def profile() -> Profile:
    """A processor with matrix registers, whatever this machine has."""
    plain = load_profile("x86-host")
    return replace(plain, target=TARGET, lanes=16, vector_registers=32, int8="vnni512", cores=1)


def convolution(spec: ConvSpec, profile: Profile) -> tuple[Any, Anchor]:
    """A convolution of bytes with a bias behind it, as a PrimFunc of (data, weight, zero point, bias)."""
    from tvm import te

    dot = dot_product(profile)
    weight = packing.pack_conv_weight(
        np.zeros((spec.out_channels, spec.in_channels // spec.groups, *spec.kernel), "int8"), spec, dot
    )
    shapes = [
        ((spec.batch, *spec.in_size, spec.in_channels), "uint8"),
        (weight.shape, "int8"),
        ((1,), "int32"),
        ((spec.out_channels,), "int32"),
    ]
    data, packed, zero, bias = (te.placeholder(shape, dtype, name=f"p{i}") for i, (shape, dtype) in enumerate(shapes))
    sums = compute.conv2d(data, packed, spec, dot, zero)
    result = te.compute(sums.shape, lambda *i: sums[i] + bias[i[-1]], name="biased")
    function = te.create_prim_func([data, packed, zero, bias, result])
    return function, templates.describe(function)


convolutions = st.fixed_dictionaries(
    {
        "size": st.tuples(st.integers(1, 20), st.integers(1, 40)),
        "channels": st.tuples(st.sampled_from([3, 16, 20, 24, 64, 72, 128]), st.sampled_from([8, 16, 40, 64, 80])),
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.integers(1, 2),
        "dilation": st.integers(1, 2),
        "groups": st.sampled_from([1, 1, 2]),
        "pick": st.integers(0, 60),
        "seed": st.integers(0, 100),
    }
)


def spec_of(case: dict) -> ConvSpec | None:
    (ci, co), (kh, kw) = case["channels"], case["kernel"]
    groups = case["groups"] if ci % 2 == co % 32 == 0 else 1
    padding = [kh // 2, kw // 2] * 2
    strides, dilation = [case["stride"]] * 2, [case["dilation"]] * 2
    spec = ConvSpec.of((2, *case["size"], ci), (co, ci, kh, kw), strides, padding, dilation, groups, 16)
    return spec if min(spec.out_size) > 0 else None


def scheduled_with(function: Any, tile: Tile, anchor: Anchor, profile: Profile, groups: int = 1) -> Any:
    """The function with a tile; None where that is refused, as one of several groups is."""
    if groups > 1 and tile.vectors > 1:
        with pytest.raises(ValueError, match="several groups"):
            templates.apply(function, tile, anchor, profile)
        return None
    return templates.apply(function, tile, anchor, profile)


@QUICK
@given(case=convolutions)
def test_tiles_fit_the_registers(profile: Profile, case: dict) -> None:
    spec = spec_of(case)
    if spec is None:
        return
    function, anchor = convolution(spec, profile)
    if not matrix.has_kernels(anchor, profile):
        assert not any(tile.matrix for tile in templates.tiles(anchor, profile))
        return
    found = matrix.candidates(anchor, profile)
    for tile in found:
        registers = Registers.of(tile, anchor.reduction[-2])
        assert registers.turned < REGISTERS
        assert registers.height <= 16
        assert 4 * registers.steps <= 64
        assert anchor.reduction[-2] % registers.steps == 0
        assert anchor.spatial[-2] % tile.rows == 0
        assert Tile(**tile.to_json()) == tile
    if found:
        scheduled = scheduled_with(function, found[case["pick"] % len(found)], anchor, profile, spec.groups)
        assert scheduled is None or all(
            f"llvm.x86.{name}" in scheduled.script()
            for name in ("ldtilecfg", "tileloadd64", "tdpbusd", "tilestored64", "tilerelease")
        )


def test_the_shapes_as_the_processor_reads_them() -> None:
    """Intel's manual, vol. 1, table 18-1: palette, then bytes of a row of each register from byte 16 on, rows from byte 48 on."""
    registers = Registers.of(Tile(14, 2, rows_up=2, matrix=True), 8)
    words = np.array(registers.words(), "int64").tobytes()
    assert words[0] == 1
    widths, rows = np.frombuffer(words[16:32], "uint16"), np.frombuffer(words[48:56], "uint8")
    assert widths.tolist() == [64, 64, 64, 64, 32, 32, 64, 0]  # four of sums, two of inputs, one of weights
    assert rows.tolist() == [14, 14, 14, 14, 14, 14, 8, 0]


@here
@QUICK
@given(case=convolutions)
def test_convolutions_are_exact(case: dict) -> None:
    import tvm
    from tvm.target import Target

    spec = spec_of(case)
    if spec is None:
        return
    profile = load_profile("x86-host")
    function, anchor = convolution(spec, profile)
    tiles = matrix.candidates(anchor, profile) if matrix.has_kernels(anchor, profile) else []
    if not tiles:
        return
    rng = np.random.default_rng(case["seed"])
    data = rng.integers(0, 256, (spec.batch, *spec.in_size, spec.in_channels)).astype("uint8")
    weight = rng.integers(-127, 128, (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)).astype("int8")
    zero, bias = np.array([7], "int32"), rng.integers(-999, 999, spec.out_channels).astype("int32")
    result = tvm.runtime.tensor(np.zeros((spec.batch, *spec.out_size, spec.out_channels), "int32"))
    arrays = (data, packing.pack_conv_weight(weight, spec, dot_product(profile)), zero, bias)
    scheduled = scheduled_with(function, tiles[case["pick"] % len(tiles)], anchor, profile, spec.groups)
    if scheduled is None:
        return
    compile_function(scheduled, Target(dict(profile.target)))(*map(tvm.runtime.tensor, arrays), result)
    top, left, bottom, right = spec.padding
    picture = functional.pad(torch.from_numpy(data).double().permute(0, 3, 1, 2), (left, right, top, bottom), value=7)
    exact = functional.conv2d(
        picture,
        torch.from_numpy(weight).double(),
        torch.from_numpy(bias).double(),
        spec.stride,
        0,
        spec.dilation,
        spec.groups,
    )
    assert np.array_equal(result.numpy(), exact.permute(0, 2, 3, 1).numpy())


@here
@QUICK
@given(
    leading=st.sampled_from([(1,), (7,), (3, 11), (2, 64), (197,)]), depth=st.sampled_from([16, 64, 100, 256, 1500]),
    outputs=st.sampled_from([10, 16, 48, 400]), pick=st.integers(0, 60), seed=st.integers(0, 100),
)  # fmt: skip
def test_products_are_exact(leading: tuple[int, ...], depth: int, outputs: int, pick: int, seed: int) -> None:
    import tvm
    from tvm import te
    from tvm.target import Target

    profile = load_profile("x86-host")
    dot, rng = dot_product(profile), np.random.default_rng(seed)
    data = rng.integers(0, 256, (*leading, depth)).astype("uint8")
    weight = rng.integers(-127, 128, (outputs, depth)).astype("int8")
    packed = packing.pack_dense_weight(weight, profile.lanes, dot)
    x, w = te.placeholder(data.shape, "uint8", name="x"), te.placeholder(packed.shape, "int8", name="w")
    function = te.create_prim_func([x, w, compute.dense(x, w, DenseSpec.of(data.shape, outputs, profile.lanes), dot)])
    anchor = templates.describe(function)
    tiles = matrix.candidates(anchor, profile) if matrix.has_kernels(anchor, profile) else []
    if not tiles:
        return
    result = tvm.runtime.tensor(np.zeros((*leading, outputs), "int32"))
    scheduled = templates.apply(function, tiles[pick % len(tiles)], anchor, profile)
    compile_function(scheduled, Target(dict(profile.target)))(
        tvm.runtime.tensor(data), tvm.runtime.tensor(packed), result
    )
    assert np.array_equal(result.numpy(), data.astype("int64") @ weight.astype("int64").T)


def test_several_threads_keep_to_vectors(profile: Profile) -> None:
    """Registers are shaped for the thread that calls a kernel, not for those that share its loops."""
    spec = ConvSpec.of((1, 14, 14, 64), (64, 64, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 16)
    _, anchor = convolution(spec, profile)
    assert matrix.has_kernels(anchor, profile)
    assert not matrix.has_kernels(anchor, replace(profile, cores=2))


@pytest.mark.parametrize("lent", [True, False])
def test_a_system_that_lends_no_registers_has_none(monkeypatch: pytest.MonkeyPatch, lent: bool) -> None:
    flags = frozenset(("lm", "avx512f", *host.MATRIX))
    monkeypatch.setattr(host, "parse_cpuinfo", lambda text: host.Cpu("one with matrices", flags))
    monkeypatch.setattr(host, "_lends_matrix_registers", lambda: lent)
    seen = host.this_cpu.__wrapped__()  # past the cache, which is everybody's
    assert (set(host.MATRIX) <= seen.flags) == lent
    assert "avx512f" in seen.flags
