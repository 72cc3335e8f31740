"""A branch that is left out: found by a search, delivered without it, shown, trained, and learnt from what is still there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_task
import torch
import yaml

import autocomp
from autocomp.api import SearchResult
from autocomp.cli.main import main
from autocomp.database.stitch import stitch
from autocomp.hardware.profile import load_profile
from autocomp.progress import Progress
from autocomp.records.candidate import Candidate
from autocomp.recovery.channels import Channels, Wide, units_of
from autocomp.run.prepare_task import compressed_layers, prepare_task
from autocomp.space.file import SpaceFile

pytestmark = pytest.mark.usefixtures("short_tuning")


@pytest.fixture(scope="module")
def depth(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A space in which nothing may be done but to leave the residual branch out."""
    path = tmp_path_factory.mktemp("spaces") / "depth.yaml"
    rule = {"layers": "*", "keep": [1.0], "ranks": [], "precisions": ["fp32"], "depth": True}
    path.write_text(yaml.safe_dump({"format_version": 1, "rules": [rule]}))
    return str(path)


@pytest.fixture(scope="module")
def searched(depth: str, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    out = tmp_path_factory.mktemp("run") / "it"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autocomp.hardware.timing.PAUSES", ())
        patch.chdir(Path(tiny_task.__file__).parent)
        task = "tiny_task:learning"
        return autocomp.search(task, trials=4, measurements=2, out=out, space=depth, references=False)


def without(result: SearchResult) -> autocomp.Point:
    return next(p for p in result.front if p.record.evaluation.candidate.widths["conv1"] == 0)


def test_what_is_delivered_has_no_such_layers_and_is_verified(searched: SearchResult) -> None:
    point = without(searched)
    names = {name for name, module in point.load().named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert names == {"stem"}
    checks = point.record.verified
    assert set(checks) >= {"so", "onnx"}
    assert all(found.ok for found in checks.values())
    assert point.record.evaluation.bytes < searched.dense.record.evaluation.bytes / 10


def test_the_report_says_which_layers_are_left_out(searched: SearchResult) -> None:
    page = searched.report.read_text()
    assert page.count("left out") >= 2  # each layer of the branch
    assert "1 group left out whole" in page


def test_checking_a_task_shows_which_branches_may_go_and_why_others_may_not(
    depth: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(tiny_task.__file__).parent)
    assert main(["check", "tiny_task:task", "--space", depth, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (branch,) = found["branches"]
    assert branch["offered"]
    assert set(branch["layers"]) == {"conv1", "conv2"}
    assert any(r["option"] == "depth" and "no way around" in r["reason"] for r in found["refused"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["layers", "three-stage"])
def test_it_is_trained_by_recipes_that_look_at_layers_and_choose_channels(
    searched: SearchResult,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(Path(tiny_task.__file__).parent)
    folder, point = tmp_path / "run", without(searched)
    shutil.copytree(searched.folder, folder)
    wanted = ["--point", point.record.evaluation.candidate.id, "--length", "20steps", "--recipe", recipe, "--json"]
    assert main(["recover", str(folder), *wanted]) == 0
    (entrant,) = json.loads(capsys.readouterr().out)["recovery"]["entrants"]
    assert entrant["id"] == point.record.evaluation.candidate.id
    assert not entrant["failure"]


def test_channels_are_chosen_beside_a_branch_whose_norm_went_with_it(tmp_path: Path) -> None:
    """The residual stream loses channels too; a norm of the branch that is left out was one of those that follow it."""
    rule = {"layers": "*", "keep": [1.0, 0.5], "ranks": [], "precisions": ["fp32"], "depth": True}
    rules = SpaceFile.model_validate({"format_version": 1, "rules": [rule]})
    ready = prepare_task(tiny_task.learning(), rules, [load_profile("x86-host")], 64)
    _, database = compressed_layers(ready, tmp_path, 64, 0, Progress())
    full, half = ready.space.dense(), ready.space.uniform(0.5, "fp32")
    wanted = ready.space.normalise(Candidate({**half.widths, "conv1": 0}, full.methods))
    model, graph = stitch(ready.task.model, ready.graph, database, wanted), ready.graph.without(["conv1"])
    whole = stitch(ready.task.model, ready.graph, database, Candidate({**full.widths, "conv1": 0}, full.methods))
    met = frozenset({ready.graph.layers["conv2"].out_group or ""})  # of their channels is what stands for the branch
    channels = Channels(Wide(whole, graph, units_of(graph, wanted.widths, ready.space.counts), met))
    assert any(set(group.norms) != set(ready.graph.groups[group.name].norms) for group in channels.wide.groups)
    batch = tiny_task.learning().calibration[0]
    with channels.watched(), torch.no_grad():
        channels.form.eval()(*batch)
    channels.choose(1.0)
    with torch.no_grad():
        expected = channels.form(*batch)
        channels.into(model)
        torch.testing.assert_close(model.eval()(*batch), expected, rtol=1e-4, atol=1e-4)
