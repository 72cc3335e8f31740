"""Calibration and the proxies of accuracy."""

from __future__ import annotations

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import pipeline
from torch import nn

from autocomp.accuracy.proxy import kl, stitch_and_score
from autocomp.accuracy.sensitivity import additive_error, curves
from autocomp.database.calibrate import collect_from, patches
from autocomp.errors import UsageError
from autocomp.graph.analyse import analyse

torch.set_num_threads(1)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
)
def test_patches_times_weights_are_the_convolution(seed, kernel, stride, padding, dilation):
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation, bias=False)
    x = torch.randn(2, 3, 7, 8)
    layer = analyse(conv, (x,)).layers
    layer = layer.get("") or next(iter(layer.values()), None)
    if layer is None:  # a bare convolution has no name to be a layer by
        model = nn.Sequential(conv)
        layer = analyse(model, (x,)).layers["0"]
    rows = patches(x, layer, 10**6, torch.Generator())
    with torch.no_grad():
        expected = conv(x).permute(0, 2, 3, 1).reshape(-1, 4)
        torch.testing.assert_close(rows @ conv.weight.flatten(1).T, expected, rtol=1e-4, atol=1e-5)


def test_statistics_describe_the_inputs():
    made = pipeline("flat")
    seen = made.statistics.layers["hidden"]
    x = torch.relu(made.model.conv(nets.images(96))).flatten(1).detach().double()
    torch.testing.assert_close(seen.mean, x.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.covariance, torch.cov(x.T, correction=0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(seen.high.double(), x.amax(0))
    assert seen.sample.shape == (96, 128)
    assert [x.shape for x in made.statistics.answers[0]] == [(96, 1, 5)]


def test_fisher_predicts_the_divergence_of_a_small_change():
    """A small change of the last layer's weights: the additive error is the divergence, to second order."""
    made = pipeline("flat")
    seen = made.statistics.layers["head"]
    changed = nets.Flat()
    changed.load_state_dict(made.model.state_dict())
    torch.manual_seed(3)
    change = torch.randn_like(changed.head.weight) * 0.02
    changed.head.weight.data += change
    changed.head.bias.data -= change @ seen.mean.float()
    difference = change.double()
    predicted = float((((difference @ seen.covariance) * difference).sum(1) * seen.fisher).sum())
    measured = kl(changed.eval(), made.statistics)
    # The diagonal leaves out how outputs vary together; random changes average that away.
    assert predicted == pytest.approx(measured, rel=0.5)


def test_calibration_is_reproducible_and_named_by_content():
    made = pipeline("flat")
    batches = [(nets.images(96)[:40],), (nets.images(96)[40:],)]
    again = collect_from(made.model, batches, made.graph, 96)
    assert again.fingerprint == made.statistics.fingerprint
    assert torch.equal(again.layers["hidden"].fisher, made.statistics.layers["hidden"].fisher)
    other = collect_from(made.model, batches, made.graph, 50)
    assert other.fingerprint != again.fingerprint
    assert sum(len(batch[0]) for batch in other.batches) == 50
    assert made.model.conv._forward_hooks == {}


def test_a_layer_that_overflows_is_named():
    model = nets.make()
    model.block1.conv2.weight.data.fill_(3e38)
    graph = analyse(model, (nets.images(1),))
    with pytest.raises(UsageError, match=r"layer block1\.conv2 is not finite"):
        collect_from(model, [(nets.images(8),)], graph)


def test_no_samples_is_an_error():
    made = pipeline("flat")
    with pytest.raises(UsageError, match="at least one sample"):
        collect_from(made.model, [], made.graph)


def test_scoring_in_one_pass_is_scoring_the_result(tmp_path):
    made = pipeline()
    database = made.database(tmp_path)
    for candidate in (made.space.dense(), made.space.uniform(0.75), made.space.uniform(0.5, "w8a8")):
        model, score = stitch_and_score(made.model, made.graph, database, candidate)
        assert score == pytest.approx(kl(model, made.statistics), rel=0.1, abs=1e-4)
    assert stitch_and_score(made.model, made.graph, database, made.space.dense())[1] == 0.0


def test_least_squares_and_reestimation_pay(tmp_path):
    """What the pieces are for: each lowers the divergence of the same pruned shape."""
    from autocomp.database.stitch import reestimate_batchnorm, stitch

    made = pipeline()
    database = made.database(tmp_path)
    half = made.space.uniform(0.5)
    whole = stitch_and_score(made.model, made.graph, database, half)[1]
    raw = stitch(made.model, made.graph, database, half, reestimate=False)
    without_norms = kl(raw, made.statistics)
    for name, layer in made.graph.layers.items():
        if layer.in_group is None:
            continue
        kept = database.kept(layer.in_group, half.widths[layer.in_group])
        rows = database.kept(layer.out_group, half.widths[layer.out_group])
        weight = made.model.get_submodule(name).weight.detach()[:, kept]
        raw.get_submodule(name).weight.data = weight if rows is None else weight[rows]
    reestimate_batchnorm(raw, made.statistics.batches)
    assert whole < without_norms
    assert whole < kl(raw, made.statistics)


def test_curves_and_the_additive_error(tmp_path):
    made = pipeline("depthwise")
    tables = made.database(tmp_path).tables()
    rows = curves(tables)
    quantised = {name for name, methods in made.space.methods.items() if any(m.precision != "fp32" for m in methods)}
    assert {row.subject for row in rows if row.kind == "precision"} == quantised
    assert all(row.error > 0 and 0 < row.share < 1 for row in rows if row.kind == "rank")
    stem = [row.error for row in rows if row.kind == "width" and row.subject == "stem"]
    assert len(stem) == len(made.space.widths["stem"]) - 1
    assert stem[0] > 0
    assert stem == sorted(stem)
    assert additive_error(tables, made.space.dense()) == 0.0
    assert additive_error(tables, made.space.uniform(0.25)) > additive_error(tables, made.space.uniform(0.75)) > 0
