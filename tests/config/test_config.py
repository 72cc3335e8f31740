"""Settings: where they come from, who wins, and what is refused in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autocomp import search
from autocomp.config.quantities import format_bytes, format_milliseconds, parse_bytes, parse_seconds
from autocomp.config.settings import (
    Goals,
    Settings,
    differences,
    dump_settings,
    load_settings,
    read_settings,
    settings_schema,
)
from autocomp.errors import UsageError


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith("AUTOCOMP_"):
            monkeypatch.delenv(name)


def write(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_defaults() -> None:
    settings = load_settings(None, {"task": "digits"})
    assert settings.profiles == ["x86-host"]
    assert settings.out == "runs/digits"
    assert settings.goals == Goals()


def test_out_is_named_after_the_function() -> None:
    assert load_settings(None, {"task": "package.module:keywords"}).out == "runs/keywords"


def test_flag_over_variable_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "trials: 10\nmeasure: 11\nseed: 12\nprofiles: [a]\ngoals: {max_drop: 0.5, max_size: 7}")
    monkeypatch.setenv("AUTOCOMP_MEASURE", "21")
    monkeypatch.setenv("AUTOCOMP_SEED", "22")
    monkeypatch.setenv("AUTOCOMP_PROFILES", "b, c")
    monkeypatch.setenv("AUTOCOMP_MAX_LATENCY", "0.5ms")
    settings = load_settings(path, {"seed": 32, "max_drop": 0.25, "space": None})
    assert (settings.trials, settings.measurements, settings.seed) == (10, 21, 32)
    assert settings.profiles == ["b", "c"]
    assert settings.space == "default"
    assert settings.goals == Goals(max_drop=0.25, max_latency=0.0005, max_size=7)


def test_toml_and_yaml_say_the_same(tmp_path: Path) -> None:
    yaml = write(tmp_path, "task: digits\nminutes: 1.5\ngoals:\n  max_latency: 0.001\n")
    toml = write(tmp_path, 'task = "digits"\nminutes = 1.5\n[goals]\nmax_latency = 1e-3\n', "c.toml")
    assert load_settings(yaml) == load_settings(toml)


def test_dump_reads_back(tmp_path: Path) -> None:
    settings = load_settings(None, {"task": "digits", "max_latency": 3e-6, "minutes": 2, "storage": "sqlite:///x.db"})
    assert read_settings(write(tmp_path, dump_settings(settings))) == settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trails: 10", ["trails: there is no such key", "Did you mean 'trials'?"]),
        ("goals: {max_dorp: 1}", ["goals.max_dorp: there is no such key", "'max_drop'"]),
        ("max_drop: 0.1", ["max_drop: this key stands under goals"]),
        ("trials: '10'", ["trials: must be a number, got the text '10'", "leave out the quotes"]),
        ("minutes: 1e-3", ["minutes: must be a number, got the text '1e-3'", "write 1.0e-3"]),
        ("minutes: 5e2", ["write 5.0e+2"]),
        ("trials: 10.5", ["trials: must be a whole number, got 10.5"]),
        ("trials: true", ["trials: must be a whole number, got True"]),
        ("trials: 0", ["trials: must be greater than or equal to 1, got 0"]),
        ("minutes: .nan", ["minutes: must be a finite number"]),
        ("references: 'yes'", ["references: must be true or false"]),
        ("profiles: x86-host", ["profiles: must be a list"]),
        ("profiles: []", ["profiles: must be a list with at least one entry"]),
        ("profiles: [a, a]", ["profiles must differ"]),
        ("goals: 3", ["goals: must be keys and values"]),
        ("goals: {max_latency: 3 parsecs}", ["goals.max_latency: must be a duration", "'3 parsecs'"]),
        ("goals: {max_latency: '0.001'}", ["goals.max_latency: must be a number"]),
        ("goals: {max_size: 0}", ["goals.max_size: must be greater than 0"]),
        ("task: ''", ["task: must be a non-empty text"]),
        ("format_version: 2", ["has format_version 2"]),
        ("[1, 2]", ["must hold keys and values"]),
        ("a: [", ["is not valid YAML", "line 1"]),
    ],
)
def test_refused_with_file_key_rule_and_value(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_settings(path)
    for word in [str(path), *words] if "differ" not in words[0] else words:
        assert word in str(caught.value)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(write(tmp_path, "trails: 1\nseed: -1\nmeasure: 0"))
    assert len(str(caught.value).splitlines()) == 3


def test_toml_fault_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not valid TOML.*line 2"):
        load_settings(write(tmp_path, "trials = 3\nx==2", "c.toml"))


def test_no_file() -> None:
    with pytest.raises(UsageError, match=r"there is no file nowhere\.yaml"):
        load_settings("nowhere.yaml")


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        load_settings(path)


def test_variable_with_a_typo_is_refused_and_a_stranger_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", "/somewhere")
    monkeypatch.setenv("AUTOCOMP_BENCHMARKING", "1")
    assert load_settings() == Settings()
    monkeypatch.setenv("AUTOCOMP_TRAILS", "1")
    with pytest.raises(UsageError, match=r"AUTOCOMP_TRAILS is no setting\. Did you mean 'TRIALS'"):
        load_settings()


def test_variable_of_the_wrong_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMP_TRIALS", "many")
    with pytest.raises(UsageError, match="environment: trials: must be a number, got the text 'many'"):
        load_settings()


def test_goals_as_keyword() -> None:
    assert load_settings(None, {"goals": Goals(max_drop=0.5)}).goals.max_drop == 0.5
    assert load_settings(None, {"goals": {"max_drop": 0.5}, "max_size": 3}).goals == Goals(max_drop=0.5, max_size=3)
    with pytest.raises(UsageError, match="goals: must be keys and values"):
        load_settings(None, {"goals": 4})


def test_differences_leave_the_budget_out() -> None:
    old = load_settings(None, {"task": "digits"})
    more = load_settings(
        None, {"task": "digits", "trials": 999, "measurements": 99, "minutes": 9.0, "out": "elsewhere"}
    )
    assert differences(old, more) == []
    other = load_settings(None, {"task": "digits", "seed": 3, "max_drop": 0.1})
    assert differences(old, other) == ["seed: 0 -> 3", "goals.max_drop: None -> 0.1"]


def test_what_is_left_is_what_nobody_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "trials: 10\nauto: true")
    monkeypatch.setenv("AUTOCOMP_MEASUREMENTS", "21")
    settings = load_settings(path, {"task": "digits", "recover": "10min"})
    assert settings.left == ("calibration_samples",)  # what is trained is searched for in another space
    assert load_settings(None, {"task": "digits"}).left == ()
    monkeypatch.setenv("AUTOCOMP_AUTO", "yes")
    assert load_settings(None, {"task": "digits"}).auto is True
    monkeypatch.delenv("AUTOCOMP_AUTO")
    chosen = settings.model_copy(update={"auto": {"trials": "97 parameters"}})
    again = load_settings(write(tmp_path, dump_settings(chosen), "again.yaml"), {"measurements": 21})
    assert again == chosen
    assert again.left == ()


@pytest.mark.parametrize("value", ["perhaps", 3, ["trials"], {"seed": "by hand"}, {"trials": 3}])
def test_auto_is_yes_or_no(value: object) -> None:
    with pytest.raises(UsageError, match=r"^auto: must be true or false, got "):
        load_settings(None, {"task": "digits", "auto": value})


def test_schema_is_json_and_closed() -> None:
    schema = json.loads(json.dumps(settings_schema()))
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Settings.model_fields)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0.5ms", 0.0005), ("300us", 0.0003), ("2 s", 2.0), ("7NS", 7e-9), ("1e-1ms", 1e-4)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("text", ["", "5", "ms", "-3ms", "5KB", "1..5ms", "nan s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="must be a duration"):
        parse_seconds(text)


def test_sizes() -> None:
    assert parse_bytes("500KB") == 500_000
    assert parse_bytes("1.5 MiB") == 1_572_864
    assert parse_bytes("10b") == 10
    assert format_bytes(1_602_472) == "1.6 MB"
    assert format_bytes(512) == "512 B"
    assert format_milliseconds(0.0002844) == "0.284 ms"


def test_nothing_is_given_beside_settings() -> None:
    settings = load_settings(None, {"task": "digits"})
    for beside in ({"trials": 3}, {"out": "x"}, {"task": "tokens"}, {"space": "wide"}):
        with pytest.raises(UsageError, match=f"{next(iter(beside))} is given beside settings"):
            search(settings=settings, **beside)


def test_old_names_are_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "measure: 11\ngoals: {max_bytes: 7}")
    settings = load_settings(path, {"task": "digits"})
    assert (settings.measurements, settings.goals.max_size) == (11, 7)
    assert load_settings(None, {"measure": 3, "goals": {"max_bytes": 5}}).measurements == 3
    monkeypatch.setenv("AUTOCOMP_MEASURE", "4")
    assert load_settings(path, {"max_bytes": "9B"}) == load_settings(None, {"measurements": 4, "max_size": 9})
    with pytest.raises(UsageError, match="measure is the old name of measurements, and both are given"):
        load_settings(None, {"measure": 3, "measurements": 4})


def test_an_early_end_is_not_deterministic() -> None:
    with pytest.raises(UsageError, match="stop_when_met ends a search by measured times"):
        load_settings(None, {"task": "digits", "deterministic": True, "stop_when_met": True, "max_drop": 0.1})


@pytest.mark.parametrize(
    ("given", "training", "space"),
    [
        (None, (0.0, "seconds"), "default"),
        ("0", (0.0, "seconds"), "default"),
        (0, (0.0, "seconds"), "default"),
        ("0s", (0.0, "seconds"), "default"),
        ("10min", (600.0, "seconds"), "trained"),
        ("500 steps", (500.0, "steps"), "trained"),
        ("5epochs", (5.0, "epochs"), "trained"),
    ],
)
def test_how_long_to_train_and_where_to_look_then(given: object, training: tuple[float, str], space: str) -> None:
    settings = load_settings(overrides={"task": "digits", "recover": given})
    assert (settings.training, settings.space) == (training, space)
    named = load_settings(overrides={"task": "digits", "recover": given, "space": "prune-only"})
    assert named.space == "prune-only"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"recover": "a while"}, "recover: must be how long to train, such as 10min"),
        ({"recover": "2.5steps"}, "a whole number of steps or epochs"),
        ({"recover": True}, "recover: must be how long to train"),
        ({"recover": "10min", "minutes": 5.0}, r"recover \(10min\) is a part of minutes \(5\)"),
        ({"recover": "10min", "deterministic": True}, "give it in steps"),
    ],
)
def test_a_length_of_training_that_cannot_be(given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_settings(overrides={"task": "digits", **given})
