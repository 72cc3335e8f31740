"""The classic recipes: what they keep, that nothing is updated, and torch's dynamic int8."""

from __future__ import annotations

import copy

import pytest
import torch
from pipeline import pipeline
from torch import nn

from autocomp.database.orders import norm_order
from autocomp.measurement.classic import classic_models, global_widths
from autocomp.measurement.references import _quantise_dynamic, _state_bytes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory):
    made = pipeline("plain")
    folder = tmp_path_factory.mktemp("classic")
    return made, list(classic_models(made.model, made.graph, made.space, made.statistics, folder))


def test_each_recipe_comes_once_at_each_share(found) -> None:
    _, models = found
    assert [c.name for c in models[:2]] == ["uniform L1, 75% kept", "uniform L1, 50% kept"]
    assert len({c.candidate.id for c in models}) == len(models)
    assert all(
        method.precision == "fp32" and not method.ranks for c in models for method in c.candidate.methods.values()
    )


def test_the_largest_filters_stay_as_they_were(found) -> None:
    made, models = found
    half = next(c for c in models if c.name == "uniform L1, 50% kept")
    group = made.graph.groups["block1.conv1"]
    kept = norm_order(made.model, made.graph, group, 1)[:16].sort().values
    before = norm_order(made.model, made.graph, made.graph.groups["stem"], 1)[:16].sort().values
    dense = made.model.block1.conv1.weight.detach()
    torch.testing.assert_close(half.model.block1.conv1.weight.detach(), dense[kept][:, before])


def test_bytes_are_those_of_the_smaller_tensors(found) -> None:
    made, models = found
    dense = sum(p.numel() * 4 for p in made.model.parameters())
    assert all(0.02 * dense < c.bytes < dense for c in models)
    assert models[1].bytes < models[0].bytes


def test_global_pruning_removes_the_share_it_says_and_more_where_filters_are_small() -> None:
    made = pipeline("plain")
    total = sum(made.space.widths[g][0] for g in made.space.widths if len(made.space.widths[g]) > 1)
    widths = global_widths(made.model, made.graph, made.space, 0.5)
    left = sum(widths[g] for g in made.space.widths if len(made.space.widths[g]) > 1)
    assert 0.35 < left / total < 0.65
    assert widths["head"] == 5
    uneven = copy.deepcopy(made.model)
    with torch.no_grad():
        uneven.block2.conv1.weight[:40] *= 0.01
    widths = global_widths(uneven, made.graph, made.space, 0.75)
    assert widths["block2.conv1"] < made.space.widths["block2.conv1"][0] // 2 + 1
    assert widths["block1.conv1"] > 16
    assert global_widths(made.model, made.graph, made.space, 1.0) == {g: w[0] for g, w in made.space.widths.items()}


def test_torch_dynamic_int8_is_smaller_and_only_for_linear_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    quantised = _quantise_dynamic(model)
    assert quantised is not None
    assert _state_bytes(quantised) < 0.6 * _state_bytes(model)
    x = torch.randn(4, 64)
    torch.testing.assert_close(quantised(x), model(x), rtol=0.1, atol=0.05)
    assert _quantise_dynamic(nn.Sequential(nn.Conv2d(1, 2, 3))) is None
