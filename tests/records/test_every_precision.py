"""Each precision of the table through every stage: compressed, stitched, written and read, imported, compiled, exported, reckoned.

On this machine everything is compiled and run; kernels for a Cortex-A76 run in the emulator, so that those of Arm are walked everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulated import lowered, run_module
from pipeline import Vectors
from torch import Tensor, nn

from autocomp.compiler.verify import coarsest, compare
from autocomp.database.calibrate import collect_from
from autocomp.database.database import LayerDatabase
from autocomp.database.stitch import stitch
from autocomp.devices.latency import layer_work
from autocomp.devices.local import LocalDevice
from autocomp.export.onnx import export_onnx, onnx_session, run_session
from autocomp.graph.analyse import analyse
from autocomp.graph.canonical import canonical
from autocomp.graph.fold import fold_batchnorm
from autocomp.graph.graph import Layer
from autocomp.graph.structure import describe, rebuild
from autocomp.hardware.profile import load_profile
from autocomp.kernels import templates
from autocomp.layers.decode import decoded
from autocomp.layers.part import Stored
from autocomp.records.candidate import Candidate, Method
from autocomp.records.precisions import ARITHMETICS, FLOAT32, FORMATS, FP32, PRECISIONS, Precision, arithmetic_of
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile
from autocomp.space.space import has_kernel
from autocomp.tuning.roofline import position, roofline
from autocomp.tuning.store import KernelRecord

torch.set_num_threads(1)
EVERY = SpaceFile(format_version=1, ends="any", rules=[Rule(layers="*", precisions=list(PRECISIONS))])
# What a weight loses at most, of its output: random weights, the hardest there are, on 8 bits or more, 3 or 4, and fewer.
LOST = {8: 0.05, 3: 0.4, 1: 0.8}


@dataclass(frozen=True)
class Made:
    """A model of one layer, what it was calibrated on, and the layer by every precision."""

    model: nn.Module
    layer: Layer
    x: Tensor
    database: LayerDatabase

    def compressed(self, precision: Precision) -> nn.Module:
        space = self.database.space
        candidate = Candidate(space.dense().widths, {self.layer.name: Method(precision)})
        return fold_batchnorm(stitch(self.model, self.database.graph, self.database, candidate))


# Large enough that the largest codebook pays.
LAYERS = {
    "linear": (nn.Linear(192, 192), (3, 192)),
    "convolution": (nn.Conv2d(64, 64, 3, padding=1, bias=False), (1, 64, 5, 4)),
}


@pytest.fixture(scope="module", params=list(LAYERS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    layer, shape = LAYERS[request.param]
    layer.reset_parameters()
    x, data = torch.randn(shape), torch.randn(64, *shape[1:])
    model = canonical(nn.Sequential(layer, nn.ReLU()).eval(), (x,))
    graph = analyse(model, (x,))
    space = build_space(graph, EVERY, Vectors(precisions=PRECISIONS))
    statistics = collect_from(model, [(data,)], graph, 64)
    database = LayerDatabase(tmp_path_factory.mktemp("layers"), model, graph, space, statistics)
    (described,) = graph.layers.values()
    assert {method.precision for method in space.methods[described.name]} == set(PRECISIONS)
    return Made(model, described, x, database)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_is_stored_in_the_bytes_and_as_closely_as_the_table_says(made: Made, precision: Precision) -> None:
    form, model = FORMATS[precision], made.compressed(precision)
    kept = [module for module in model.modules() if isinstance(module, Stored)]
    assert [module.family for module in kept] == ([] if precision == FP32 else [form.family])
    assert coarsest(model) is form.family.arithmetic
    tensors = [*model.parameters(), *model.buffers()]
    bias = 4 * made.layer.out_channels * (precision != FP32 or made.layer.bias)
    weight = form.weight_bytes(made.layer.out_channels, made.layer.columns, made.layer.kind == "linear")
    assert sum(tensor.nbytes for tensor in tensors) == weight + bias
    with torch.no_grad():
        expected, value = made.model(made.x), model(made.x)
    assert float((value - expected).norm() / expected.norm()) < next(lost for b, lost in LOST.items() if form.bits >= b)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_file_and_onnx_hold_it(made: Made, precision: Precision, tmp_path: Path) -> None:
    model = made.compressed(precision)
    structure, tensors = describe(model)
    with torch.no_grad():  # torch's own products depend on where in memory a weight lies
        torch.testing.assert_close(rebuild(structure, tensors)(made.x), model(made.x), rtol=1e-5, atol=1e-5)
    session = onnx_session(export_onnx(model, (made.x,), tmp_path / "model.onnx"), exact=True)
    compare(model, lambda x: run_session(session, x), [(made.x,)], "model.onnx")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_is_compiled_here(made: Made, precision: Precision, device: LocalDevice) -> None:
    family = FORMATS[precision].family
    if not family.decodes and precision not in device.profile.precisions:
        pytest.skip(f"this processor has no kernels in {precision}, which is never decoded")
    model = made.compressed(precision)
    compiled = device.compile(model, [(made.x,)])  # which compares with torch
    operators = {kernel.operator for kernel in compiled.kernels}
    for forms in _operators(made, precision, device):
        assert forms & operators
    if family.arithmetic.exact:
        with torch.no_grad():
            assert torch.equal(compiled.run(made.x), model(made.x))


def _operators(made: Made, precision: Precision, device: LocalDevice) -> list[set[str]]:
    """Of each kernel of the layer, the templates that it may have."""
    work = layer_work(made.layer, Method(precision), device.profile)
    return [{each.template, *([each.instead.template] if each.instead else [])} for each in work]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_its_kernels_for_another_processor_run_in_the_emulator(made: Made, precision: Precision) -> None:
    profile = load_profile("cortex-a76")
    model = decoded(made.compressed(precision), profile.precisions)
    if precision != FP32 and not has_kernel(made.layer, precision, profile):
        assert not any(isinstance(module, Stored) for module in model.modules())  # it is fp32's kernel by then
        return
    mod = lowered(model, made.x, profile)
    anchors = [templates.describe(function) for name, function in mod.functions.items() if name.name_hint != "main"]
    (work,) = layer_work(made.layer, Method(precision), profile)
    assert (work.template, work.spatial, work.reduction) in [(a.template, a.spatial, a.reduction) for a in anchors]
    value = torch.from_numpy(run_module(mod, made.x, profile))
    compare(model, lambda _: value, [(made.x,)], "the emulated model")
    if FORMATS[precision].family.arithmetic.exact:
        with torch.no_grad():
            assert torch.equal(value, model(made.x))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_its_kernels_stand_under_a_roofline(made: Made, precision: Precision) -> None:
    profile = load_profile("cortex-a76")
    limits = roofline(
        KernelRecord(f"peak-{each.name}-v1", each.template("dense"), {}, 1e-3, 32 // each.bits * 10**6, 1)
        for each in ARITHMETICS.values()
    )
    (work,) = layer_work(made.layer, Method(precision), profile)
    record = KernelRecord("k", work.template, {}, 1e-3, 10**6, 1, work.spatial, work.reduction)
    place = position(record, limits)
    form, covered = FORMATS[precision], has_kernel(made.layer, precision, profile)
    assert arithmetic_of(work.template) is (form.family.arithmetic if covered else FLOAT32)
    assert place.peak_fraction == pytest.approx(arithmetic_of(work.template).bits / 32)
    assert place.intensity is not None
    assert 10**6 / place.intensity > made.layer.weights * (form.bits if covered else 32) / 8
