"""Weights that a precision does not hold: what stores them so is never chosen, and costs the run nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pipeline import Vectors
from torch import nn

from autocomp.accuracy.sensitivity import curves
from autocomp.database.calibrate import collect_from
from autocomp.database.database import LayerDatabase
from autocomp.graph.analyse import analyse
from autocomp.graph.canonical import canonical
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile
from autocomp.study.solver import Factor, make_problem, solve_front

torch.set_num_threads(1)
HALF = SpaceFile(
    format_version=1,
    ends="any",
    rules=[Rule(layers="*", keep=[1.0, 0.5], ranks=[0.25], precisions=["fp32", "fp16", "w8a8"])],
)


def test_weights_beyond_fp16_have_an_infinite_error_in_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4)).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e6)
        model[2].weight.mul_(1e-6)
    data = torch.randn(192, 64)
    model = canonical(model, (data[:1],))
    graph = analyse(model, (data[:1],))
    space = build_space(graph, HALF, Vectors(precisions=("fp32", "fp16", "w8a8")))
    database = LayerDatabase(tmp_path, model, graph, space, collect_from(model, [(data,)], graph, 192))
    first, last = database.tables()
    at = [m for m, method in enumerate(first.methods) if method.precision == "fp16"]
    assert len(at) == 2, "with all of its rank, and with a part"
    assert np.isinf(first.error[..., at]).all()
    assert np.isfinite(np.delete(first.error, at, axis=2)).all()
    beyond = [method.precision == "fp16" for method in last.methods]
    assert np.isinf(last.error[..., beyond]).all(), "its inputs are beyond fp16"
    assert all(np.isfinite(row.error) for row in curves([first, last]))
    database.dominated([Vectors()])
    factors = [
        Factor(**vars(table), seconds=1.0 / (1 + np.arange(table.error.size).reshape(table.error.shape)))
        for table in (first, last)
    ]
    found = solve_front(make_problem(factors, space.widths), 8)
    assert found
    assert all(method.precision != "fp16" for candidate in found for method in candidate.methods.values())
