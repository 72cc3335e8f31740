"""bfloat16: rounding as torch's, bit for bit, and products of pairs in vector and matrix registers, where this machine has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from autocomp.devices.local import LocalDevice
from autocomp.hardware.profile import load_profile
from autocomp.kernels import bf16, bf16_dot, compute, matrix, packing, templates
from autocomp.kernels.specs import ConvSpec, DenseSpec
from autocomp.layers.bf16 import in_brain
from autocomp.tuning.store import KernelStore
from autocomp.tuning.timers import compile_function

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
CLOSE = 1e-5  # of the largest sum: float32 sums in another order
here = pytest.mark.skipif(
    "bf16" not in load_profile("x86-host").precisions, reason="this processor has no AVX512-BF16 instructions"
)


def run(outputs: object, inputs: list, arrays: list[np.ndarray], pick: int = 0, matrices: bool = False) -> np.ndarray:
    """What a TE graph computes with the ``pick``-th tile (wrapping), of those in matrix registers alone if asked for."""
    import tvm
    from tvm import te
    from tvm.target import Target

    profile = load_profile("x86-host")
    function = te.create_prim_func([*inputs, outputs])
    anchor = templates.describe(function)
    tiles = matrix.candidates(anchor, profile) if matrices else templates.tiles(anchor, profile)
    scheduled = templates.apply(function, tiles[pick % len(tiles)], anchor, profile)
    dtype = str(outputs.dtype).removeprefix("T.")
    result = tvm.runtime.tensor(np.zeros([int(size) for size in outputs.shape], dtype))
    compile_function(scheduled, Target(dict(profile.target)))(*map(tvm.runtime.tensor, arrays), result)
    return result.numpy()


def test_rounds_as_torch_does() -> None:
    from tvm import te

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 4096, dtype="uint64").astype("uint32")
    ties = (rng.integers(0, 2**16, 512, dtype="uint64").astype("uint32") << 16) | 0x8000
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, 1e-40], "float32").view("uint32")
    values = np.concatenate(
        [bits, ties, special, np.zeros(-(len(bits) + len(ties) + len(special)) % 16, "uint32")]
    ).view("float32")
    data = te.placeholder(values.shape, name="data")
    found = run(bf16.rounded(data), [data], [values])
    wanted = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
    nan = np.isnan(values)
    assert np.array_equal(found[~nan], wanted[~nan])
    assert np.isnan((found[nan].astype("uint32") << 16).view("float32")).all()
    again = run(bf16.rounded_in_float32(data), [data], [values])
    assert np.array_equal(again[~nan], (wanted[~nan].astype("uint32") << 16).view("float32"))


def brain(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 values that are bfloat16."""
    values = torch.from_numpy(rng.standard_normal(shape).astype("float32")).bfloat16().float().numpy()
    assert np.array_equal((bf16.bits_of(values).astype("uint32") << 16).view("float32"), values)
    return values


@here
@QUICK
@given(
    leading=st.sampled_from([(1,), (7,), (3, 11), (2, 64), (197,)]), depth=st.sampled_from([3, 16, 64, 100, 256, 1500]),
    outputs=st.sampled_from([10, 16, 48, 400]), pick=st.integers(0, 60), seed=st.integers(0, 100), matrices=st.booleans(),
)  # fmt: skip
def test_products(leading: tuple[int, ...], depth: int, outputs: int, pick: int, seed: int, matrices: bool) -> None:
    from tvm import te

    profile, rng = load_profile("x86-host"), np.random.default_rng(seed)
    dot = bf16.dot(profile)
    data, weight = brain(rng, *leading, depth), brain(rng, outputs, depth)
    packed = packing.pack_dense_weight(bf16.bits_of(weight), profile.lanes, dot)
    x, w = te.placeholder(data.shape, "uint16", name="x"), te.placeholder(packed.shape, "uint16", name="w")
    sums = compute.dense(x, w, DenseSpec.of(data.shape, outputs, profile.lanes), dot)
    exact = data.astype("float64") @ weight.astype("float64").T
    anchor = templates.describe(te.create_prim_func([x, w, sums]))
    found = run(sums, [x, w], [bf16.bits_of(data), packed], pick, matrices and matrix.has_kernels(anchor, profile))
    assert np.abs(found - exact).max() <= CLOSE * np.abs(exact).max()


@here
@QUICK
@given(
    size=st.tuples(st.integers(3, 17), st.integers(3, 33)), channels=st.sampled_from([(3, 16), (8, 32), (16, 40), (64, 48), (66, 16)]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)), stride=st.integers(1, 2), pick=st.integers(0, 60), seed=st.integers(0, 100),
    matrices=st.booleans(),
)  # fmt: skip
def test_convolutions(
    size: tuple, channels: tuple, kernel: tuple, stride: int, pick: int, seed: int, matrices: bool
) -> None:
    from tvm import te

    profile, rng = load_profile("x86-host"), np.random.default_rng(seed)
    dot, (ci, co), (kh, kw) = bf16.dot(profile), channels, kernel
    spec = ConvSpec.of((2, *size, ci), (co, ci, kh, kw), [stride] * 2, [kh // 2, kw // 2] * 2, (1, 1), 1, profile.lanes)
    data, weight = brain(rng, 2, *size, ci), brain(rng, co, ci, kh, kw)
    packed = packing.pack_conv_weight(bf16.bits_of(weight), spec, dot)
    x, w = te.placeholder(data.shape, "uint16", name="x"), te.placeholder(packed.shape, "uint16", name="w")
    sums = compute.conv2d(x, w, spec, dot)
    picture = torch.from_numpy(data).double().permute(0, 3, 1, 2)
    exact = (
        functional.conv2d(picture, torch.from_numpy(weight).double(), None, stride, (kh // 2, kw // 2))
        .permute(0, 2, 3, 1)
        .numpy()
    )
    anchor = templates.describe(te.create_prim_func([x, w, sums]))
    found = run(sums, [x, w], [bf16.bits_of(data), packed], pick, matrices and matrix.has_kernels(anchor, profile))
    assert np.abs(found - exact).max() <= CLOSE * np.abs(exact).max()


@here
def test_layers_of_a_processor_without_matrix_registers(tmp_path: Path) -> None:
    """Two layers of one module, each by the instruction on vectors alone."""
    from tvm import te
    from tvm.target import Target

    plain = load_profile("x86-host")
    kept = [feature for feature in plain.target.get("mattr", ()) if "amx" not in feature]
    profile = replace(plain, target={**plain.target, "mattr": kept})
    assert not profile.matrix
    torch.manual_seed(0)
    layers = [in_brain(nn.Conv2d(32, 48, 3, padding=1)), nn.ReLU(), nn.Flatten(), in_brain(nn.Linear(48 * 30, 40))]
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 32, 5, 6)
    device = LocalDevice(profile, KernelStore.open(profile, tmp_path))
    compiled = device.compile(model, [(x,)])  # which compares with torch
    assert {kernel.operator for kernel in compiled.kernels} >= {"conv2d_bf16", "dense_bf16"}
    dot = bf16.dot(profile)
    data, weight = te.placeholder((8, 64), "uint16", name="x"), te.placeholder((3, 32, 16, 2), "uint16", name="w")
    function = te.create_prim_func([data, weight, compute.dense(data, weight, DenseSpec((8,), 64, 48, 16), dot)])
    anchor = templates.describe(function)
    scheduled = templates.apply(function, templates.tiles(anchor, profile)[0], anchor, profile)
    code = compile_function(scheduled, Target(dict(profile.target))).mod.inspect_source("asm")
    assert "vdpbf16ps" in code
    assert "tdpbf16ps" not in code
    assert not [line for line in code.splitlines() if "call" in line and bf16_dot.NAME in line]  # inlined
