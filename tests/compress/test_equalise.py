"""Equalisation changes ranges and sizes of rounding errors, never what a model computes."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import nn

from autocomp.accuracy.proxy import kl
from autocomp.compress.equalise import CEILING, equalised, sites
from autocomp.database.calibrate import collect_from
from autocomp.database.database import LayerDatabase
from autocomp.database.stitch import reestimate_batchnorm, stitch
from autocomp.graph.analyse import analyse
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile

torch.set_num_threads(1)
DATA = [(nets.images(96),)]


def separable(activation: type[nn.Module], spread: float = 4.0) -> nn.Module:
    """Two depthwise-separable blocks whose channels have ranges that differ by orders of magnitude."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), activation()]
    for _ in range(2):
        layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), activation()]
        layers += [nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), activation()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    nets.randomise(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            factor = torch.exp(spread * (torch.rand(16) - 0.5))
            module.weight.data.abs_().mul_(factor)
            module.bias.data.mul_(factor)
    return model.eval()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Identity])
def test_outputs_are_exactly_what_they_were(activation):
    model = separable(activation)
    x = nets.images(96)
    graph = analyse(model, (x[:1],))
    same, done = equalised(model, graph, (x[:1],), DATA)
    assert len(done) == 4
    assert all(site.scaled > 0 for site in done)
    assert any(site.gain > 1.5 for site in done)
    with torch.no_grad():
        torch.testing.assert_close(same(x), model(x), rtol=1e-6, atol=1e-6)
    assert not torch.equal(same[3].weight, model[3].weight)


def test_relu6_channels_at_the_ceiling_are_left_alone():
    model = separable(nn.ReLU6, spread=8.0)
    x = nets.images(96)
    seen = model[:3](x).amax((0, 2, 3))
    assert bool((seen == CEILING).any())
    same, done = equalised(model, analyse(model, (x[:1],)), (x[:1],), DATA)
    assert done[0].between == "relu6"
    torch.testing.assert_close(same[:3](x).amax((0, 2, 3))[seen == CEILING], seen[seen == CEILING])
    assert torch.equal(same[1].weight[seen == CEILING], model[1].weight[seen == CEILING])


def test_eight_bits_lose_less_after_it(tmp_path):
    model = separable(nn.ReLU, spread=6.0)
    reestimate_batchnorm(model, DATA)  # else what re-estimation changes later outweighs the rounding
    x = nets.images(1)
    rules = SpaceFile(format_version=1, rules=[Rule(layers="*", precisions=["fp32", "w8a8"])])

    class Target:
        name, lanes, precisions = "test", 8, ("fp32", "w8a8")

    lost = []
    for index in range(2):
        graph = analyse(model, (x,))
        made = equalised(model, graph, (x,), DATA)[0] if index else model
        statistics = collect_from(made, DATA, graph, 96)
        database = LayerDatabase(tmp_path / str(index), made, graph, build_space(graph, rules, Target()), statistics)
        lost.append(kl(stitch(made, graph, database, database.space.uniform(1.0, "w8a8")), statistics))
    assert lost[1] < 0.7 * lost[0], lost


def test_what_has_other_readers_is_no_site():
    net = nets.make(width=16)
    found = sites(net, analyse(net, (nets.images(1),)), (nets.images(1),))
    assert {(site.first, site.second) for site in found} == {
        ("block1.conv1", "block1.conv2"),
        ("block2.conv1", "block2.conv2"),
    }
    assert all(site.between == "relu" and site.norm for site in found)
