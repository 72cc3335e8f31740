"""Settings that are left to autocomp: which it chooses, that what is stated stays, and that nothing is searched to say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_task

from autocomp.api import SearchResult
from autocomp.cli.main import main
from autocomp.config.settings import AUTOMATIC, Settings, dump_settings, load_settings, read_settings
from autocomp.devices.local import LocalDevice
from autocomp.errors import UsageError
from autocomp.progress import Progress
from autocomp.run import automatic
from autocomp.run.automatic import chosen_lines, resolve
from autocomp.run.folder import CONFIG, as_begun
from autocomp.tasks.task import Task

TASK = "tiny_task:task"


@pytest.fixture
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("settings are chosen without compiling anything")

    monkeypatch.setattr(LocalDevice, "compile", refuse)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Choose for the tiny task as if a sample took so long, it had so many samples and weights, and its space so many parameters."""
    real = automatic._look

    def choose(
        task: Task | None = None,
        forward: float = 1e-3,
        samples: int = 1000,
        weights: int = 10**6,
        parameters: int = 20,
        candidates: int = 10**12,
        **options: Any,
    ) -> Settings:
        space = SimpleNamespace(widths={n: (2, 1) for n in range(parameters)}, methods={"fixed": (1,)}, size=candidates)
        monkeypatch.setattr(automatic, "build_space", lambda *_: space)

        def look(*arguments: Any, **others: Any) -> Any:
            seen = real(*arguments, **others)
            return replace(seen, samples=samples, weights=weights, forward=seen.forward and forward)

        monkeypatch.setattr(automatic, "_look", look)
        monkeypatch.setattr(automatic, "cores", lambda: 2)
        monkeypatch.setattr(automatic, "together", lambda profiles: 2)
        settings = load_settings(None, {"task": TASK, "auto": True, **options})
        return resolve(settings, task or tiny_task.task(), Progress()).settings

    return choose


def reasons(settings: Settings) -> dict[str, str]:
    assert isinstance(settings.auto, dict)
    return {str(name): reason for name, reason in settings.auto.items()}


def test_without_minutes_the_defaults_are_chosen(chosen: Callable[..., Settings]) -> None:
    found, default = chosen(), load_settings(None, {"task": TASK})
    assert {name: getattr(found, name) for name in AUTOMATIC} == {name: getattr(default, name) for name in AUTOMATIC}
    assert set(reasons(found)) == set(AUTOMATIC)
    assert all(reasons(found).values())


def test_what_is_stated_stays(chosen: Callable[..., Settings]) -> None:
    stated = {"trials": 7, "measurements": 5, "calibration_samples": 9, "space": "quantize-only", "recover": "0"}
    found = chosen(minutes=30.0, **stated)
    assert {name: getattr(found, name) for name in stated} == stated
    assert reasons(found) == {}
    assert set(reasons(chosen(minutes=30.0, trials=7))) == set(AUTOMATIC) - {"trials"}


def test_each_choice_is_a_line_with_its_reason(chosen: Callable[..., Settings]) -> None:
    found = chosen(parameters=200, trials=None, space="quantize-only")
    title, *lines = chosen_lines(found)
    assert title == "chosen automatically:"
    assert [line.split()[:2] for line in lines] == [
        ["calibration_samples", "256"],
        ["recover", "0"],
        ["trials", "600"],
        ["measurements", "24"],
    ]
    assert "200 parameters, 3 for each" in lines[2]
    stated = {"trials": 7, "measurements": 5, "calibration_samples": 9, "recover": "0"}
    assert chosen_lines(chosen(space="quantize-only", **stated)) == [
        "nothing was left to choose: every setting is stated"
    ]


def test_a_slow_model_is_looked_at_on_fewer_samples(chosen: Callable[..., Settings]) -> None:
    assert [chosen(forward=f).calibration_samples for f in (0.03, 0.06, 0.1, 0.2, 5.0)] == [256, 128, 64, 32, 32]
    assert chosen(forward=0.03, minutes=5.0).calibration_samples == 64  # 1 % of them
    assert chosen(forward=1e-6, samples=50).calibration_samples == 50


def test_no_clock_decides_in_a_deterministic_search(chosen: Callable[..., Settings]) -> None:
    found = chosen(forward=5.0, deterministic=True)
    assert found.calibration_samples == 256
    assert "no clock" in reasons(found)["calibration_samples"]


def test_more_minutes_ask_for_more(chosen: Callable[..., Settings]) -> None:
    found = [chosen(minutes=minutes, forward=5e-3) for minutes in (0.1, 2.0, 10.0, 60.0)]
    trials, measurements = [s.trials for s in found], [s.measurements for s in found]
    assert trials == sorted(trials)
    assert measurements == sorted(measurements)
    assert trials[0] == automatic.LEAST_TRIALS
    assert measurements[0] == automatic.LEAST_MEASUREMENTS
    assert trials[-1] == automatic.MOST_TRIALS
    assert measurements[-1] > automatic.MEASUREMENTS
    assert all(s.measurements <= s.trials // automatic.OF_TRIALS for s in found)


def test_targets_and_members_count(chosen: Callable[..., Settings]) -> None:
    two = ["x86-host", "cortex-a76"]
    assert chosen(profiles=two).measurements == automatic.MEASUREMENTS + automatic.A_TARGET
    assert chosen(family=["2x", "3x"]).measurements == automatic.MEASUREMENTS + 2 * automatic.A_MEMBER
    one, slower = chosen(minutes=5.0), chosen(minutes=5.0, profiles=two)
    assert slower.measurements < one.measurements, "an estimate takes longer than a timing here"


def test_what_trains_gets_a_third_and_wider_choices(chosen: Callable[..., Settings]) -> None:
    found = chosen(tiny_task.learning(), minutes=30.0)
    amount, unit = found.training
    assert unit == "seconds"
    assert automatic.LEAST_TRAINING <= amount <= 600.0
    assert found.space == "trained"
    for task, options in (
        (tiny_task.task(), {"minutes": 30.0}),  # no data to train with
        (tiny_task.learning(), {}),  # no minutes to take it from
        (tiny_task.learning(), {"minutes": 1.0}),  # too few
    ):
        without = chosen(task, **options)
        assert (without.recover, without.space) == ("0", "default"), options


def test_training_that_would_be_refused_is_not_chosen(
    chosen: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UsageError("600 s are too short: a step takes 60 s here")

    monkeypatch.setattr(automatic, "check_training", refuse)
    found = chosen(tiny_task.learning(), minutes=30.0)
    assert (found.recover, found.space) == ("0", "default")
    assert reasons(found)["recover"] == "600 s are too short: a step takes 60 s here"


def test_a_recipe_that_is_not_there_is_told(chosen: Callable[..., Settings]) -> None:
    with pytest.raises(UsageError, match="no-such-recipe"):
        chosen(tiny_task.learning(), minutes=30.0, recipe="no-such-recipe")


def test_a_goal_on_the_size_alone_asks_for_smaller_weights(chosen: Callable[..., Settings]) -> None:
    assert chosen(max_size="5x").space == "size"
    assert chosen(max_size="5x", max_latency="2x").space == "default"


def test_more_parameters_ask_for_more_trials(chosen: Callable[..., Settings]) -> None:
    assert [chosen(parameters=n).trials for n in (3, 100, 200)] == [300, 300, 600]
    assert chosen(parameters=200, minutes=600.0).trials == 2000


def test_no_more_trials_than_candidates(chosen: Callable[..., Settings]) -> None:
    found = chosen(candidates=32)
    assert found.trials == 32
    assert found.measurements == 8, "a quarter of them"
    assert "no more candidates" in reasons(found)["trials"]


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_dry_run_says_it_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "dry"
    arguments = ["search", TASK, "--dry-run", "--out", str(out), "--trials", "70"]
    assert main([*arguments, "--auto", "--minutes", "3"]) == 0
    shown = capsys.readouterr().out
    assert "parameters to choose" in shown
    assert "chosen:" in shown
    assert not (tmp_path / "runs").exists()
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["settings"]["trials"], said["settings"]["measurements"], said["settings"]["auto"]) == (70, 24, False)
    assert said["searched"]["layers"] == 4
    assert not (tmp_path / "runs").exists()
    assert main(["search", "nothing", "--auto", "--dry-run", "--out", str(out)]) == 2
    assert "unknown task 'nothing'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("short_tuning", "without_exports")
def test_a_run_has_what_was_chosen_and_goes_on_with_it(
    small: Callable[..., SearchResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = small(auto=True)
    kept = read_settings(result.folder / "config.yaml")
    assert isinstance(kept.auto, dict)
    assert set(kept.auto) == {"calibration_samples", "recover"}  # the others are stated
    assert (kept.trials, kept.calibration_samples) == (4, 64)
    # what would be chosen by now is another matter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automatic, "SAMPLES", (32,))
        again = small(auto=True, resume=True, trials=5)
    assert read_settings(again.folder / "config.yaml").calibration_samples == 64
    assert read_settings(again.folder / "config.yaml").auto == kept.auto
    assert again.run.summary.told == 5
    # the training that was chosen is no part of fewer minutes
    config = again.folder / "config.yaml"
    config.write_text(config.read_text().replace("recover: '0'", "recover: 90s"))
    with pytest.raises(UsageError, match=r"recover \(90s\) is a part of minutes \(1\)"):
        small(auto=True, resume=True, minutes=1.0)
    assert "chosen automatically" in (again.folder / "report.html").read_text(encoding="utf-8")


def test_a_reason_is_of_the_value_that_was_chosen(tmp_path: Path) -> None:
    reasons = {"trials": "the time is for so many", "calibration_samples": "the layers need so many"}
    begun = load_settings(None, {"task": TASK, "trials": 100, "calibration_samples": 32, "out": str(tmp_path)})
    (tmp_path / CONFIG).write_text(dump_settings(begun.model_copy(update={"auto": reasons})))
    stated = load_settings(None, {"task": TASK, "auto": True, "trials": 600, "out": str(tmp_path)})
    settings = as_begun(stated, tmp_path)
    assert (settings.trials, settings.calibration_samples) == (600, 32)
    assert settings.auto == {"calibration_samples": reasons["calibration_samples"]}
