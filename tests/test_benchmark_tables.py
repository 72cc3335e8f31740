"""Every table of a benchmark says at which commit, when and on which processor it was made, and which of its figures are older."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import common
import pytest
from revision import SOURCES, revision

from autocomp.hardware.profile import load_profile


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *command], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    git(tmp_path, "init", "--quiet")
    (tmp_path / "source.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    revision.cache_clear()
    return tmp_path


def test_a_clean_tree_is_its_commit(repository: Path) -> None:
    assert revision(repository) == git(repository, "rev-parse", "--short", "HEAD")


@pytest.mark.parametrize("name", ["source.py", "new.py"])
def test_a_changed_tree_has_a_plus(repository: Path, name: str) -> None:
    (repository / name).write_text("2\n")
    assert revision(repository) == git(repository, "rev-parse", "--short", "HEAD") + "+"


def test_a_new_table_does_not_count_as_a_change(repository: Path) -> None:
    (repository / "reports").mkdir()
    (repository / "reports" / "kernels.md").write_text("a table\n")
    assert not revision(repository).endswith("+")


def test_outside_git_it_is_unknown(tmp_path: Path) -> None:
    revision.cache_clear()
    assert revision(tmp_path) == "unknown"


def test_without_git_it_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    revision.cache_clear()
    assert revision(SOURCES) == "unknown"
    revision.cache_clear()


def published(folder: Path, commit: str, tasks: dict, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, str]:
    monkeypatch.setattr(common, "REPORTS", folder)
    monkeypatch.setattr(common, "revision", lambda: commit)
    rows = [[name] for name in tasks]
    common.publish("fidelity", ["task"], rows, {"tasks": tasks}, load_profile("x86-host"), parts="tasks")
    return json.loads((folder / "fidelity.json").read_text()), (folder / "fidelity.md").read_text()


def test_a_table_says_where_when_and_at_which_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, page = published(tmp_path, "abc1234+", {"digits": {"kl": 0.5}}, monkeypatch)
    info = data["machine"]
    assert info["commit"] == "abc1234+"
    assert f"on {info['device']}, {info['when']}, commit abc1234+.\n" in page
    assert "kept" not in data


def test_figures_of_an_earlier_commit_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits, tokens = {"joint": {"kl": 0.5}, "alone": {"kl": 0.7}}, {"joint": {"kl": 0.25}}
    published(tmp_path, "aaa", {"digits": digits, "tokens": tokens}, monkeypatch)
    data, page = published(tmp_path, "bbb", {"digits": {**digits, "alone": {"kl": 0.6}}, "tokens": tokens}, monkeypatch)
    assert {what: at["commit"] for what, at in data["kept"].items()} == {"digits: joint": "aaa", "tokens": "aaa"}
    assert "Not measured again: tokens (" in page
    data, _ = published(
        tmp_path, "ccc", {"digits": data["tasks"]["digits"], "tokens": {"joint": {"kl": 1}}}, monkeypatch
    )
    assert {what: at["commit"] for what, at in data["kept"].items()} == {"digits": "bbb", "digits: joint": "aaa"}


def test_a_table_of_before_this_says_nothing_of_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"machine": {"when": "2026-11-21", "device": "a processor"}, "tasks": {"digits": {"kl": 0.5}}}
    (tmp_path / "fidelity.json").write_text(json.dumps(old))
    data, _ = published(tmp_path, "bbb", {"digits": {"kl": 0.5}, "tokens": {"kl": 1.0}}, monkeypatch)
    assert data["kept"] == {"digits": {"when": "2026-11-21", "commit": "unknown", "device": "a processor"}}
