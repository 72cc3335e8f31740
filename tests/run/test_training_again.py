"""A run whose points were trained goes on: on another machine, by another training, with a metric that says something else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_task
import torch

import autocomp
from autocomp.api import SearchResult
from autocomp.config.settings import read_settings
from autocomp.errors import UsageError
from autocomp.records.recovery import Recovery
from autocomp.records.table import read_evaluations
from autocomp.run.folder import CONFIG
from autocomp.run.jobs import after
from autocomp.run.replay import with_replay
from autocomp.study.samplers import GIVEN

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_tuning")]


@pytest.fixture(scope="module")
def recipe(recipe_at: Callable[[float], str]) -> str:
    return recipe_at(1e-4)


@pytest.fixture(scope="module")
def searched(recipe: str, spaces: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return autocomp.search(
        tiny_task.learning(), trials=8, measurements=2, out=tmp_path_factory.mktemp("run") / "it", space=spaces["wide"],
        recover="20 steps", recipe=recipe, references=False, deterministic=True,  # who enters depends on no clock
    )  # fmt: skip


@pytest.fixture
def copied(searched: SearchResult, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(searched.folder, copy)
    return copy


def learnt(folder: Path) -> dict[str, tuple[Recovery, float]]:
    found = [e for e in read_evaluations(folder) if e.recovered is not None]
    return {e.candidate.id: (e.recovered, e.metrics["likelihood"]) for e in found if e.recovered is not None}


def test_on_another_machine_it_is_measured_again_and_keeps_what_it_learnt(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = learnt(copied)
    assert before
    monkeypatch.setattr("autocomp.run.found.version", lambda name: "of another")
    with pytest.raises(UsageError, match="measured on is not what it was"):
        autocomp.recover(copied, tiny_task.learning(), length="20steps")
    assert learnt(copied) == before
    settings = read_settings(copied / CONFIG).model_copy(update={"out": str(copied)})
    again = autocomp.search(tiny_task.learning(), settings=settings, resume=True)
    assert any("are measured again" in warning for warning in again.run.warnings)
    now = learnt(copied)
    assert now.keys() == before.keys()
    for name, (done, metric) in now.items():
        assert metric == pytest.approx(before[name][1], abs=1e-6)
        assert done.steps == before[name][0].steps


def test_a_run_of_the_callers_own_sampler_is_trained_without_it(copied: Path, recipe: str) -> None:
    config = copied / CONFIG
    config.write_text(config.read_text().replace("sampler: autocomp", f"sampler: {GIVEN}"))
    point = next(iter(learnt(copied)))
    done = autocomp.recover(copied, tiny_task.learning(), recipe, length="20steps", points=[point])
    assert point in {p.candidate.id for p in done.front} | set(learnt(copied))


def test_trained_again_its_record_is_of_both_and_others_weights_stay(copied: Path, recipe: str, tmp_path: Path) -> None:
    stronger = str(tmp_path / "stronger.yaml")
    Path(stronger).write_text(Path(recipe).read_text().replace("0.0001", "0.003"))
    other = copied / "recovery" / "0123456789-abcdef-0.pt"
    other.write_bytes(b"of a training that was stopped")
    before = learnt(copied)
    result = autocomp.recover(copied, tiny_task.learning(), stronger, length="60steps", points=list(before))
    now = learnt(copied)
    twice = [name for name in now if name in before and now[name][0].steps > before[name][0].steps]
    assert twice
    for name in twice:
        (done, metric), (first, then) = now[name], before[name]
        assert done.steps == first.steps + 60
        assert done.recipe == f"{first.recipe} + {stronger}"
        assert done.before == first.before
        assert metric > then
    assert other.exists()
    assert all(e.drop_errors for e in read_evaluations(copied) if e.recovered is not None)
    assert isinstance(result, SearchResult)
    for point in result.front:
        likelihood = float(tiny_task.learning().evaluate(point.load())["likelihood"].mean())
        assert likelihood == pytest.approx(point.metrics["likelihood"], abs=1e-5)
    _, base = with_replay({"replay": str(copied)})
    assert base["recipe"] in (recipe, stronger)


def test_a_metric_that_says_something_else_is_told_before_anything_is_trained(copied: Path) -> None:
    before, made = learnt(copied), tiny_task.learning()
    evaluate = made.evaluate
    made.evaluate = lambda net: {"likelihood": evaluate(net)["likelihood"] ** 0.5}
    with pytest.raises(UsageError, match=r"the source of evaluate|judges the uncompressed model otherwise"):
        autocomp.recover(copied, made, length="20steps")
    old, (inputs, labels) = tiny_task.data, tiny_task.data(200, 3)
    with pytest.MonkeyPatch.context() as patch:  # the same source, other validation data
        patch.setattr(
            tiny_task,
            "data",
            lambda n, seed: (inputs[:100].repeat(2, 1, 1, 1), labels[:100].repeat(2)) if seed == 3 else old(n, seed),
        )
        harder = tiny_task.learning()
    with pytest.raises(UsageError, match=r"judges .* otherwise .* nothing was done"):
        autocomp.recover(copied, harder, length="20steps")
    assert learnt(copied) == before


def test_weights_that_are_gone_are_trained_again(copied: Path, recipe: str) -> None:
    point = next(iter(learnt(copied)))
    autocomp.recover(copied, tiny_task.learning(), recipe, length="40steps", points=[point])
    autocomp.recover(copied, tiny_task.learning(), recipe, length="41steps", points=[point])
    result = autocomp.recover(copied, tiny_task.learning(), recipe, length="40steps", points=[point])
    assert isinstance(result, SearchResult)


def test_weights_that_were_lost_after_it_are_trained_again(copied: Path, recipe: str) -> None:
    point = next(iter(learnt(copied)))
    autocomp.recover(copied, tiny_task.learning(), recipe, length="60steps", points=[point])
    assert point in learnt(copied)
    for path in (copied / "recovery").iterdir():
        path.unlink()
    again = autocomp.recover(copied, tiny_task.learning(), recipe, length="60steps", points=[point])
    assert (copied / learnt(copied)[point][0].weights).exists()
    assert any("learnt are lost" in warning for warning in again.run.warnings)
    assert not any("trained so before" in warning for warning in again.run.warnings)


def test_more_trials_than_were_trained_are_told_of(copied: Path) -> None:
    settings = read_settings(copied / CONFIG).model_copy(update={"out": str(copied), "trials": 14})
    again = autocomp.search(tiny_task.learning(), settings=settings, resume=True)
    assert any("were found since training was done, and are not trained" in warning for warning in again.run.warnings)


def test_records_of_trainings_in_a_row_are_joined() -> None:
    first = Recovery({"a": 0.5}, "one", 1e-3, 10, 2.0, losses=((0, 3.0), (9, 2.0)), readings=((0.0, 0.5), (2.0, 0.6)))
    then = Recovery({"a": 0.5}, "two", 1e-4, 5, 1.0, "w", losses=((0, 2.0),), readings=((0.0, 0.5), (1.0, 0.7)))
    both = after(first, then)
    assert (both.recipe, both.steps, both.seconds, both.weights) == ("one + two", 15, 3.0, "w")
    assert both.losses == ((0, 3.0), (9, 2.0), (10, 2.0))
    assert both.readings == ((0.0, 0.5), (2.0, 0.6), (3.0, 0.7))


def test_training_data_that_can_be_gone_through_once_are_refused() -> None:
    made = tiny_task.task()
    with pytest.raises(UsageError, match="a generator can be once"):
        autocomp.Task(
            made.model, made.example_inputs, made.calibration, made.evaluate,
            train=(((torch.zeros(1, 1, 8, 8),), torch.zeros(1)) for _ in range(3)), name="once",
        )  # fmt: skip
