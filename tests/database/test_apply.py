"""Stitched candidates are what the same compression applied to the whole model gives."""

from __future__ import annotations

import copy
import io

import nets
import pytest
import torch
from by_hand import by_hand
from families import STRUCTURES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline import pipeline
from torch import nn

from autocomp.database.stitch import reestimate_batchnorm, stitch
from autocomp.graph.fold import fold_batchnorm
from autocomp.layers.w8a8 import QuantConv2d, QuantLinear
from autocomp.records.candidate import Candidate

torch.set_num_threads(1)
KINDS = ("plain", "depthwise", "flat", "odd", *STRUCTURES)


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    made = {}
    for kind in KINDS:
        made[kind] = pipeline(kind).database(tmp_path_factory.mktemp(kind))
    return made


def drawn(space, data):
    widths = {name: data.draw(st.sampled_from(options)) for name, options in space.widths.items()}
    methods = {name: data.draw(st.sampled_from(options)) for name, options in space.methods.items()}
    return space.normalise(Candidate(widths, methods))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stitched_candidate_equals_compressing_the_whole_model(databases, kind):
    made, database = pipeline(kind), databases[kind]

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(data=st.data())
    def check(data):
        candidate = drawn(made.space, data)
        stitched = stitch(made.model, made.graph, database, candidate, reestimate=False)
        x = made.data[:2]
        with torch.no_grad():
            expected = by_hand(made, database, candidate)(x)
            # An activation at a rounding boundary may fall to either side: a step of 8 bits, here and there.
            integer = any(method.precision == "w8a8" for method in candidate.methods.values())
            tolerance = (2e-2 if integer else 1e-4) * float(expected.abs().max())
            torch.testing.assert_close(stitched(x), expected, rtol=0, atol=tolerance)

    check()


def test_the_dense_candidate_is_the_model(databases):
    made = pipeline()
    x = nets.images(3)
    with torch.no_grad():
        assert torch.equal(stitch(made.model, made.graph, databases["plain"], made.space.dense())(x), made.model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_smaller_and_export_copy_save_and_fold(databases, kind):
    made = pipeline(kind)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    widths = {name: options[-1] for name, options in made.space.widths.items()}
    methods = {name: options[-1] for name, options in made.space.methods.items()}
    for candidate in (made.space.uniform(0.5), made.space.uniform(0.5, "w8a8"), Candidate(widths, methods)):
        model = stitch(made.model, made.graph, databases[kind], candidate)
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in made.model.parameters())
        assert not model.training
        x = made.data[:1]
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(copy.deepcopy(model)(x), expected)
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            assert torch.equal(torch.load(file, weights_only=False)(x), expected)
            folded = fold_batchnorm(model, made.graph.norms())
            assert kind == "densenet" or not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
            scale = float(expected.abs().max())
            torch.testing.assert_close(folded(x), expected, rtol=0, atol=2e-2 * scale)
    assert all(torch.equal(before[name], value) for name, value in made.model.state_dict().items())


def test_bytes_of_the_tables_are_those_of_the_folded_model(databases):
    made, database = pipeline(), databases["plain"]
    for candidate in (made.space.dense(), made.space.uniform(0.5), made.space.uniform(0.5, "w8a8")):
        total = made.graph.other_bytes
        for table in database.tables():
            i = 0 if table.in_group is None else table.widths_in.index(candidate.widths[table.in_group])
            o = table.widths_out.index(candidate.widths[table.out_group])
            total += table.bytes[i, o, table.methods.index(candidate.methods[table.layer])]
        folded = fold_batchnorm(stitch(made.model, made.graph, database, candidate))
        assert total == sum(tensor.nbytes for tensor in folded.state_dict().values())


def test_wasted_ranks_are_normalised_away(databases):
    made = pipeline()
    widths = {name: options[-1] for name, options in made.space.widths.items()}
    methods = {name: options[-1] for name, options in made.space.methods.items()}
    assert methods["block1.conv1"].ranks
    model = stitch(made.model, made.graph, databases["plain"], Candidate(widths, methods))
    assert isinstance(model.block1.conv1, QuantConv2d)
    assert isinstance(model.head, QuantLinear)


def test_reestimation_gives_every_norm_its_own_data(databases):
    made = pipeline()
    model = stitch(made.model, made.graph, databases["plain"], made.space.uniform(0.5), reestimate=False)
    batches = made.statistics.batches
    answers = reestimate_batchnorm(model, batches)
    seen = {}
    for name in ("bn", "block2.bn2"):
        norm = model.get_submodule(name)
        norm.register_forward_pre_hook(lambda module, inputs, name=name: seen.__setitem__(name, inputs[0]))
    with torch.no_grad():
        again = model(*batches[0])
    for name, x in seen.items():
        norm = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)), rtol=2e-3, atol=1e-4)
        assert norm.momentum == 0.1
        assert not norm.training
    torch.testing.assert_close(answers[0], again, rtol=1e-2, atol=1e-2)
