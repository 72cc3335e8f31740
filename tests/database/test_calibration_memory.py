"""Calibration takes as many samples at once as fit, and says the same whatever that number is."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import nn

from autocomp.database import calibrate
from autocomp.database.calibrate import collect_from
from autocomp.errors import UsageError
from autocomp.graph.analyse import analyse

torch.set_num_threads(1)


def test_smaller_passes_see_the_same(monkeypatch):
    model, data = nets.make(width=16), nets.images(24)
    graph = analyse(model, (data[:1],))
    whole = collect_from(model, [(data,)], graph, 24)
    sizes = []
    monkeypatch.setattr(calibrate, "ACTIVATIONS", 600_000)
    real = calibrate._pass_size
    monkeypatch.setattr(calibrate, "_pass_size", lambda *given: sizes.append(real(*given)) or sizes[-1])
    parts = collect_from(model, [(data,)], graph, 24)
    assert 1 <= sizes[0] < 24
    for name, seen in whole.layers.items():
        torch.testing.assert_close(parts.layers[name].covariance, seen.covariance, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts.layers[name].low, seen.low)
    torch.testing.assert_close(parts.answers, whole.answers)


def test_batches_of_other_shapes_are_calibrated_too():
    model, data = nets.make(width=16), nets.images(8)
    graph = analyse(model, (data[:1],))
    wide = torch.nn.functional.interpolate(data, size=(16, 20))
    seen = collect_from(model, [(data,), (wide,)], graph, 16)
    assert len(seen.batches) == 2
    assert [rows[0].shape for rows in seen.answers] == [(8, 1, 5)] * 2


def test_inputs_that_never_change_leave_a_hessian_that_can_be_used(tmp_path):
    """All pictures alike: covariances of rank 0 or 1, damped, and every method still finite."""
    from pipeline import EVERYTHING, Vectors

    from autocomp.database.database import LayerDatabase
    from autocomp.space.build import build_space

    model = nets.make(width=16)
    data = torch.ones(8, 1, 12, 12)
    graph = analyse(model, (data[:1],))
    space = build_space(graph, EVERYTHING, Vectors())
    statistics = collect_from(model, [(data,)], graph, 8)
    database = LayerDatabase(tmp_path, model, graph, space, statistics)
    database.build()
    for table in database.tables():
        assert torch.isfinite(torch.from_numpy(table.error)).all()


def test_a_layer_that_overflows_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    model[0].weight.data.fill_(3e38)
    graph = analyse(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), (torch.ones(1, 4),))
    with pytest.raises(UsageError, match="layer 0 is not finite"):
        collect_from(model, [(torch.full((2, 4), 1e3),)], graph, 2)
