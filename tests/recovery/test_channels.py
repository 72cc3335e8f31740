"""Channels that are chosen while training: fewer and fewer, those of the largest feature maps, and what is left is the candidate."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import tiny_task
import torch
from test_train import same
from torch import nn

import autocomp
from autocomp.database.calibrate import Statistics
from autocomp.database.database import LayerDatabase
from autocomp.database.stitch import stitch
from autocomp.errors import UsageError
from autocomp.hardware.profile import load_profile
from autocomp.progress import Progress
from autocomp.records.candidate import Candidate, Method
from autocomp.recovery.channels import Channels, Wide, units_of
from autocomp.recovery.lessons import Teaching
from autocomp.recovery.one import recovered
from autocomp.recovery.recipe import Recipe, load_recipe
from autocomp.recovery.schedules import Span
from autocomp.recovery.train import STOPPED, train
from autocomp.run.prepare_task import PreparedTask, compressed_layers, prepare_task
from autocomp.space.file import SpaceFile

STAGES = [
    {"name": "channels", "share": 0.5, "rounding": False, "channels": "refreshed"},
    {"name": "integers", "share": 0.5, "features": 0.1},
]
RECIPE = Recipe(format_version=1, stages=STAGES, learning_rate=3e-3)


@cache
def prepared(folder: Path) -> tuple[PreparedTask, Statistics, LayerDatabase]:
    rule = {"layers": "*", "keep": [1.0, 0.5], "ranks": [0.25], "precisions": ["fp32", "w8a8", "w4"]}
    rules = SpaceFile.model_validate({"format_version": 1, "rules": [rule]})
    ready = prepare_task(tiny_task.learning(), rules, [load_profile("x86-host")], 64)
    return ready, *compressed_layers(ready, folder, 64, 0, Progress())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


def parts(folder: Path, precision: str = "w8a8") -> tuple[nn.Module, Wide, Candidate, Teaching]:
    """A candidate of half the channels, the same before they are chosen, and what it learns from."""
    ready, _, database = prepared(folder)
    candidate = ready.space.normalise(ready.space.uniform(0.5, precision))
    model = stitch(ready.task.model, ready.graph, database, candidate)
    wide = Wide(ready.task.model, ready.graph, units_of(ready.graph, candidate.widths, ready.space.counts))
    teaching = Teaching.of(ready.task)
    teaching.lessons.draw()
    return model, wide, candidate, teaching


def test_what_is_hidden_may_go(folder: Path) -> None:
    """The full model that hides units computes what the small one does, to the rounding of sums."""
    model, wide, _, teaching = parts(folder, "fp32")
    channels, batch = Channels(wide), teaching.calibration[0]
    with channels.watched(), torch.no_grad():
        channels.form.eval()(*batch)
    channels.choose(1.0)
    assert {name: len(kept) for name, kept in channels.kept.items()} == {
        group.name: sum(wide.units[group.name]) for group in wide.groups
    }
    with torch.no_grad():
        expected = channels.form(*batch)
        channels.into(model)
        torch.testing.assert_close(model.eval()(*batch), expected, rtol=1e-4, atol=1e-4)


def test_the_largest_feature_maps_stay_and_fewer_do_each_time(folder: Path) -> None:
    _, wide, _, teaching = parts(folder)
    channels = Channels(wide)
    group = wide.groups[0]
    (reader,) = group.consumers[:1]
    quiet = torch.arange(0, group.width, 2)
    with torch.no_grad():  # every other unit is made quiet, for all who read it
        for name in group.producers:
            module = channels.form.get_submodule(name)
            module.weight[group.rows_kept(name, quiet)] *= 1e-4
        for name in group.norms:
            norm = channels.form.get_submodule(name)
            norm.weight[group.rows_kept(name, quiet)] *= 1e-4
            norm.bias[group.rows_kept(name, quiet)] = 0.0
    lengths = []
    for along in (0.1, 0.3, 0.6, 1.0):
        assert channels.due(along)
        with channels.watched(), torch.no_grad():
            channels.form.eval()(*teaching.calibration[0])
        channels.choose(along)
        assert not channels.due(along)
        lengths.append(len(channels.kept[group.name]))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == group.width // 2
    assert not set(channels.kept[group.name].tolist()) & set(quiet.tolist())
    weight = channels.form.get_submodule(reader).weight
    assert float(weight[:, quiet].abs().max()) == 0


@pytest.mark.parametrize("precision", ["fp32", "w8a8", "w4"])
def test_a_candidate_trains_so_and_is_delivered(folder: Path, precision: str) -> None:
    model, wide, _, teaching = parts(folder, precision)
    done = train(model, teaching, RECIPE, Span(steps=60), 3e-3, wide=wide)
    assert not done.failure
    evaluate = tiny_task.learning().evaluate
    assert done.model.state_dict().keys() == model.state_dict().keys()
    assert all(
        a.shape == b.shape for a, b in zip(done.model.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert float(evaluate(done.model)["likelihood"].mean()) > float(evaluate(model)["likelihood"].mean())


@pytest.mark.parametrize("at", [9, 33])
def test_one_that_is_stopped_goes_on_on_the_same_curve(folder: Path, tmp_path: Path, at: int) -> None:
    """In the stage in which channels are chosen, and after it."""
    model, wide, _, teaching = parts(folder)
    whole = train(model, teaching, RECIPE, Span(steps=48), 3e-3, wide=wide)
    asked, path = iter(range(100)), tmp_path / "it.part"
    first = train(
        model, teaching, RECIPE, Span(steps=48), 3e-3, checkpoint=path, stop=lambda: next(asked) >= at, wide=wide
    )
    assert first.failure == STOPPED
    rest = train(model, teaching, RECIPE, Span(steps=48), 3e-3, checkpoint=path, wide=wide)
    assert same(whole.weights, rest.weights)


def test_what_goes_on_from_weights_keeps_their_channels(folder: Path) -> None:
    model, wide, _, teaching = parts(folder)
    done = train(model, teaching, RECIPE, Span(steps=30), 3e-3, wide=wide)
    again = train(model, teaching, RECIPE, Span(steps=4), 1e-12, begun=done.weights, wide=wide)
    for name, tensor in done.weights.items():
        if name.endswith("latent"):
            torch.testing.assert_close(tensor, again.weights[name], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_trained_so_is_refused(folder: Path) -> None:
    ready, _, database = prepared(folder)
    ranked = ready.space.dense()
    layer = next(name for name, methods in ready.space.methods.items() if any(m.ranks for m in methods))
    method = next(m for m in ready.space.methods[layer] if m.ranks)
    candidate = ready.space.normalise(Candidate(ranked.widths, {**ranked.methods, layer: method}))
    assert candidate.methods[layer] != Method()
    _, wide, _, teaching = parts(folder)
    model = stitch(ready.task.model, ready.graph, database, candidate)
    full = Wide(wide.model, wide.graph, units_of(ready.graph, candidate.widths, ready.space.counts))
    with pytest.raises(UsageError, match=f"neither factorised nor in codebooks, and {layer} is"):
        train(model, teaching, RECIPE, Span(steps=4), 1e-3, wide=full)
    with pytest.raises(UsageError, match="only points of a search can be trained by"):
        train(model, teaching, RECIPE, Span(steps=4), 1e-3)
    with pytest.raises(UsageError, match="chooses channels while training"):
        recovered(model, tiny_task.learning(), RECIPE, Span(steps=4))
    with pytest.raises(ValueError, match="in the first stages"):
        Recipe(format_version=1, stages=[{**STAGES[0], "share": 1.0}])
    with pytest.raises(ValueError, match="in floats"):
        Recipe(format_version=1, stages=[{**STAGES[0], "rounding": True}, STAGES[1]])


@pytest.mark.slow
def test_a_search_trains_by_it(spaces: dict[str, str], tmp_path: Path, short_tuning: None) -> None:
    path = tmp_path / "three.yaml"
    text = Path(autocomp.config.shipped.shipped_files("recipes")["three-stage"]).read_text()
    path.write_text(text + "\nlearning_rate: 0.003\n")
    assert load_recipe(path).refreshes == pytest.approx(0.4)
    result = autocomp.search(
        tiny_task.learning(), trials=8, measurements=2, out=tmp_path / "run", space=spaces["wide"], recover="30 steps",
        recipe=str(path), references=False, deterministic=True,
    )  # fmt: skip
    assert result.run.recovery is not None
    assert any(drop is not None for entrant in result.run.recovery.entrants for drop in entrant.drops)
    for point in result.front:
        likelihood = float(tiny_task.learning().evaluate(point.load())["likelihood"].mean())
        assert likelihood == pytest.approx(point.metrics["likelihood"], abs=1e-5)
