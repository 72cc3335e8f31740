"""Layers too wide for a whole Hessian: its diagonal stands for it (`compress.hessian`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from autocomp.compress.hessian import WIDE
from autocomp.compress.rounding import Metric
from autocomp.database import orders
from autocomp.database.calibrate import LayerStatistics, collect_from
from autocomp.database.entry import compress_layer
from autocomp.graph.analyse import analyse
from autocomp.hardware.profile import load_profile
from autocomp.records.candidate import Method
from autocomp.space.build import build_space
from autocomp.space.file import load_space

torch.set_num_threads(1)
F64 = torch.float64


def layer_of(columns, outputs):
    model = nn.Sequential(nn.Linear(3, columns), nn.ReLU(), nn.Linear(columns, outputs))
    return model, analyse(model, (torch.randn(1, 3),)).layers["2"]


@pytest.mark.parametrize("kept", [None, torch.arange(0, 64, 2)])
@pytest.mark.parametrize("method", ["fp32", "w8a8", "w4", "vq4", "fp16"])
def test_a_diagonal_hessian_says_what_the_same_written_whole_does(kept, method):
    torch.manual_seed(0)
    model, layer = layer_of(64, 8)
    own = torch.rand(64, dtype=F64) + 0.1
    sample = torch.randn(256, 64)
    whole = LayerStatistics(
        torch.randn(64, dtype=F64), own.diag(), torch.rand(8, dtype=F64), sample, sample.amin(0), sample.amax(0)
    )
    width = 64 if kept is None else len(kept)
    by_whole, by_diagonal = (
        compress_layer(model[2], layer, seen, kept, width, [Method.parse(method)])[Method.parse(method)]
        for seen in (whole, replace(whole, covariance=own))
    )
    torch.testing.assert_close(by_whole.error, by_diagonal.error, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(by_whole.parts[0].weight, by_diagonal.parts[0].weight)


def test_orderings_agree_with_those_of_the_same_hessian_written_whole():
    torch.manual_seed(1)
    own, weight, fisher = torch.rand(12) + 0.1, torch.randn(5, 12), torch.rand(5)
    blocks = tuple(torch.arange(3 * unit, 3 * unit + 3) for unit in range(4))
    whole, diagonal = (orders.Reader(weight, h, fisher, torch.arange(4), blocks) for h in (own.diag(), own))
    order = orders.obs_order([whole], 4, 1)
    assert torch.equal(order, orders.obs_order([diagonal], 4, 1))
    torch.testing.assert_close(whole.errors(order), diagonal.errors(order))


def test_padded_and_noisy_keep_a_diagonal():
    own = torch.rand(6, dtype=F64) + 0.1
    metric, whole = Metric(own), Metric(own.diag())
    noise, rows = torch.rand(6, dtype=F64), torch.randn(3, 6, dtype=F64)
    torch.testing.assert_close(metric.noisy(noise).error(rows), whole.noisy(noise).error(rows))
    torch.testing.assert_close(metric.padded(8).diagonal(), whole.padded(8).diagonal())
    assert torch.equal(metric.better(rows, 2 * rows), whole.better(rows, 2 * rows))


def test_a_model_with_a_very_wide_layer_is_calibrated_and_compressed():
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(12), nn.Flatten(), nn.Linear(64 * 144, 10)
    )
    example = (torch.randn(1, 3, 16, 16),)
    graph = analyse(model, example)
    seen = collect_from(model, [(torch.randn(16, 3, 16, 16),)], graph).layers["4"]
    assert graph.layers["4"].columns > WIDE
    assert seen.covariance.shape == (64 * 144,)
    space = build_space(graph, load_space("default"), [load_profile("x86-host")])
    assert not any(method.ranks for method in space.methods["4"])
    entries = compress_layer(model[4], graph.layers["4"], seen, torch.arange(32 * 144), 32, [Method(), Method("w8a8")])
    for entry in entries.values():
        assert bool((entry.error > 0).all())
    assert entries[Method()].error.sum() < entries[Method("w8a8")].error.sum()
