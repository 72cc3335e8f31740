"""Layers in every precision: stitched, stored, folded, exported and compiled as what they say they are."""

from __future__ import annotations

import copy
import io
import math

import nets
import onnx
import pytest
import torch
from by_hand import by_hand
from pipeline import STORABLE, STORED, Vectors, pipeline
from torch import nn

from autocomp.database.stitch import stitch
from autocomp.export.onnx import export_onnx, onnx_session, run_session
from autocomp.graph.fold import fold_batchnorm
from autocomp.layers.decode import decoded, float_module
from autocomp.layers.fp16 import halved
from autocomp.layers.part import Stored
from autocomp.records.candidate import Candidate, Method
from autocomp.space.build import build_space

torch.set_num_threads(1)
LOSSY = [precision for precision in STORABLE if precision != "fp32"]


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    return {
        kind: pipeline(kind).database(tmp_path_factory.mktemp("layers")) for kind in ("plain stored", "flat stored")
    }


def candidate(made, precision, ranks):
    """Half of every width, the precision wherever it is offered, factorised where it can be if ``ranks``."""
    methods = {}
    for name, options in made.space.methods.items():
        fitting = [m for m in options if m.precision == precision and bool(m.ranks) == ranks]
        plain = [m for m in options if m.precision == precision]
        methods[name] = (fitting or plain or options)[-1 if fitting else 0]
    widths = {name: options[-1] for name, options in made.space.widths.items()}
    return made.space.normalise(Candidate(widths, methods))


@pytest.mark.parametrize("precision", LOSSY)
@pytest.mark.parametrize("kind", ["plain stored", "flat stored"])
def test_a_stitched_candidate_is_its_entries_and_takes_the_bytes_it_says(databases, kind, precision):
    made, database = pipeline(kind), databases[kind]
    for ranks in (False, True):
        chosen = candidate(made, precision, ranks)
        if not any(method.precision == precision for method in chosen.methods.values()):
            continue
        model = stitch(made.model, made.graph, database, chosen, reestimate=False)
        x = nets.images(2)
        with torch.no_grad():
            expected = by_hand(made, database, chosen)(x)
            tolerance = (2e-2 if precision in ("w8a8", "fp16") else 1e-4) * float(expected.abs().max())
            torch.testing.assert_close(model(x), expected, rtol=0, atol=tolerance)
            folded = fold_batchnorm(model, made.graph.norms())
            torch.testing.assert_close(folded(x), model(x), rtol=0, atol=10 * tolerance)
        total = made.graph.other_bytes
        for table in database.tables():
            i = 0 if table.in_group is None else table.widths_in.index(chosen.widths[table.in_group])
            o = table.widths_out.index(chosen.widths[table.out_group])
            total += table.bytes[i, o, table.methods.index(chosen.methods[table.layer])]
        assert total == sum(tensor.nbytes for tensor in folded.state_dict().values())
        file = io.BytesIO()
        torch.save(folded.state_dict(), file)
        assert file.getbuffer().nbytes < total + 1200 * len(folded.state_dict()) + 4096  # what the format itself takes


@pytest.mark.parametrize("precision", ["fp16", "w8", "w4g32", "vq4", "rvq4"])
def test_stored_models_copy_export_and_decode(databases, precision, tmp_path):
    made, database = pipeline("plain stored"), databases["plain stored"]
    chosen = candidate(made, precision, ranks=False)
    model = fold_batchnorm(
        stitch(made.model, made.graph, database, Candidate(made.space.dense().widths, chosen.methods))
    )
    x = nets.images(1)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
        plain = decoded(model, ("fp32",))
        kept = [module for module in plain.modules() if isinstance(module, Stored)]
        assert all(type(module).__name__ == "WeightOnlyLinear" for module in kept)  # the one that has a kernel
        scale = float(expected.abs().max())
        torch.testing.assert_close(plain(x), expected, rtol=0, atol=(2e-3 if precision == "fp16" else 1e-5) * scale)
        path = export_onnx(model, (x,), tmp_path / "model.onnx")
        answer = run_session(onnx_session(path, exact=True), x)
        torch.testing.assert_close(answer, expected, rtol=0, atol=(5e-3 if precision == "fp16" else 1e-4) * scale)
    float32 = [math.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer if tensor.data_type == 1]
    assert (
        max(float32) < 64 * 32 * 9
    )  # no large kernel is written decoded; constants below 8 KiB the exporter folds itself


def test_what_has_kernels_is_not_decoded():
    model = nn.Sequential(halved(nn.Conv2d(1, 4, 3)), nn.ReLU())
    assert decoded(model, ("fp32", "fp16")) is model
    assert isinstance(decoded(model, ("fp32",))[0], nn.Conv2d)
    assert isinstance(decoded(halved(nn.Linear(3, 4)), ("fp32",)), nn.Linear)
    line = halved(nn.Conv1d(2, 3, 3, padding=1))
    x = torch.randn(1, 2, 8)
    torch.testing.assert_close(float_module(line)(x), line(x), rtol=0, atol=1e-2)
    with pytest.raises(TypeError, match="ReLU"):
        float_module(nn.ReLU())


def test_ends_are_protected_and_codebooks_must_pay(databases):
    made = pipeline("plain stored")
    assert any("outweigh" in refusal.reason for refusal in made.space.refused)
    assert Method("w4g32") in made.space.methods["head"]
    guarded = build_space(made.graph, STORED.model_copy(update={"ends": "8bit"}), Vectors())
    assert Method("w8") in guarded.methods["head"]
    assert Method("w4g32") not in guarded.methods["head"]
    assert any(r.subject == "stem" and r.option == "w4g32" and "first layer" in r.reason for r in guarded.refused)
    floats = build_space(made.graph, STORED.model_copy(update={"ends": "float"}), Vectors())
    assert {method.precision for method in floats.methods["head"]} == {"fp32", "fp16"}
    fast = build_space(made.graph, STORED.model_copy(update={"kernels_only": True}), Vectors())
    assert {method.precision for method in fast.methods["block1.conv1"]} == {"fp32", "w8a8"}
    assert Method("w4g32") in fast.methods["head"]  # linear layers have kernels for it
