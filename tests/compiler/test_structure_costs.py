"""What narrowed structures are thought to cost, and that they compile: attention's products follow the heads."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import STRUCTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import EVERYTHING, pipeline
from zoo import ZOO, like

from autocomp.database.calibrate import collect_from
from autocomp.database.database import LayerDatabase
from autocomp.database.stitch import stitch
from autocomp.devices.latency import LatencyModel
from autocomp.devices.local import LocalDevice
from autocomp.graph.analyse import analyse
from autocomp.graph.canonical import canonical
from autocomp.hardware.profile import load_profile
from autocomp.records.candidate import Candidate
from autocomp.space.build import build_space
from autocomp.study.costs import Costs
from autocomp.tuning.store import KernelStore

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    made = {}
    for kind in STRUCTURES:
        net = pipeline(kind)
        database = net.database(tmp_path_factory.mktemp("layers"))
        device = SimpleNamespace(model=LatencyModel(load_profile("x86-64-v3"), {"fp32": 1e11, "int8": 3e11}))
        made[kind] = Costs(net.graph, net.space, database.tables(), {"one": device})
    return made


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(STRUCTURES), data=st.data())
def test_the_tables_add_up_to_what_a_candidate_is_predicted_to_take(costs, kind, data):
    space = pipeline(kind).space
    widths = {name: data.draw(st.sampled_from(options)) for name, options in space.widths.items()}
    methods = {name: data.draw(st.sampled_from(options)) for name, options in space.methods.items()}
    candidate = space.normalise(Candidate(widths, methods))
    cost = costs[kind].problem().cost(candidate)
    np.testing.assert_allclose(cost.seconds, costs[kind].relative([candidate])["one"][0], rtol=1e-9)


@pytest.mark.parametrize("kind", ["fused, in chunks", "grouped heads"])
def test_fewer_heads_are_less_attention(costs, kind):
    graph = pipeline(kind).graph
    heads = next(group for group in graph.groups.values() if group.attention)
    assert len(heads.attention) == 2  # scores, and the values mixed by them
    model = costs[kind].devices["one"].model
    full, half = (model.attention_seconds(heads, width)[0] for width in (heads.width, heads.width // 2))
    assert half < full
    # Every head is one product of tokens by tokens; a group of heads that share keys is several.
    assert sum(a.batch * heads.width for a in heads.attention) == 2 * 4
    assert {(a.m, a.n) for a in heads.attention} == {(6, 6), (6, 8)}


@pytest.mark.slow  # kernels of two models are tuned and compiled
@pytest.mark.parametrize("name", ["vit_tiny", "conformer_s"])
def test_narrowed_transformers_compile_to_what_torch_computes(name, tmp_path):
    model, inputs = ZOO[name](small=True)
    profile = load_profile("x86-host")
    device = LocalDevice(profile, KernelStore.open(profile, tmp_path / "store"))
    device.tuner.budget = 1
    model = canonical(model, inputs)
    graph = analyse(model, inputs)
    space = build_space(graph, EVERYTHING, profile)
    data = torch.cat([like(inputs, seed)[0] for seed in range(16)])
    database = LayerDatabase(tmp_path / "layers", model, graph, space, collect_from(model, [(data,)], graph, 16))
    for candidate in (space.uniform(0.5), space.uniform(0.34, "w8a8")):
        narrowed = {name for name, width in candidate.widths.items() if width < graph.groups[name].width}
        assert any(graph.groups[name].attention for name in narrowed)
        small = stitch(model, graph, database, candidate)
        device.compile(small, [inputs])  # compares with torch
