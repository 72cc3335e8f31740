"""Candidates without some of their branches: what is left, what it computes, and what it is thought to cost."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline import EVERYTHING, Vectors, pipeline
from torch import nn

from autocomp.accuracy.additive import additive_model
from autocomp.database.stitch import stitch
from autocomp.layers.narrow import with_weights
from autocomp.records.candidate import Candidate, Method
from autocomp.space.build import build_space
from autocomp.space.file import Rule

torch.set_num_threads(1)
KINDS = ("plain", "inverted", "conformer", "torch's encoder", "grouped heads", "summed")
DEPTH = EVERYTHING.model_copy(update={"rules": [*EVERYTHING.rules, Rule(layers="*", depth=True)]})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    made = {}
    for kind in KINDS:
        known = pipeline(kind)
        made[kind] = replace(known, space=build_space(known.graph, DEPTH, Vectors()))
    return {kind: (p, p.database(tmp_path_factory.mktemp("layers"))) for kind, p in made.items()}


def drawn(space, data):
    widths = {name: data.draw(st.sampled_from(options)) for name, options in space.widths.items()}
    methods = {name: data.draw(st.sampled_from(options)) for name, options in space.methods.items()}
    return Candidate(widths, methods)


def whole(space, candidate):
    """The candidate with its branches there, at full width."""
    lost = {g for name in space.left_out(candidate.widths) for g in space.graph.branches[name].groups}
    return Candidate(
        {g: space.widths[g][0] if g in lost else w for g, w in candidate.widths.items()}, candidate.methods
    )


@pytest.mark.parametrize("kind", KINDS)
def test_without_branches_a_candidate_is_itself_with_constants_for_them(made, kind):
    pipeline, database = made[kind]
    space, graph = pipeline.space, pipeline.graph
    assert any(0 in widths for widths in space.widths.values())

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(data=st.data())
    def check(data):
        candidate = space.normalise(drawn(space, data))
        left_out = space.left_out(candidate.widths)
        small = stitch(pipeline.model, graph, database, candidate, reestimate=False)
        blind = copy.deepcopy(stitch(pipeline.model, graph, database, whole(space, candidate), reestimate=False))
        for end in (end for name in left_out for end in graph.branches[name].ends):
            rows = database.rows(end, candidate.widths.get(graph.layers[end].out_group or "", 0))
            module = pipeline.model.get_submodule(end)
            weight = torch.zeros_like(module.weight if rows is None else module.weight[rows])
            blind.set_submodule(end, with_weights(module, weight, database.entry(end, 0, Method()).constant(rows)))
        x = pipeline.data[:3]
        with torch.no_grad():
            # An activation at a rounding boundary may fall to either side: a step of 8 bits, here and there.
            integer = any(method.precision == "w8a8" for method in candidate.methods.values())
            expected = blind(x)
            tolerance = (2e-2 if integer else 1e-4) * float(expected.abs().max())
            torch.testing.assert_close(small(x), expected, rtol=0, atol=tolerance)
        gone = {layer for name in left_out for layer in (*graph.branches[name].layers, *graph.branches[name].ends)}
        assert not gone & {name for name, module in small.named_modules() if type(module) is not nn.Module}

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_normalised_branches_go_whole_and_stay_so(made, kind):
    space = made[kind][0].space

    @settings(max_examples=100, deadline=None, database=None)
    @given(data=st.data())
    def check(data):
        candidate = space.normalise(drawn(space, data))
        assert space.normalise(candidate) == candidate
        for name, branch in space.graph.branches.items():
            if candidate.widths[name] == 0:
                assert all(candidate.widths[group] == 0 for group in branch.groups)
        zeros = {name for name, width in candidate.widths.items() if width == 0}
        assert zeros == {g for n in space.left_out(candidate.widths) for g in space.graph.branches[n].groups}

    check()


def test_the_mean_is_the_best_constant_and_the_error_is_what_is_lost(made):
    pipeline, database = made["plain"]
    for branch in pipeline.graph.branches.values():
        for end in branch.ends:
            entry, seen = database.entry(end, 0, Method()), pipeline.statistics.layers[end]
            weight = pipeline.model.get_submodule(end).weight.detach().double().flatten(1)
            varies = torch.einsum("ok,kl,ol->o", weight, seen.covariance, weight)
            torch.testing.assert_close(entry.error, seen.fisher * varies)
            bias = pipeline.model.get_submodule(end).bias
            mean = weight @ seen.mean + (0 if bias is None else bias.detach().double())
            torch.testing.assert_close(entry.constant(), mean.float())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_has_no_bytes_but_its_constants_and_no_error_but_its_ends(made, kind):
    pipeline, database = made[kind]
    space, graph = pipeline.space, pipeline.graph
    tables = {table.layer: table for table in database.tables()}
    for name, branch in graph.branches.items():
        candidate = space.normalise(Candidate({**space.dense().widths, name: 0}, space.dense().methods))
        for layer in branch.layers:
            table = tables[layer]
            at = tuple(
                0 if group is None else widths.index(candidate.widths[group])
                for group, widths in ((table.in_group, table.widths_in), (table.out_group, table.widths_out))
            )
            assert table.error[at][0] == 0
            assert table.bytes[at][0] == 0
        for end in branch.ends:
            table = tables[end]
            assert table.bytes[table.widths_in.index(0), 0, 0] == 4 * graph.layers[end].out_channels
            assert np.isfinite(table.error).all()


def test_a_space_that_does_not_ask_for_depth_offers_none(made):
    pipeline, _ = made["plain"]
    space = build_space(pipeline.graph, EVERYTHING, Vectors())
    assert all(0 not in widths for widths in space.widths.values())


def test_a_protected_layer_keeps_its_branch(made):
    pipeline, _ = made["plain"]
    branch = next(iter(pipeline.graph.branches.values()))
    kept = build_space(pipeline.graph, DEPTH.model_copy(update={"protect": [branch.ends[0]]}), Vectors())
    assert 0 not in kept.widths[branch.groups[0]]
    assert any(r.option == "depth" and "protected" in r.reason for r in kept.refused)


def test_a_branch_that_goes_is_fitted_apart_from_the_rest(made):
    """Errors of branches left out, foreseen roughly, take nothing from what is said of small changes."""
    pipeline, database = made["plain"]
    space, rng = pipeline.space, np.random.default_rng(0)
    model = additive_model(database.tables())
    drawn = [space.draw(rng) for _ in range(80)]
    gone = [0 in candidate.widths.values() for candidate in drawn]
    assert 10 < sum(gone) < 40  # a third
    wild = rng.uniform(1, 50, len(drawn))
    told = [(2 * model.predict([c])[0] + 1e-6) * (wild[k] if gone[k] else 1) for k, c in enumerate(drawn)]
    fitted = model.fitted(drawn, told)
    alone = model.fitted(*zip(*[(c, t) for c, t, g in zip(drawn, told, gone, strict=True) if not g], strict=True))
    rest = [candidate for candidate, left in zip(drawn, gone, strict=True) if not left]
    np.testing.assert_allclose(fitted.predict(rest), alone.predict(rest))
    left = [k for k, one in enumerate(gone) if one]
    assert fitted.predict([drawn[k] for k in left]).mean() > model.predict([drawn[k] for k in left]).mean()
