"""Weight-only layers: rounding, the specification, the kernels against it, and the way through compilation and export."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from autocomp.compiler.build import build
from autocomp.compiler.verify import relative_error
from autocomp.compress.scales import quantise_groups, weight_only
from autocomp.devices.local import LocalDevice
from autocomp.export.onnx import export_onnx, onnx_session, run_session
from autocomp.graph.fold import fold_batchnorm
from autocomp.hardware.profile import Profile, load_profile
from autocomp.kernels import templates
from autocomp.kernels import weight_only as kernels
from autocomp.layers.weight_only import WeightOnlyLinear, dequantise, pack_levels, unpack_levels

torch.set_num_threads(1)

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
TOLERANCE = 1e-5  # of the largest output: sums in another order


@pytest.fixture(scope="module", params=["x86-host", "x86-64-v3"])
def profile(request: pytest.FixtureRequest) -> Profile:
    return load_profile(request.param)


# --- rounding ---

layers = st.fixed_dictionaries(
    {
        "n": st.sampled_from([1, 5, 16, 33, 50, 64, 144]),
        "k": st.sampled_from([1, 7, 31, 32, 64, 96, 100, 161]),
        "bits": st.sampled_from([4, 8]),
        "group": st.sampled_from([32, 64, 128]),
        "seed": st.integers(0, 1000),
    }
)


def layer_of(case: dict, bias: bool = True) -> tuple[nn.Linear, WeightOnlyLinear]:
    torch.manual_seed(case["seed"])
    layer = nn.Linear(case["k"], case["n"], bias=bias)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-3, 3, case["n"])[:, None])
    return layer, weight_only(layer, case["bits"], case["group"])


@QUICK
@given(case=layers)
def test_weights_are_rounded_to_the_nearest_level(case: dict) -> None:
    layer, rounded = layer_of(case)
    n, k, bits, group = case["n"], case["k"], case["bits"], case["group"]
    groups = -(-k // group)
    assert rounded.scales.shape == (n, groups)
    assert rounded.weight.shape == (n, groups * group * bits // 8)
    value = dequantise(rounded.weight, rounded.scales, bits, group)
    assert not value[:, k:].any()
    scale = rounded.scales.repeat_interleave(group, 1)[:, :k]
    peak = torch.nn.functional.pad(layer.weight.detach(), (0, -k % group)).unflatten(1, (-1, group)).abs().amax(2)
    highest = 127 if bits == 8 else 7
    assert (rounded.scales <= peak / highest * 1.0001).all()
    error = (value[:, :k] - layer.weight.detach()).abs()
    inside = layer.weight.detach().abs() <= scale * highest
    assert (error[inside] <= scale[inside] * 0.5001).all(), "half a step at most, but for weights that are clipped"


def test_clipping_beats_the_plain_range_in_four_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    levels, scales = quantise_groups(weight, 4, 64)
    ours = (dequantise(pack_levels(levels), scales, 4, 64) - weight).square().sum()
    blocks = weight.unflatten(1, (-1, 64))
    scale = blocks.abs().amax(2, keepdim=True) / 7
    plain = ((blocks / scale).round().clamp(-7, 7) * scale - blocks).square().sum()
    assert ours < 0.85 * plain


def test_a_group_of_zeros_stays_zero() -> None:
    levels, scales = quantise_groups(torch.zeros(3, 40), 4, 32)
    assert not levels.any()
    assert scales.eq(1).all()


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=20).filter(lambda row: len(row) % 2 == 0))
def test_packing_is_undone_by_unpacking(row: list[int]) -> None:
    levels = torch.tensor([row, row[::-1]], dtype=torch.int8)
    packed = pack_levels(levels)
    assert packed.dtype == torch.uint8
    assert packed.shape[1] == len(row) // 2
    assert torch.equal(unpack_levels(packed), levels)


@QUICK
@given(case=layers, rows=st.sampled_from([(), (1,), (3, 2)]))
def test_the_op_multiplies_the_dequantised_weight(case: dict, rows: tuple[int, ...]) -> None:
    layer, rounded = layer_of(case)
    x = torch.randn(*rows, case["k"])
    value = dequantise(rounded.weight, rounded.scales, case["bits"], case["group"])[:, : case["k"]]
    expected = x.double() @ value.double().T + layer.bias.detach().double()
    assert relative_error(rounded(x), expected) < TOLERANCE
    fake = torch.library.opcheck(
        torch.ops.autocomp.linear_weight_only.default,
        (x, rounded.weight, rounded.scales, rounded.bias, case["bits"], case["group"]),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(fake.values()) == {"SUCCESS"}


def test_other_bits_and_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3 and 32"):
        weight_only(nn.Linear(4, 4), 3, 32)
    with pytest.raises(ValueError, match="got 4 and 48"):
        weight_only(nn.Linear(4, 4), 4, 48)


# --- kernels ---


def run_kernel(x: np.ndarray, rounded: WeightOnlyLinear, profile: Profile, pick: int) -> tuple[np.ndarray, str, int]:
    """The product without bias, with the ``pick``-th tile (wrapping); also the template and its number of tiles."""
    import tvm
    from tvm import s_tir, te

    spec = kernels.WeightOnlySpec(
        x.shape[:-1], x.shape[-1], rounded.out_features, rounded.bits, rounded.group, profile.lanes
    )
    levels = unpack_levels(rounded.weight) if rounded.bits == 4 else rounded.weight
    arrays = [x, kernels.pack_weight(levels.numpy(), spec), kernels.pack_scales(rounded.scales.numpy(), spec)]
    inputs = [te.placeholder(array.shape, str(array.dtype), name=f"in{i}") for i, array in enumerate(arrays)]
    function = te.create_prim_func([*inputs, kernels.dense(*inputs, spec)])
    anchor = templates.describe(function)
    assert kernels.is_weight_only(anchor)
    tiles = kernels.tiles(anchor, profile)
    schedule = s_tir.Schedule(function)
    kernels.tile_weight_only(schedule, tiles[pick % len(tiles)], anchor, profile)
    scheduled = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
    executable = tvm.compile(
        tvm.IRModule({"main": scheduled.with_attr("global_symbol", "main")}), tvm.target.Target(dict(profile.target))
    )
    result = tvm.runtime.tensor(np.zeros((*x.shape[:-1], rounded.out_features), "float32"))
    executable(*[tvm.runtime.tensor(array) for array in arrays], result)
    return result.numpy(), anchor.template, len(tiles)


@QUICK
@given(
    case=layers,
    rows=st.sampled_from([(1,), (2,), (3,), (1, 4), (5,), (7,), (2, 3), (17,), (3, 1, 29)]),
    pick=st.integers(0, 40),
)
def test_kernels_equal_the_specification(profile: Profile, case: dict, rows: tuple[int, ...], pick: int) -> None:
    _, rounded = layer_of(case, bias=False)
    x = torch.randn(*rows, case["k"])
    value, template, tiles = run_kernel(x.numpy(), rounded, profile, pick)
    assert template == f"{'gemv' if int(np.prod(rows)) <= 4 else 'dense'}_w{case['bits']}"
    assert tiles >= 1
    expected = rounded(x)
    # every output on its own: the rows of the weight differ by orders of magnitude
    bound = (x.abs().double() @ value_of(rounded).abs().double().T).numpy()
    assert (np.abs(value - expected.numpy()) <= TOLERANCE * bound + 1e-12).all()


def value_of(rounded: WeightOnlyLinear) -> torch.Tensor:
    return dequantise(rounded.weight, rounded.scales, rounded.bits, rounded.group)[:, : rounded.in_features]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 48])
def test_every_tile_is_right(bits: int, rows: int) -> None:
    profile = load_profile("x86-host")
    _, rounded = layer_of({"n": 256, "k": 128, "bits": bits, "group": 64, "seed": 0}, bias=False)
    x, count, pick = torch.randn(rows, 128), 1, 0
    while pick < min(count, 10):
        value, _, count = run_kernel(x.numpy(), rounded, profile, pick)
        assert relative_error(torch.from_numpy(value), rounded(x)) < TOLERANCE, pick
        pick += 1


@pytest.mark.parametrize("rows", [2, 24])
def test_several_threads_agree(rows: int) -> None:
    profile = load_profile("x86-host")
    profile = replace(profile, cores=2, target={**profile.target, "num-cores": 2})
    _, rounded = layer_of({"n": 512, "k": 160, "bits": 4, "group": 32, "seed": 1}, bias=False)
    x = torch.randn(rows, 160)
    assert relative_error(torch.from_numpy(run_kernel(x.numpy(), rounded, profile, 0)[0]), rounded(x)) < TOLERANCE


def test_extreme_levels_survive_every_field_of_a_word() -> None:
    """-8 and 7 in every place of the eight that share a word, where a sign or a carry could leak into a neighbour."""
    profile = load_profile("x86-host")
    levels = torch.full((16, 32), 7, dtype=torch.int8)
    for field in range(8):
        levels[field, field::8] = -8
        levels[8 + field] = -8
        levels[8 + field, field::8] = 7
    rounded = WeightOnlyLinear(pack_levels(levels), torch.ones(16, 1), torch.zeros(16), 32, 4, 32)
    for rows in (1, 6):
        x = torch.randint(-9, 10, (rows, 32)).float()  # whole numbers: every sum is exact
        assert torch.equal(torch.from_numpy(run_kernel(x.numpy(), rounded, profile, 0)[0]), rounded(x))


# --- whole models ---


def model_of(bits: int, norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    middle = nn.BatchNorm1d(70) if norm else nn.GELU()
    if isinstance(middle, nn.BatchNorm1d):
        nn.init.normal_(middle.weight)
        nn.init.normal_(middle.bias)
        middle.running_mean.normal_()
        middle.running_var.uniform_(0.5, 2)
    return nn.Sequential(
        weight_only(nn.Linear(100, 70), bits, 32), middle, weight_only(nn.Linear(70, 33, bias=False), bits, 64)
    ).eval()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 100), (2, 9, 100)])
def test_models_compile_and_equal_torch(device: LocalDevice, bits: int, shape: tuple[int, ...]) -> None:
    model, x = model_of(bits), torch.randn(shape)
    compiled = build(model, (x,), device.profile, device.tuner)
    assert relative_error(compiled.run(x), model(x)) < TOLERANCE
    form = "gemv" if shape[:-1] == (1,) else "dense"
    assert [kernel.operator for kernel in compiled.kernels] == [f"{form}_w{bits}"] * 2, "bias and GELU are fused"


@pytest.mark.parametrize("bits", [4, 8])
def test_models_export_to_onnx(tmp_path: Path, bits: int) -> None:
    model, x = model_of(bits), torch.randn(3, 100)
    session = onnx_session(export_onnx(model, (x,), tmp_path / "model.onnx"))
    assert relative_error(run_session(session, x), model(x)) < TOLERANCE


def test_the_onnx_file_stays_small(tmp_path: Path) -> None:
    layer, x, size = nn.Linear(256, 512), torch.randn(1, 256), {}
    for bits in (4, 8):
        path = export_onnx(nn.Sequential(weight_only(layer, bits, 64)), (x,), tmp_path / f"{bits}.onnx")
        size[bits] = path.stat().st_size
    assert size[4] < size[8] < 0.4 * 512 * 256 * 4


def test_batchnorm_folds_into_scales() -> None:
    model, x = model_of(4, norm=True), torch.randn(5, 100)
    folded = fold_batchnorm(model, {"0": "1"})
    assert isinstance(folded[1], nn.Identity)
    assert torch.equal(folded[0].weight, model[0].weight)
    assert relative_error(folded(x), model(x)) < TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_copies_and_saved_models_are_the_same(bits: int) -> None:
    model, x = model_of(bits), torch.randn(2, 100)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    restored = model_of(bits)
    restored.load_state_dict(model.state_dict())
    exported = torch.export.export(model, (x,)).module()
    for other in (copy.deepcopy(model), loaded, restored, exported):
        assert torch.equal(other(x), model(x))
