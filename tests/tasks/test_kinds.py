"""The proxy of accuracy on each kind of output: it is found what the output is, and candidates rank as the real metric ranks them."""

from __future__ import annotations

from dataclasses import replace

import kinds
import numpy as np
import pytest
import torch
from pipeline import Vectors
from scipy.stats import spearmanr

from autocomp.accuracy.proxy import kl, score_early, stitch_and_score
from autocomp.database.calibrate import collect_from
from autocomp.database.database import LayerDatabase
from autocomp.graph.analyse import analyse
from autocomp.graph.canonical import canonical
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile

torch.set_num_threads(1)

# Wide enough a range that what the metric tells apart is more than its own noise (of 1000 samples).
RULE = {"layers": "*", "keep": [1.0, 0.5, 0.25, 0.125], "ranks": [0.25], "precisions": ["fp32", "w8a8", "w4"]}
SPACE = SpaceFile(format_version=1, ends="any", rules=[Rule(**RULE)])
CANDIDATES = 16


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_divergence_ranks_candidates_as_the_metric_does(kind, tmp_path):
    made = kinds.make(kind)
    example = made.calibration[1 if len(made.calibration) > 1 else 0][0][:1]
    made = replace(made, model=canonical(made.model, (example,), made.calibration))
    graph = analyse(made.model, (example,))
    space = build_space(graph, SPACE, Vectors(lanes=4))
    statistics = collect_from(made.model, made.calibration, graph, 128)
    assert [str(output) for output in statistics.comparison.outputs] == kinds.KINDS[kind]
    assert kl(made.model, statistics) == pytest.approx(0, abs=1e-6)
    database = LayerDatabase(tmp_path, made.model, graph, space, statistics)
    rng = np.random.default_rng(0)
    drawn = [space.normalise(space.draw(rng)) for _ in range(CANDIDATES)]
    divergences, losses = [], []
    for candidate in drawn:
        model, divergence = stitch_and_score(made.model, graph, database, candidate)
        divergences.append(divergence)
        with torch.no_grad():
            losses.append(-made.metric(model))
    assert spearmanr(divergences, losses).statistic >= 0.8
    assert np.isfinite(divergences).all()
    worst = drawn[int(np.argmax(divergences))]
    assert score_early(made.model, graph, database, worst) == pytest.approx(max(divergences), rel=0.5)
