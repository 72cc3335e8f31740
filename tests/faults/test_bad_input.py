"""Bad input, as a table: each gives its exit code and one message of at most ten lines; never a traceback, and nothing is left behind.

Everything runs in this process through the command line's own entry. Rows are ``(what is wrong, words of the message)``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_run import write_fake_run
from torch import nn

from autocomp.cli.main import MESSAGE_LINES, main
from autocomp.tasks import BUILT_IN

Refused = Callable[..., str]
torch.set_num_threads(1)


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Refused:
    """Run a command in an empty folder and with an empty cache, hold it to the rules above, and return its message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(BUILT_IN, "digits", f"{__name__}:not_refused")
    for name in list(os.environ):
        if name.startswith("AUTOCOMP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path_factory.mktemp("cache")))  # another test may have filled a store

    def run(*arguments: str, code: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        found = main(arguments)
        out, err = capsys.readouterr()
        assert (found, out) == (code, ""), err
        lines = err.rstrip("\n").split("\n")
        assert err.strip()
        assert len(lines) <= MESSAGE_LINES, err
        assert max(map(len, lines)) < 2500, "what was given is not echoed whole"
        assert "Traceback" not in err
        assert "--debug" not in err, "an error that was not foreseen"
        assert all(character.isprintable() or character == "\n" for character in err), "nothing steers the terminal"
        left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and "__pycache__" not in str(path)]
        assert left == []
        return err

    return run


def not_refused(progress: object) -> None:
    """In the place of a built-in task: what comes as far as to train one was not refused in time."""
    pytest.fail("the task was made")


LONG = "x" * 5000
NO_FILE = "n" * 300  # no file system takes a name of so many bytes

CLI = [
    (["serch"], "Did you mean 'search'"),
    (["\x1b[31mred"], "there is no command"),
    ([LONG], "there is no command"),
    (["search"], "no task is given"),
    (["search", ""], "no task is given"),
    (["search", "digit"], "Did you mean 'digits'"),
    (["search", LONG], "printable characters"),
    (["search", "a\nb"], "printable characters"),
    (["search", "no_such_module:task"], "there is no module 'no_such_module'"),
    (["search", "..:task"], "package.module:function"),
    (["search", "a b:c"], "package.module:function"),
    (["search", "json:"], "package.module:function"),
    (["search", ":task"], "package.module:function"),
    (["search", "json:dump"], "the function raised TypeError"),
    (["search", "json:nothing"], "has no 'nothing'"),
    (["search", "digits", "more"], "unexpected extra argument"),
    (["search", "digits", "--task", "other"], "two tasks are given"),
    (["search", "digits", "--trails", "3"], "--trials"),
    (["search", "digits", "--trials"], "requires an argument"),
    (["search", "digits", "--trials", "0"], "trials: must be greater than or equal to 1"),
    (["search", "digits", "--trials", "-3"], "trials: must be"),
    (["search", "digits", "--trials", "1e3"], "not a valid integer"),
    (["search", "digits", "--trials", "9" * 400], "trials: must be less than"),
    (["search", "digits", "--trials", "9" * 5000], "not a valid integer"),
    (["search", "digits", "--trials", LONG], "not a valid integer"),
    (["search", "digits", "--measurements", "0"], "measurements: must be"),
    (["search", "digits", "--minutes", "0"], "minutes: must be greater than 0"),
    (["search", "digits", "--minutes", "-1"], "minutes: must be"),
    (["search", "digits", "--minutes", "nan"], "minutes: must be"),
    (["search", "digits", "--minutes", "inf"], "minutes: must be"),
    (["search", "digits", "--minutes", "1e300"], "minutes: must be less than"),
    (["search", "digits", "--seed", "-1"], "seed: must be"),
    (["search", "digits", "--seed", str(2**32)], "seed: must be"),
    (["search", "digits", "--max-drop", "-0.1"], "'--max-drop': must be"),
    (["search", "digits", "--max-drop", "inf"], "'--max-drop': must be"),
    (["search", "digits", "--max-drop", "abc"], "a share of the uncompressed model's"),
    (["search", "digits", "--max-drop", "900%"], "must be at most 100%"),
    (["search", "digits", "--max-drop", "0.1", "--max-drop", "0.2"], "a limit is given twice"),
    (["search", "digits", "--max-drop", "x=0.1", "--max-drop", "x=0.2"], "a limit is given twice for 'x'"),
    (["search", "digits", "--max-latency", "0.5x"], "must be at least 1x"),
    (["search", "digits", "--max-latency", "nope=2x"], "names profile 'nope', which is not searched for"),
    (["search", "digits", "--max-size", "0.1x"], "must be at least 1x"),
    (["search", "digits", "--max-energy", "0.5x"], "must be at least 1x"),
    (["search", "digits", "--max-energy", "5"], "an energy with its unit"),
    (["search", "digits", "--max-energy", "nope=2x"], "names profile 'nope', which is not searched for"),
    (["search", "digits", "--max-energy", "2x"], "the profile 'x86-host' does not state what its board draws"),
    (["plan", "digits", "--max-energy", "5mJ"], "the profile 'x86-host' does not state what its board draws"),
    (["search", "digits", "--family", "2x,half"], "family: must be how many times"),
    (["search", "digits", "--stop-when-met"], "needs something to be met"),
    (["search", "digits", "--sampler", "magic"], "sampler: must be"),
    (["search", "digits", "--sampler", "given"], "a sampler of the caller's own"),
    (["search", "digits", "--storage", "nonsense"], "storage nonsense cannot be opened"),
    (["plan", "digits", "--max-latency", "0.5x"], "must be at least 1x"),
    (["gate", "nowhere"], "there is no run folder"),
    (["search", "digits", "--max-latency", "0.5"], "a duration with its unit"),
    (["search", "digits", "--max-latency", "0ms"], "max_latency: must be greater than 0"),
    (["search", "digits", "--max-latency", "-1ms"], "a duration with its unit"),
    (["search", "digits", "--max-latency", "1e400ms"], "must be at most"),
    (["search", "digits", "--max-latency", "1" * 500 + "ms"], "a duration with its unit"),
    (["search", "digits", "--max-latency", "5 minutes"], "a duration with its unit"),
    (["search", "digits", "--max-size", "1e400KB"], "must be at most"),
    (["search", "digits", "--max-size", "1e30GB"], "must be at most"),
    (["search", "digits", "--max-size", "1e-400KB"], "max_size: must be greater than 0"),
    (["search", "digits", "--max-size", "0.5B"], "max_size: must be greater than 0"),
    (["search", "digits", "--max-size", "5 pages"], "a size with its unit"),
    (["search", "digits", "--max-size", "KB"], "a size with its unit"),
    (["search", "digits", "--max-size", ""], "a size with its unit"),
    (["search", "digits", "--profile", "x86-hots"], "Did you mean 'x86-host'"),
    (["search", "digits", "--profile", "x86-host", "--profile", "x86-host"], "must differ"),
    (["search", "digits", "--profile", ""], "profiles[0]: must be a non-empty text"),
    (["search", "digits", "--profile", LONG], "profiles[0]: must be one line"),
    (["search", "digits", "--profile", "./" + NO_FILE + ".yaml"], "cannot be read: File name too long"),
    (["search", "digits", "--profile", "nowhere.yaml"], "there is no file nowhere.yaml"),
    (["search", "digits", "--profile", "./"], "is a folder"),
    (["search", "digits", "--profile", "/dev/zero"], "is no regular file"),
    (["search", "digits", *(part for n in range(20) for part in ("--profile", f"p{n}"))], "at most 16 items"),
    (["search", "digits", "--space", "defualt"], "Did you mean 'default'"),
    (["search", "digits", "--space", ""], "space: must be a non-empty text"),
    (["search", "digits", "--space", NO_FILE], "File name too long"),
    (["search", "digits", "--space", "/dev/null"], "is no regular file"),
    (["search", "digits", "--space", "."], "is a folder"),
    (["search", "digits", "--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
    (["search", "digits", "--config", "."], "is a folder"),
    (["search", "digits", "--config", NO_FILE], "File name too long"),
    (["search", "digits", "--config", "/dev/zero"], "is no regular file"),
    (["search", "digits", "--config", "/dev/null"], "is no regular file"),
    (["search", "digits", "--out", ""], "out: must be a non-empty text"),
    (["search", "digits", "--out", "/proc/run"], "cannot be written"),
    (["search", "digits", "--out", "/dev/null"], "it is a file"),
    (["search", "digits", "--out", "/dev/null/run"], "cannot be written"),
    (["search", "digits", "--out", NO_FILE], "its name is too long"),
    (["search", "digits", "--out", "a\tb"], "printable characters"),
    (["search", "digits", "--resume"], "there is no run to resume"),
    (["search", "--resume", "--out", "nowhere"], "there is no run to resume in nowhere"),
    (["check"], "no task is given"),
    (["check", "digits", "--profile", "nowhere.yaml"], "there is no file"),
    (["check", "digits", "--trials", "3"], "No such option"),
    (["sensitivity"], "no task is given"),
    (["sensitivity", "digits", "--space", "nothing"], "unknown search space"),
    (["report"], "Missing argument"),
    (["report", "nowhere"], "there is no run folder"),
    (["report", NO_FILE], "no run folder"),
    (["report", "."], "holds no front.json"),
    (["report", "/dev/null"], "there is no run folder"),
    (["measure"], "Missing argument"),
    (["measure", "digit"], "unknown task"),
    (["measure", "nowhere.pt2"], "there is no file nowhere.pt2"),
    (["measure", NO_FILE + ".pt2"], "there is no file"),
    (["measure", "/dev/null.pt2"], "there is no file"),
    (["measure", "digits", "--kernels", "-1"], "--kernels"),
    (["measure", "digits", "--profile", "nothing"], "unknown hardware profile"),
    (["measure", "digits", "--profile", ""], "unknown hardware profile"),
    (["schema", "nonsense"], "nonsense"),
    (["kernels", "lits"], "Did you mean 'list'"),
    (["kernels", "list", "--profile", "nothing"], "unknown hardware profile"),
    (["kernels", "merge"], "Missing argument"),
    (["kernels", "merge", "nowhere.json"], "there is no file"),
    (["kernels", "merge", "."], "is a folder"),
    (["kernels", "merge", "/dev/zero"], "is no regular file"),
    (["kernels", "merge", NO_FILE], "File name too long"),
    (["kernels", "export", "x.json", "--profile", "x86-64-v3"], "there is no kernel store"),
    (["kernels", "verify", "--profile", "x86-64-v3"], "there is no kernel store"),
    (["kernels", "compact", "--profile", "x86-64-v3"], "there is no kernel store"),
    (["device", "lst"], "Did you mean 'list'"),
    (["device", "list", "--tracker", "board"], "--tracker must be HOST:PORT"),
    (["device", "list", "--tracker", "board:0"], "--tracker must be HOST:PORT"),
    (["device", "list", "--tracker", "board:99999"], "--tracker must be HOST:PORT"),
    (["device", "list", "--tracker", "a b:9190"], "--tracker must be HOST:PORT"),
    (["device", "list", "--tracker", "$(reboot):9190"], "--tracker must be HOST:PORT"),
    (["device", "list", "--tracker", "böard:9190"], "--tracker must be HOST:PORT"),
    (["device", "setup", "--tracker", "x;reboot:9190"], "--tracker must be HOST:PORT"),
    (["device", "setup", "--key", "pi5; reboot"], "--key must be letters"),
    (["device", "setup", "--key", "$(reboot)"], "--key must be letters"),
    (["device", "setup", "--key", "a}: b"], "--key must be letters"),
    (["device", "setup", "--key", ""], "--key must be letters"),
    (["device", "setup", "--key", LONG], "--key must be letters"),
    (["device", "probe"], "Missing option"),
    (["device", "probe", "--profile", "cortex-a76"], "states no board"),
    (["device", "probe", "--profile", "cortex-a76", "--tracker", "a:1", "--key", "b c"], "--key must be letters"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), CLI, ids=[" ".join(row[0])[:60].encode("unicode_escape").decode() for row in CLI]
)
def test_command_lines(refused: Refused, arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


ENVIRONMENT = [
    ("AUTOCOMP_TRIALS", "many", "environment: trials: must be a number"),
    ("AUTOCOMP_TRIALS", "1.5", "environment: trials: must be a whole number"),
    ("AUTOCOMP_TRIALS", "9" * 5000, "environment: trials: must be"),
    ("AUTOCOMP_TRAILS", "3", "is no setting. Did you mean 'TRIALS'"),
    ("AUTOCOMP_MAX_LATENCY", "0.5 parsecs", "environment: goals.max_latency"),
    ("AUTOCOMP_MAX_SIZE", "1e400KB", "environment: goals.max_size: must be at most"),
    ("AUTOCOMP_REFERENCES", "perhaps", "environment: references: must be true or false"),
    ("AUTOCOMP_PROFILES", ",", "environment: profiles: must be a list with at least one entry"),
    ("AUTOCOMP_SPACE", "a\x1b[2Jb", "environment: space: must be one line"),
    ("AUTOCOMP_STORAGE", LONG, "environment: storage: must be one line"),
]


@pytest.mark.parametrize(
    ("name", "value", "words"), ENVIRONMENT, ids=[f"{row[0]}={row[1][:20]!r}" for row in ENVIRONMENT]
)
def test_variables(refused: Refused, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    monkeypatch.setenv(name, value)
    assert words in refused("search", "digits")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

# What is wrong with any YAML file, whatever it is read for.
YAML = [
    ("a: [", "not valid YAML"),
    ("\t- a", "not valid YAML"),
    ("a: b: c", "not valid YAML"),
    ("&a [*a]", "refers to itself"),
    ("a: &a {b: *a}", "refers to itself"),
    ("a: *nothing", "undefined alias"),
    (BOMB, "values, aliases written out"),
    ("[" * 200 + "]" * 200, "nested deeper than"),
    ("a: " + "{a: " * 200 + "1" + "}" * 200, "nested deeper than"),
    ("- " * 3000 + "a", "nested deeper than"),
    ("trials: 1\ntrials: 2", "stands twice"),
    ("seed: " + "9" * 5000, "not valid YAML: ValueError"),
    ("a: 2024-13-45", "not valid YAML: ValueError"),
    ("a: !!int ''", "not valid YAML"),
    ("a: !!float x", "not valid YAML"),
    ("a: !!bool perhaps", "not valid YAML"),
    ("a: !!timestamp x", "not valid YAML"),
    ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ("? [a]\n: b", "not valid YAML"),
    ("a: 1\n---\nb: 2", "not valid YAML"),
    ("a: \x00", "not valid YAML"),
    ("# " + "x" * 400_000, "larger than 256 KiB"),
    (b"\xff\xfe\x00a", "no text in UTF-8"),
]
_YAML_IDS = [repr(row[0][:30]) for row in YAML]


def write(path: Path, text: str | bytes) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(("text", "words"), YAML, ids=_YAML_IDS)
@pytest.mark.parametrize("flag", ["--config", "--space", "--profile"])
def test_yaml(refused: Refused, tmp_path: Path, flag: str, text: str | bytes, words: str) -> None:
    write(tmp_path / "file.yaml", text)
    message = refused("search", "digits", flag, "file.yaml")
    assert "file.yaml" in message
    assert words in message


CONFIG = [
    ("[1, 2]", "must hold keys and values"),
    ("3", "must hold keys and values"),
    ("1: 2", "must hold keys and values"),
    ("format_version: 2", "has format_version 2"),
    ("format_version: x", "format_version must be a whole number"),
    ("trails: 3", "Did you mean 'trials'"),
    (f"{LONG[:900]}: 3", "there is no such key"),
    ("max_drop: 0.1", "stands under goals"),
    ("trials: 1e3", "write 1.0e+3"),
    ("trials: '3'", "leave out the quotes"),
    ("trials: 3.5", "must be a whole number"),
    ("trials: true", "trials: must be"),
    ("trials: [3]", "trials: must be"),
    ("trials: null", "trials: must be"),
    (f"trials: {LONG}", "got the text"),
    ("seed: 0x1_0000_0000_0", "seed: must be"),
    ("minutes: .inf", "minutes: must be"),
    ("minutes: .nan", "minutes: must be"),
    ("profiles: x86-host", "profiles: must be a list"),
    ("profiles: []", "at least one entry"),
    ("profiles: [1]", "profiles[0]: must be text"),
    ("profiles: [a, a]", "must differ"),
    (f"profiles: [{', '.join(f'p{n}' for n in range(3000))}]", "at most 16 items"),
    ("profiles: {a: b}", "profiles: must be a list"),
    ("space: 3", "space: must be text"),
    ("space: [a]", "space: must be text"),
    ('out: "a\\0b"', "out: must be one line"),
    ('out: ""', "out: must be a non-empty text"),
    ("task: 3", "task: must be text"),
    ("references: 1", "references: must be true or false"),
    ("references: 'yes'", "references: must be true or false"),
    ("goals: 3", "goals: must be keys and values"),
    ("goals: [max_drop]", "goals: must be keys and values"),
    ("goals: {max_dorp: 1.0}", "Did you mean 'max_drop'"),
    ("goals: {max_drop: -1.0}", "goals.max_drop: must be"),
    ("goals: {max_drop: .inf}", "goals.max_drop: must be"),
    ("goals: {max_latency: 5}", "goals.max_latency"),
    ("goals: {max_latency: '5 parsecs'}", "a duration with its unit"),
    ("goals: {max_size: 1e400KB}", "must be at most"),
    ("goals: {max_size: " + "9" * 400 + "}", "goals.max_size: must be less"),
    ("calibration_samples: 0", "calibration_samples: must be"),
    ("storage: 3", "storage: must be text"),
    ("\n".join(f"key{n}: 1" for n in range(60)), "and 52 more"),
]


@pytest.mark.parametrize(("text", "words"), CONFIG, ids=[repr(row[0][:40]) for row in CONFIG])
def test_configs(refused: Refused, tmp_path: Path, text: str, words: str) -> None:
    if text != "goals: {max_latency: 5}":  # five seconds are a limit, and the task is what is missing
        write(tmp_path / "file.yaml", text)
        assert words in refused("search", "--config", "file.yaml", *(() if "task:" in text else ("digits",)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trials =", "not valid TOML"),
        ("trials = 1\ntrials = 2", "not valid TOML"),
        ("seed = " + "9" * 5000, "not valid TOML"),
        ("a = " + "[" * 2000 + "]" * 2000, "TOML"),
        ("a = " + "[" * 60 + "]" * 60, "nested deeper than"),
        ("trials = 'x'", "must be a number"),
        (b"\xff", "no text in UTF-8"),
    ],
)
def test_toml(refused: Refused, tmp_path: Path, text: str | bytes, words: str) -> None:
    write(tmp_path / "file.toml", text)
    assert words in refused("search", "digits", "--config", "file.toml")


STORAGES = [
    ("nonsense", "cannot be opened"),
    ("sqlite:///no/such/folder/a.db", "cannot be opened"),
    ("sqlite:///.", "cannot be opened"),
    ("nosql://a/b", "cannot be opened"),
    ("postgresql://user:secret@nowhere.invalid/db", "cannot be opened"),
    ("postgresql://user:secret@host:port/db", "storage"),
]


@pytest.mark.parametrize(("url", "words"), STORAGES, ids=[row[0] for row in STORAGES])
def test_storages_are_refused_before_the_task_is_made(refused: Refused, tmp_path: Path, url: str, words: str) -> None:
    write(tmp_path / "c.yaml", yaml.safe_dump({"storage": url}))
    message = refused("search", "no_such_module:task", "--config", "c.yaml")
    assert words in message
    assert "secret" not in message


@pytest.mark.parametrize("kind", ["file", "link to itself", "below a file"])
def test_caches_are_refused_before_the_task_is_made(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = tmp_path / "cache"
    if kind == "link to itself":
        place.symlink_to(place)
    else:
        place.write_text("")
    monkeypatch.setenv("AUTOCOMP_CACHE", str(place / "below" if kind == "below a file" else place))
    message = refused("search", "no_such_module:task")
    assert "cache" in message
    assert "AUTOCOMP_CACHE" in message


SPACE = [
    ("[]", "must be a mapping"),
    ("rules: []", "format_version"),
    ("format_version: 1", "rules"),
    ("format_version: 2\nrules: []", "a newer one wrote it"),
    ("format_version: 9" + "9" * 300 + "\nrules: []", "a newer one wrote it"),
    ("format_version: one\nrules: []", "format_version"),
    ("format_version: 1\nrules: 3", "rules"),
    ("format_version: 1\nrules: {}", "rules"),
    ("format_version: 1\nrules: [3]", "rules.0"),
    ("format_version: 1\nrules: [{}]", "rules.0.layers"),
    ("format_version: 1\nrules: [{layers: 3}]", "rules.0.layers"),
    ("format_version: 1\nrules: [{layers: [3]}]", "rules.0.layers"),
    ("format_version: 1\nrules: [{layers: '*', keeep: [0.5]}]", "Did you mean 'keep'"),
    ("format_version: 1\nrules: [{layers: '*', keep: 0.5}]", "rules.0.keep"),
    ("format_version: 1\nrules: [{layers: '*', keep: [0]}]", "rules.0.keep.0"),
    ("format_version: 1\nrules: [{layers: '*', keep: [1.5]}]", "rules.0.keep.0"),
    ("format_version: 1\nrules: [{layers: '*', keep: [-0.5]}]", "rules.0.keep.0"),
    ("format_version: 1\nrules: [{layers: '*', keep: [.nan]}]", "rules.0.keep.0"),
    ("format_version: 1\nrules: [{layers: '*', keep: [5e-1]}]", "is a text"),
    ("format_version: 1\nrules: [{layers: '*', keep: ['" + "5" * 4000 + "']}]", "is a text"),
    ("format_version: 1\nrules: [{layers: '*', keep: [true]}]", "rules.0.keep.0"),
    ("format_version: 1\nrules: [{layers: '*', ranks: [2]}]", "rules.0.ranks.0"),
    ("format_version: 1\nrules: [{layers: '*', spatial_ranks: x}]", "rules.0.spatial_ranks"),
    ("format_version: 1\nrules: [{layers: '*', precisions: [fp64]}]", "rules.0.precisions.0"),
    ("format_version: 1\nrules: [{layers: '*', precisions: fp32}]", "rules.0.precisions"),
    ("format_version: 1\nrules: []\nprotect: stem", "protect"),
    ("format_version: 1\nrules: []\nends: none", "ends"),
    ("format_version: 1\nrules: []\nkernels_only: 3", "kernels_only"),
    ("format_version: 1\nrules: []\nobserver: best", "observer"),
    ("format_version: 1\nrules: []\nequalize: true", "Did you mean 'equalise'"),
    ("format_version: 1\nrules: []\ndescription: [a]", "description"),
]


@pytest.mark.parametrize(("text", "words"), SPACE, ids=[repr(row[0][17:60]) for row in SPACE])
def test_spaces(refused: Refused, tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path / "space.yaml", text)
    message = refused("check", "no_such_module:task", "--space", "space.yaml")
    assert "space.yaml" in message
    assert words in message


STATED: dict[str, Any] = {
    "format_version": 1, "name": "mine", "reach": "estimate", "core": "cortex-a76", "clock_hz": 2.4e9, "lanes": 4,
    "vector_registers": 32, "precisions": ["fp32"], "int8": "sdot", "caches": {"l1d": 65536, "l2": 524288},
    "target": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76", "mattr": ["+dotprod"]},
}  # fmt: skip
TARGET = STATED["target"]
PROFILE: list[tuple[dict[str, Any], str]] = [
    ({"target": {**TARGET, "kind": "cuda"}}, "must have kind: llvm"),
    ({"target": {**TARGET, "kind": "nonsense"}}, "must have kind: llvm"),
    ({"target": {**TARGET, "kind": 3}}, "with its kind"),
    ({"target": "llvm"}, "must be `detect`"),
    ({"target": ["llvm"]}, "must be `detect`"),
    ({"target": {**TARGET, "mcup": "x"}}, "Did you mean 'mcpu'"),
    ({"target": {**TARGET, "device": "x"}}, "must have no key 'device'"),
    ({"target": {**TARGET, LONG: "x"}}, "must have no key"),
    ({"target": {**TARGET, "mcpu": "cortex-a766"}}, "LLVM knows no processor 'cortex-a766'"),
    ({"target": {**TARGET, "mcpu": 76}}, "must have mcpu as a short text"),
    ({"target": {**TARGET, "mcpu": LONG}}, "must have mcpu as a short text"),
    ({"target": {**TARGET, "mtriple": "nowhere-linux-gnu"}}, "LLVM knows no processor"),
    ({"target": {**TARGET, "mattr": "+dotprod"}}, "must have mattr as a list"),
    ({"target": {**TARGET, "mattr": ["dotprod"]}}, "each with its sign"),
    ({"target": {**TARGET, "mattr": ["+dotprodd"]}}, "LLVM knows no feature '+dotprodd'"),
    ({"target": {**TARGET, "mattr": ["+avx512f"]}}, "LLVM knows no feature '+avx512f'"),
    ({"target": {**TARGET, "mattr": ["-nonsense"]}}, "LLVM knows no feature '-nonsense'"),
    ({"target": {**TARGET, "num-cores": 4}}, "the same cores"),
    ({"target": "detect"}, "must have reach: local"),
    ({"cores": 0}, "cores: must be"),
    ({"cores": 1_000_000}, "cores: must be less than"),
    ({"cores": 10**300}, "cores: must be less than"),
    ({"cores": "two"}, "cores: must be a number"),
    ({"lanes": 3}, "must be a power of two"),
    ({"lanes": 128}, "lanes: must be"),
    ({"lanes": None}, "must state lanes"),
    ({"vector_registers": 1}, "vector_registers: must be"),
    ({"precisions": []}, "precisions: must be a list"),
    ({"precisions": ["fp64"]}, "precisions[0]"),
    (
        {"precisions": ["fp16"], "int8": "none", "target": {**TARGET, "mcpu": "cortex-a72"}},
        "needs the instruction set fullfp16",
    ),
    ({"int8": "vnni512"}, "needs the instruction set avx512vnni"),
    ({"int8": "vnni256"}, "needs the instruction set avxvnni"),
    ({"int8": "neon"}, "int8: must be"),
    ({"clock_hz": 0.0}, "clock_hz: must be"),
    ({"clock_hz": 1e30}, "clock_hz: must be"),
    ({"clock_hz": float("nan")}, "clock_hz: must be"),
    ({"caches": {"l1d": -64, "l2": 64}}, "whole lines"),
    ({"caches": {"l1d": 2**60, "l2": 64}}, "whole lines"),
    ({"caches": {"l9": 64}}, "caches.l9"),
    ({"cache_ways": {"l1d": 0}}, "cache_ways.l1d"),
    ({"cache_ways": {"l3": 8}}, "caches.l3"),
    ({"memory_bytes": 0}, "memory_bytes: must be"),
    ({"memory_bytes": 10**40}, "memory_bytes: must be"),
    ({"memory_bandwidth": {"read": 1.0}}, "memory_bandwidth.read"),
    ({"power": {"idle": -1.0}}, "power.idle"),
    ({"power": {"idle": 1.0, "cores": 0}}, "power.cores"),
    ({"core": "cortex-a77"}, "Did you mean 'cortex-a76'"),
    ({"core": "../../../etc/passwd"}, "there is no core model"),
    ({"core": None}, "must state core"),
    ({"reach": "guess"}, "reach: must be"),
    ({"reach": "rpc"}, "must state rpc"),
    ({"reach": "rpc", "rpc": {"tracker": "x", "key": "a"}}, "rpc.tracker: must be host:port"),
    ({"reach": "rpc", "rpc": {"tracker": "a;b:9190", "key": "a"}}, "rpc.tracker: must be host:port"),
    ({"reach": "rpc", "rpc": {"tracker": "a:9190", "key": "a b"}}, "rpc.key: must be letters"),
    ({"reach": "local"}, "its target is of aarch64"),
    ({"format_version": 2}, "a newer one wrote it"),
    ({"name": ""}, "name: must be a non-empty text"),
    ({"name": LONG}, "name: must be"),
    ({"description": LONG}, "description: must be"),
    ({"lanse": 4}, "Did you mean 'lanes'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), PROFILE, ids=[str(row[0])[:60] for row in PROFILE])
def test_profiles(refused: Refused, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    stated = {key: value for key, value in {**STATED, **change}.items() if value is not None}
    write(tmp_path / "mine.yaml", yaml.safe_dump(stated))
    message = refused("check", "no_such_module:task", "--profile", "mine.yaml")
    assert "mine" in message
    assert words in message


def test_cores_of_this_machine_are_there(refused: Refused, tmp_path: Path) -> None:
    write(
        tmp_path / "mine.yaml",
        yaml.safe_dump({"format_version": 1, "name": "m", "reach": "local", "target": "detect", "cores": 1000}),
    )
    assert "asks for 1000 cores of this machine, which has" in refused("check", "digits", "--profile", "mine.yaml")


TASKS = """
import torch
from torch import nn
from autocomp import Task

X = torch.ones(2, 6)

def made(**changes):
    parts = dict(model=nn.Linear(6, 2), example_inputs=(X,), calibration=[(X,)], evaluate=lambda model: {"a": 1.0})
    return Task(**{**parts, **changes})

def nothing(): return None
def number(): return 3
def a_class(): return Task
def raises(): raise ValueError("no such data " + "x" * 5000)
def raises_lines(): raise ValueError("a\\n" * 60)
def asks(): return made(nonsense=3)
def model_text(): return made(model="resnet")
def model_class(): return made(model=nn.Linear)
def model_nan():
    model = nn.Linear(6, 2)
    nn.init.constant_(model.weight, float("nan"))
    return made(model=model)
def model_meta(): return made(model=nn.Linear(6, 2, device="meta"))
def model_lazy(): return made(model=nn.LazyLinear(2))
def model_scripted(): return made(model=torch.jit.script(nn.Linear(6, 2)))
def model_complex(): return made(model=nn.Linear(6, 2, dtype=torch.complex64))
def inputs_tensor(): return made(example_inputs=X)
def inputs_none(): return made(example_inputs=None)
def inputs_empty(): return made(example_inputs=())
def inputs_text(): return made(example_inputs=("x",))
def inputs_nan(): return made(example_inputs=(X * float("nan"),))
def inputs_scalar(): return made(example_inputs=(torch.tensor(1.0),))
def inputs_no_rows(): return made(example_inputs=(X[:0],))
def inputs_complex(): return made(example_inputs=(X.to(torch.complex64),))
def inputs_sparse(): return made(example_inputs=(X.to_sparse(),))
def inputs_meta(): return made(example_inputs=(X.to("meta"),))
def calibration_none(): return made(calibration=None)
def calibration_empty(): return made(calibration=[])
def calibration_text(): return made(calibration="abc")
def calibration_loader(): return made(calibration=iter([(X,)]))
def calibration_tensors(): return made(calibration=[X])
def calibration_two(): return made(calibration=[(X, X)])
def calibration_dtype(): return made(calibration=[(X.long(),)])
def calibration_dimensions(): return made(calibration=[(X[0],)])
def calibration_inf(): return made(calibration=[(X * float("inf"),)])
def evaluate_none(): return made(evaluate=None)
def evaluate_value(): return made(evaluate=0.5)
def test_value(): return made(test=0.5)
def loss_value(): return made(loss=0.5)
def train_value(): return made(train=0.5)
def name_empty(): return made(name="")
def name_number(): return made(name=3)
"""
TASK = [
    ("nothing", "must return an autocomp.Task, it returned None"),
    ("number", "must return an autocomp.Task"),
    ("a_class", "must return an autocomp.Task"),
    ("raises", "the function raised ValueError: no such data"),
    ("raises_lines", "the function raised ValueError"),
    ("asks", "the function raised TypeError"),
    ("X", "must be a function"),
    ("no_such_function", "has no 'no_such_function'"),
    ("model_text", "Task.model must be a torch.nn.Module"),
    ("model_class", "Task.model must be a torch.nn.Module"),
    ("model_nan", "parameter 'weight' of Task.model holds 12 value(s) that are NaN"),
    ("model_meta", "has no values"),
    ("model_lazy", "is lazy"),
    ("model_scripted", "was scripted or traced"),
    ("model_complex", "ComplexFloat"),
    ("inputs_tensor", "write (tensor,)"),
    ("inputs_none", "Task.example_inputs must be a non-empty tuple"),
    ("inputs_empty", "Task.example_inputs must be a non-empty tuple"),
    ("inputs_text", "Task.example_inputs[0] must be a tensor"),
    ("inputs_nan", "Task.example_inputs[0] holds"),
    ("inputs_scalar", "must hold samples"),
    ("inputs_no_rows", "must hold samples"),
    ("inputs_complex", "is of complex64"),
    ("inputs_sparse", "is sparse"),
    ("inputs_meta", "has no values"),
    ("calibration_none", "Task.calibration must be a sequence"),
    ("calibration_empty", "Task.calibration is empty"),
    ("calibration_text", "Task.calibration must be a sequence"),
    ("calibration_loader", "list(loader)"),
    ("calibration_tensors", "Task.calibration[0]"),
    ("calibration_two", "Task.calibration[0] must have 1 tensor(s)"),
    ("calibration_dtype", "Task.calibration[0][0] must be like"),
    ("calibration_dimensions", "Task.calibration[0][0] must be like"),
    ("calibration_inf", "Task.calibration[0][0] holds"),
    ("evaluate_none", "Task.evaluate must be a function"),
    ("evaluate_value", "Task.evaluate must be a function"),
    ("test_value", "Task.test must be a function"),
    ("loss_value", "Task.loss must be a function"),
    ("train_value", "Task.train must be an iterable"),
    ("name_empty", "Task.name must be"),
    ("name_number", "Task.name must be"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "words"), TASK, ids=[row[0] for row in TASK])
@pytest.mark.filterwarnings("ignore")
def test_tasks(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, words: str) -> None:
    write(tmp_path / "bad_tasks.py", TASKS)
    monkeypatch.delitem(sys.modules, "bad_tasks", raising=False)
    assert words in refused("check", f"bad_tasks:{function}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def task(:", "raised SyntaxError"),
        ("import no_such_package", "there is no module 'no_such_package'"),
        ("raise RuntimeError('x' * 9000)", "raised RuntimeError"),
        ("1 / 0", "raised ZeroDivisionError"),
        ("\0", "raised"),
    ],
)
def test_modules(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    write(tmp_path / "bad_module.py", text)
    monkeypatch.delitem(sys.modules, "bad_module", raising=False)
    assert words in refused("check", "bad_module:task")


@pytest.mark.parametrize(
    "content", [b"", b"no zip", b"PK\x03\x04" + b"\0" * 100, "weights"], ids=["empty", "text", "cut", "weights"]
)
def test_files_of_exported_models(refused: Refused, tmp_path: Path, content: bytes | str) -> None:
    if content == "weights":
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "model.pt2")
    else:
        write(tmp_path / "model.pt2", content)
    assert "model.pt2 is not a torch.export file" in refused("measure", "model.pt2")


def changed(change: Callable[[dict[str, Any]], object], *, meant: bool = True) -> Callable[[Path], None]:
    """A fake run whose ``front.json`` was changed; where that is ``meant``, as an earlier version wrote it, which knew no checksum."""

    def make(run: Path) -> None:
        path = run / "front.json"
        data = json.loads(path.read_text())
        if meant:
            del data["checksum"]
        change(data)
        path.write_text(json.dumps(data))

    return make


def with_text(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda run: write(run / name, text)


def pipe(name: str) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        (run / name).unlink()
        os.mkfifo(run / name)

    return make


def folder(name: str) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return make


RUN: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "front edited": (changed(lambda d: d["front"].pop(), meant=False), 1, "is not as autocomp wrote it"),
    "front empty": (with_text("front.json", ""), 1, "does not read as JSON"),
    "front cut": (with_text("front.json", '{"format_version": 1, "task"'), 1, "does not read as JSON"),
    "front no json": (with_text("front.json", "hello"), 1, "does not read as JSON"),
    "front bytes": (with_text("front.json", b"\xff\xfe"), 1, "no text in UTF-8"),
    "front a list": (with_text("front.json", "[]"), 1, "format_version"),
    "front a number": (with_text("front.json", "3"), 1, "format_version"),
    "front no version": (with_text("front.json", "{}"), 1, "format_version"),
    "front text version": (with_text("front.json", '{"format_version": "1"}'), 1, "format_version"),
    "front long version": (with_text("front.json", json.dumps({"format_version": LONG})), 1, "format_version"),
    "front newer": (with_text("front.json", '{"format_version": 99}'), 2, "a newer one wrote it"),
    "front version alone": (with_text("front.json", '{"format_version": 1}'), 1, "not its content"),
    "front deep": (with_text("front.json", "[" * 500 + "]" * 500), 1, "nested deeper"),
    "front very deep": (with_text("front.json", "[" * 200_000 + "]" * 200_000), 1, "nested too deep"),
    "front long number": (with_text("front.json", '{"format_version": ' + "1" * 6000 + "}"), 1, "does not read"),
    "front half a character": (with_text("front.json", '{"format_version": 1, "a": "\\ud800"}'), 1, "does not read"),
    "front a pipe": (pipe("front.json"), 1, "is no regular file"),
    "front a folder": (folder("front.json"), 1, "is a folder"),
    "no task": (changed(lambda d: d.pop("task")), 1, "'task'"),
    "task a list": (changed(lambda d: d.update(task=[])), 1, "not its content"),
    "task of another kind": (changed(lambda d: d["task"].update(nonsense=1)), 1, "nonsense"),
    "bytes a text": (changed(lambda d: d["task"].update(bytes="many")), 1, "do not make a report"),
    "profiles a number": (changed(lambda d: d.update(profiles=3)), 1, "not its content"),
    "front a text": (changed(lambda d: d.update(front="abc")), 1, "not its content"),
    "front of numbers": (changed(lambda d: d.update(front=[1, 2])), 1, "not its content"),
    "candidate empty": (changed(lambda d: d["front"][0]["evaluation"].update(candidate={})), 1, "not its content"),
    "method unknown": (
        changed(lambda d: d["front"][0]["evaluation"]["candidate"].update(methods={"a": "w3"})), 1, "not a method",
    ),
    "metrics a number": (changed(lambda d: d["front"][0]["evaluation"].update(metrics=3)), 1, "not its content"),
    "latency a text": (changed(lambda d: d["front"][0]["evaluation"].update(latency="x")), 1, "not its content"),
    "seconds a text": (
        changed(lambda d: d["front"][0]["evaluation"]["latency"]["x86-host"].update(seconds="x")), 1, "not its content",
    ),
    "seconds negative": (
        changed(lambda d: d["front"][0]["evaluation"]["latency"]["x86-host"].update(seconds=-1)), 1, "no evaluation of",
    ),
    "a baseline that failed": (changed(lambda d: d["baselines"][0].update(state="failed")), 1, "not measured"),
    "files numbers": (changed(lambda d: d["front"][0].update(files={"so": 3})), 1, "a mapping of texts"),
    "verified a list": (changed(lambda d: d["front"][0].update(verified=[])), 1, "not its content"),
    "hypervolume a number": (changed(lambda d: d.update(hypervolume=3)), 1, "not its content"),
    "summary extra": (changed(lambda d: d["summary"].update(more=1)), 1, "not its content"),
    "stages a list": (changed(lambda d: d["summary"].update(seconds=[1])), 1, "do not make a report"),
    "csv missing": (lambda run: (run / "evaluations.csv").unlink(), 2, "holds no evaluations.csv"),
    "csv empty": (with_text("evaluations.csv", ""), 1, "evaluations.csv does not read"),
    "csv bytes": (with_text("evaluations.csv", b"\xff\xfe\x00"), 1, "no text in UTF-8"),
    "csv other": (with_text("evaluations.csv", "a,b\n1,2\n"), 1, "evaluations.csv does not read"),
    "csv ragged": (with_text("evaluations.csv", "a\n1,2,3\n1\n1,2\n"), 1, "evaluations.csv does not read"),
    "csv newer": (with_text("evaluations.csv", "format_version\n99\n"), 2, "a newer one wrote it"),
    "csv deep": (
        with_text("evaluations.csv", 'format_version,trial,bytes,widths,methods\n1,0,1,"' + "[" * 100_000 + '",{}\n'), 1, "does not",
    ),
    "csv a pipe": (pipe("evaluations.csv"), 1, "is no regular file"),
    "config a list": (with_text("config.yaml", "[]"), 1, "must hold a mapping"),
    "config bomb": (with_text("config.yaml", BOMB), 1, "aliases written out"),
    "config newer": (with_text("config.yaml", "format_version: 99"), 2, "a newer one wrote it"),
    "config a pipe": (pipe("config.yaml"), 1, "is no regular file"),
    "goals a list": (with_text("config.yaml", "format_version: 1\ngoals: [1]"), 1, "do not make a report"),
    "goals texts": (with_text("config.yaml", "format_version: 1\ngoals: {max_drop: x}"), 1, "do not make a report"),
    "provenance cut": (with_text("provenance.json", "{"), 1, "does not read as JSON"),
    "provenance a list": (with_text("provenance.json", "[]"), 1, "must hold a mapping"),
    "provenance a folder": (folder("provenance.json"), 1, "is a folder"),
    "report a folder": (folder("report.html"), 2, "cannot be written: it is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_run_folders(refused: Refused, tmp_path: Path, name: str) -> None:
    spoil, code, words = RUN[name]
    spoil(write_fake_run(tmp_path / "run"))
    assert words in refused("report", "run", code=code)


RESUMED = [
    ("", "config.yaml is not whole"),
    ("task: digits\nout: run", "config.yaml is not whole"),
    ("format_version: 1", "the run in run had other settings"),
    ("[]", "must hold keys and values"),
    ("format_version: 2", "has format_version 2"),
    ("trials: many\nformat_version: 1", "trials: must be a number"),
    (BOMB, "aliases written out"),
    ("task: other\nformat_version: 1", "task: other -> digits"),
    ("task: digits\nout: run\nseed: 1\nformat_version: 1", "seed: 1 -> 0"),
]


@pytest.mark.parametrize(("text", "words"), RESUMED, ids=[repr(row[0][:30]) for row in RESUMED])
def test_resumed_run_folders(refused: Refused, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run").mkdir()
    write(tmp_path / "run/config.yaml", text)
    assert words in refused("search", "digits", "--out", "run", "--resume")
    assert "holds a run already" in refused("search", "digits", "--out", "run")


EXPORTS = [
    ("", "does not read as JSON"),
    ("hello", "does not read as JSON"),
    (b"\xff", "is no"),
    ("[]", "states no format_version"),
    ("{}", "states no format_version"),
    ('{"format_version": "1"}', "must be a whole number"),
    ('{"format_version": 99}', "a newer one wrote it"),
    ('{"format_version": 1}', "Field required"),
    ('{"format_version": 1, "identity": {}, "sha256": "", "records": {}}', "records"),
    ('{"format_version": 1, "identity": {}, "sha256": "", "records": []}', "do not match its checksum"),
    ('{"format_version": 1, "identity": {}, "sha256": "", "records": [{"key": 3}]}', "records"),
    ("[" * 100_000 + "]" * 100_000, "nested too deep"),
    ('{"format_version": ' + "1" * 6000 + "}", "does not read as JSON"),
]


@pytest.mark.parametrize(("text", "words"), EXPORTS, ids=[repr(row[0][:40]) for row in EXPORTS])
def test_exported_kernels(refused: Refused, tmp_path: Path, text: str | bytes, words: str) -> None:
    write(tmp_path / "kernels.json", text)
    message = refused("kernels", "merge", "kernels.json")
    assert "kernels.json" in message
    assert words in message
