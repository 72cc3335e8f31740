"""A finished run's points for other weights: the same choices, compressed, measured and trained anew; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_task
import torch

import autocomp
from autocomp.api import SearchResult
from autocomp.cli.main import main
from autocomp.config.settings import read_settings
from autocomp.errors import UsageError
from autocomp.graph.analyse import analyse
from autocomp.hardware.profile import load_profile
from autocomp.records.table import read_evaluations
from autocomp.run.replay import Choice, only
from autocomp.space.build import build_space

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_tuning")]


@pytest.fixture(scope="module")
def recipe(recipe_at: Callable[[float], str]) -> str:
    return recipe_at(3e-3)


@pytest.fixture(scope="module")
def first(recipe: str, spaces: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A run with points that were trained."""
    return autocomp.search(
        tiny_task.learning(), trials=8, measurements=2, out=tmp_path_factory.mktemp("first") / "run", space=spaces["wide"],
        recover="20 steps", recipe=recipe, references=False, deterministic=True,
    )  # fmt: skip


def retrained() -> autocomp.Task:
    """The task with other weights, of the same architecture."""
    task = tiny_task.learning()
    net = tiny_task.model()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.01)
    return autocomp.Task(
        net,
        task.example_inputs,
        task.calibration,
        task.evaluate,
        task.test,
        task.train,
        task.loss,
        unit="%",
        name="retrained",
    )


def test_a_front_is_made_again_for_other_weights(first: SearchResult, tmp_path: Path) -> None:
    before = {p.candidate for p in first.front if p.record.evaluation.source != "dense"}
    again = autocomp.search(retrained(), replay=first.folder, out=tmp_path / "again")
    made = {e.candidate: e for e in read_evaluations(again.folder) if e.source == "replay"}
    assert set(made) == before
    assert all(e.state == "measured" for e in made.values())
    assert {e.source for e in read_evaluations(again.folder)} == {"replay", "dense"}
    assert {e.candidate for e in made.values() if e.recovered is not None} <= {
        p.candidate for p in first.front if p.recovered is not None
    }
    assert any(e.recovered is not None and e.recovered.steps == 20 for e in made.values())
    for point in again.front:  # what is delivered is of the new weights
        likelihood = float(retrained().evaluate(point.load())["likelihood"].mean())
        assert likelihood == pytest.approx(point.metrics["likelihood"], abs=1e-5)
    page = again.report.read_text()
    assert again.folder.name in page


def test_a_recipe_is_known_by_its_file_not_by_the_name_in_it(
    recipe: str, spaces: dict[str, str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(Path(recipe).read_text() + "name: layers\n")  # as one that is shipped
    settings = {
        "trials": 8, "measurements": 2, "space": spaces["wide"], "recover": "20 steps", "recipe": str(mine),
        "references": False, "deterministic": True,
    }  # fmt: skip
    run = autocomp.search(tiny_task.learning(), out=tmp_path / "run", **settings)
    assert any(p.recovered is not None for p in run.front)
    again = autocomp.search(retrained(), replay=run.folder, out=tmp_path / "again")
    assert read_settings(again.folder / "config.yaml").recipe == str(mine)
    assert {p.recovered.learning_rate for p in again.front if p.recovered is not None} <= {3e-3}

    mine.write_text(mine.read_text().replace("0.003", "0.006"))  # the same name, another training
    with pytest.raises(UsageError, match="is not what it was when this run trained"):
        autocomp.search(tiny_task.learning(), out=tmp_path / "run", resume=True, **settings)
    mine.write_text(mine.read_text().replace("name: layers", "name: other"))
    with pytest.raises(UsageError, match="whose file is not known"):
        autocomp.search(retrained(), replay=again.folder.with_name("run"), out=tmp_path / "third", recover=None)


def test_one_point_goes_on_without_the_run_it_is_of(first: SearchResult, tmp_path: Path) -> None:
    point = next(p for p in first.front if p.record.evaluation.source != "dense").candidate
    copy, out = tmp_path / "copy", tmp_path / "one"
    shutil.copytree(first.folder, copy)
    autocomp.search(retrained(), replay=copy, points=[point.id], recover="0", out=out)
    shutil.rmtree(copy)
    (out / "front.json").unlink()
    settings = autocomp.config.settings.read_settings(out / "config.yaml")
    assert settings.replay == str(copy)
    again = autocomp.search(retrained(), settings=settings, resume=True)
    assert [e.candidate for e in read_evaluations(again.folder) if e.source == "replay"] == [point]


def test_what_cannot_be_replayed_is_refused_at_once(
    first: SearchResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="there is no run in /nowhere to replay"):
        autocomp.search(retrained(), replay="/nowhere", out=tmp_path / "a")
    with pytest.raises(UsageError, match="has no point 'x'"):
        autocomp.search(retrained(), replay=first.folder, points=["x"], out=tmp_path / "b")
    with pytest.raises(UsageError, match="points are of a run that is replayed"):
        autocomp.search(retrained(), points=["x"], out=tmp_path / "c")
    other = retrained()
    wider = autocomp.Task(
        tiny_task.TinyNet(48).eval(), other.example_inputs, other.calibration, other.evaluate, name="wider"
    )
    with pytest.raises(UsageError, match=r"is not offered width \d+, which point \w+ of"):
        autocomp.search(wider, replay=first.folder, out=tmp_path / "d", recover="0")
    flat = autocomp.Task(
        torch.nn.Sequential(OrderedDict(flat=torch.nn.Flatten(), head=torch.nn.Linear(64, 4))).eval(),
        other.example_inputs, other.calibration, other.evaluate, name="flat",
    )  # fmt: skip
    with pytest.raises(UsageError, match="is of another architecture"):
        autocomp.search(flat, replay=first.folder, out=tmp_path / "e", recover="0")
    assert not any((tmp_path / name / "config.yaml").exists() for name in "abcde")
    assert main(["search", "digits", "--replay", str(tmp_path)]) == 2
    assert "to replay (no config.yaml)" in capsys.readouterr().err


def test_all_of_a_group_is_not_half_of_a_wider_one(spaces: dict[str, str]) -> None:
    narrow, wide = (
        build_space(
            analyse(tiny_task.TinyNet(width).eval(), tiny_task.task().example_inputs),
            spaces["wide"],
            load_profile("x86-64-v3"),
        )
        for width in (32, 64)
    )
    choice = Choice(narrow.dense(), False, narrow.dense())
    assert only(narrow, [choice], "run").dense() == narrow.dense()
    with pytest.raises(UsageError, match="'stem' is 32 wide there, 64 here"):
        only(wide, [choice], "run")


def test_the_command_replays(
    first: SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(tiny_task.__file__).parent)
    out = tmp_path / "again"
    assert (
        main(
            [
                "search",
                "tiny_task:learning",
                "--replay",
                str(first.folder),
                "--recover",
                "0",
                "--out",
                str(out),
                "--json",
            ]
        )
        == 0
    )
    run = json.loads(capsys.readouterr().out)
    assert run.get("recovery") is None
    wanted = {p.candidate.id for p in first.front}
    assert {e.candidate.id for e in read_evaluations(out) if e.source == "replay"} <= wanted
