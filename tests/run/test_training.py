"""Training as a stage of a search: points get better and keep their time, what is delivered is what was trained, and it goes on after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_task
import torch
import yaml

import autocomp
from autocomp.api import SearchResult
from autocomp.cli.main import main
from autocomp.config.addresses import JOURNAL
from autocomp.errors import UsageError
from autocomp.front.goals import Judge
from autocomp.records.evaluation import Evaluation, untrained
from autocomp.records.recovery import Recovery
from autocomp.records.run import read_run
from autocomp.records.table import read_evaluations
from autocomp.run.folder import CONFIG, STUDY
from autocomp.run.found import Found
from autocomp.study.storage import read_study

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_tuning")]
TESTS = Path(tiny_task.__file__).parent


@pytest.fixture(scope="module")
def recipe(recipe_at: Callable[[float], str]) -> str:
    return recipe_at(3e-3)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A space in which a model can be spoilt."""
    path = tmp_path_factory.mktemp("spaces") / "narrow.yaml"
    rule = {"layers": "*", "keep": [1.0, 0.5], "ranks": [], "precisions": ["fp32", "w8a8"]}
    path.write_text(yaml.safe_dump({"format_version": 1, "rules": [rule, {"layers": "head", "precisions": ["fp32"]}]}))
    return str(path)


@pytest.fixture(scope="module")
def searched(narrow: str, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    out = tmp_path_factory.mktemp("run") / "it"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autocomp.hardware.timing.PAUSES", ())
        return autocomp.search(
            tiny_task.learning(),
            trials=8,
            measurements=2,
            out=out,
            space=narrow,
            recover="40 steps",
            recipe=recipe,
            references=False,
            deterministic=True,  # who enters depends on no clock
        )


def trained_points(result: SearchResult) -> list[tuple[autocomp.Point, Recovery]]:
    return [(p, p.record.evaluation.recovered) for p in result.front if p.record.evaluation.recovered is not None]


def test_points_are_better_for_it_and_as_fast(searched: SearchResult) -> None:
    found = trained_points(searched)
    assert found
    judge = Judge.of(searched.run, autocomp.config.settings.Goals())
    for point, done in found:
        now, then = point.record.evaluation, untrained(point.record.evaluation)
        assert judge.drop(now) < judge.drop(then)
        assert now.latency == then.latency
        assert done.before["likelihood"] < point.metrics["likelihood"]
        assert done.steps == sum([12, 12, 16][: len(done.readings) - 1])
        assert done.recipe.endswith("short.yaml")
        assert done.learning_rate == 3e-3
        assert [value for _, value in done.readings][-1] == point.metrics["likelihood"]
        assert point.record.evaluation.drop_errors["likelihood"] > 0


def test_what_is_delivered_is_what_was_trained(searched: SearchResult) -> None:
    task = tiny_task.learning()
    for point, _ in trained_points(searched):
        model = point.load()
        assert float(task.evaluate(model)["likelihood"].mean()) == pytest.approx(point.metrics["likelihood"], abs=1e-5)
        assert float(task.test(model)["likelihood"].mean()) == pytest.approx(point.test_metrics["likelihood"], abs=1e-5)
        assert {kind for kind, check in point.record.verified.items() if check.ok} == {"so", "onnx"}
        manifest = json.loads((searched.folder / "models" / point.candidate.id / "manifest.json").read_text())
        assert manifest["recovered"]["learning_rate"] == 3e-3


def test_records_say_how_it_went_and_read_back(searched: SearchResult) -> None:
    run = read_run(searched.folder)
    assert run == searched.run
    assert run.recovery is not None
    entered = [entrant for entrant in run.recovery.entrants if entrant.drops]
    assert len(entered) == len(run.recovery.entrants) > 1
    assert max(len(entrant.drops) for entrant in entered) == 3
    told = {e.candidate.id: e for e in read_evaluations(searched.folder)}
    for point, done in trained_points(searched):
        kept = told[point.candidate.id].recovered
        assert kept == replace(done, losses=(), readings=())
    files = {path.name for path in (searched.folder / "recovery").iterdir()}
    assert files == {Path(done.weights).name for e in told.values() if (done := e.recovered)}
    page = searched.report.read_text()
    assert "recovery" in page


def test_a_resumed_run_finds_it_all_done(searched: SearchResult) -> None:
    def measured(result: SearchResult) -> dict[str, object]:
        return {e.candidate.id: e.metrics for e in read_evaluations(result.folder) if e.state == "measured"}

    before = measured(searched)
    calls = len(tiny_task.CALLS)
    again = autocomp.search(
        tiny_task.learning(), settings=autocomp.config.settings.read_settings(searched.folder / CONFIG), resume=True
    )
    assert measured(again) == before  # the front follows times, which are taken anew
    assert "training: round 1 of 3" in again.run.summary.seconds  # of the first start
    # a few readings of what is delivered, in torch and as deployed; none of trainings
    assert len(tiny_task.CALLS) - calls < 8 + 2 * len(again.front)


def test_weights_that_are_lost_leave_the_point_as_it_was(searched: SearchResult, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(searched.folder, copy)
    for path in (copy / "recovery").iterdir():
        path.write_bytes(b"damaged")
    settings = autocomp.config.settings.read_settings(copy / CONFIG).model_copy(update={"out": str(copy)})
    again = autocomp.search(tiny_task.learning(), settings=settings, resume=True)
    assert not trained_points(again)
    assert any("learnt are lost" in warning for warning in again.run.warnings)


def test_points_of_a_finished_run_are_trained_by_the_command(
    small: Callable[..., SearchResult],
    narrow: str,
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(TESTS)
    found = small("tiny_task:learning", space=narrow, trials=6, measurements=2)
    assert found.run.recovery is None
    measured = [e for e in read_evaluations(found.folder) if e.state == "measured" and e.source != "dense"]
    target = min(measured, key=lambda e: e.metrics["likelihood"])
    wanted = ["--point", target.candidate.id, "--length", "30steps", "--recipe", recipe, "--json"]
    assert main(["recover", str(found.folder), *wanted]) == 0
    run = json.loads(capsys.readouterr().out)
    (entrant,) = run["recovery"]["entrants"]
    assert entrant["id"] == target.candidate.id
    (trained,) = [e for e in read_evaluations(found.folder) if e.recovered is not None]
    assert trained.candidate == target.candidate
    assert trained.metrics["likelihood"] > target.metrics["likelihood"]
    assert trained.recovered.steps == 30
    with pytest.raises(UsageError, match="measured no candidate 'nothing'"):
        autocomp.recover(found, length="30steps", points=["nothing"])
    now = SearchResult(found.folder)  # the front is another one, whose files alone are there
    done = autocomp.recover(now.front[0], tiny_task.learning(), recipe, length="3epochs")
    assert done.steps == 18
    assert torch.is_tensor(done.model(tiny_task.data(1, 0)[0]))


def test_a_task_that_cannot_train_is_refused_before_anything_is_searched(
    small: Callable[..., SearchResult], narrow: str
) -> None:
    made = tiny_task.learning()
    made.loss = lambda output, target: torch.tensor(float("nan")) * output.sum()
    with pytest.raises(UsageError, match="not finite: look at Task"):
        small(made, space=narrow, recover="10 steps")
    made.loss = lambda output, target: output.argmax(1).float().mean()
    with pytest.raises(UsageError, match="must be differentiable"):
        small(made, space=narrow, recover="10 steps")
    with pytest.raises(UsageError, match="are too short: a step takes"):
        small(tiny_task.learning(), space=narrow, recover="0.001s")


KILLED = """
import os, signal, sys
SEARCH = os.getpid()
from autocomp.tuning.tune import Tuner
Tuner.__init__.__kwdefaults__["budget"] = 1
from autocomp.recovery import stored, train
train.CHECKPOINT = 0.0
write, left = stored.write, [int(sys.argv[1])]
def counted(*args):
    write(*args)
    left[0] -= 1
    if left[0] == 0:
        os.kill(SEARCH, signal.SIGKILL)  # trainings run in processes of their own, or, where there is but one, in the search's
        os.kill(os.getpid(), signal.SIGKILL)
stored.write = counted
from autocomp.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def test_killed_while_it_trains_it_goes_on(narrow: str, recipe: str, tmp_path: Path) -> None:
    def start(nth: int, *more: str) -> subprocess.CompletedProcess[str]:
        options = [
            "search",
            "tiny_task:learning",
            "--space",
            narrow,
            "--trials",
            "6",
            "--measurements",
            "1",
            "--recover",
            "20 steps",
            "--deterministic",
            "--recipe",
        ]
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(nth), *options, recipe, *more],
            cwd=TESTS, env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "AUTOCOMP_REFERENCES": "no"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    out = tmp_path / "run"
    assert start(4, "--out", str(out)).returncode == -9
    assert not (out / "front.json").exists()
    assert list((out / "recovery").glob("*.part*"))
    again = start(0, "--resume", "--out", str(out))
    assert again.returncode == 0, again.stderr
    assert not list((out / "recovery").glob("*.part*"))
    run = read_run(out)
    assert run.recovery is not None
    assert run.recovery.entrants
    for entrant in run.recovery.entrants:
        assert entrant.drops
        assert not entrant.failure
    for point in run.front:
        if (done := point.evaluation.recovered) is not None:  # every step was taken once, whichever start took it
            assert done.steps == sum([6, 6, 8][: len(done.readings) - 1])
            assert len(done.losses) == done.steps


def test_half_of_those_who_enter_are_chosen_by_what_the_others_came_to(
    spaces: dict[str, str], recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def anyone(found: Found, count: int = 100) -> list[Evaluation]:
        return [e for e in found.told if e.source != "dense" and e.kl is not None][:count]

    monkeypatch.setattr("autocomp.run.halving.entrants", anyone)
    monkeypatch.setattr("autocomp.run.halving.trainable", anyone)
    monkeypatch.setattr("autocomp.run.entrants.gains", lambda points, *_: np.ones(len(points)))
    result = autocomp.search(
        tiny_task.learning(), trials=16, measurements=1, out=tmp_path / "run", space=spaces["wide"], recover="20 steps",
        recipe=recipe, references=False, deterministic=True,
    )  # fmt: skip
    study = read_study(f"{JOURNAL}{tmp_path / 'run' / STUDY}", "autocomp")
    assert study is not None
    (drafted,) = (value for key, value in study.attrs.items() if key.endswith(":drafted"))
    (entered,) = (value for key, value in study.attrs.items() if key.endswith(":entered"))
    assert len(entered["trials"]) == entered["more"] == 4
    assert 0 < len(drafted) <= 4
    assert not set(drafted) & set(entered["trials"])
    summary = result.run.recovery
    assert summary is not None
    assert len(summary.entrants) == 4 + len(drafted)
    assert all(entrant.drops and entrant.predicted is not None for entrant in summary.entrants)
    assert "fitted to the other entrants, with the loss after a short training" in result.run.summary.spearman
