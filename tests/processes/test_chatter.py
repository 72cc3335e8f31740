"""What others write to standard error goes into the run's log; our own lines still reach the user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from autocomp.processes import chatter
from autocomp.processes.chatter import SHOW, caught
from autocomp.progress import Progress


def _chatter(word: str) -> None:
    """As C++ code, a library's logger and a child process do."""
    os.write(2, f"{word} from C++\n".encode())
    print(f"{word} from Python", file=sys.stderr)
    subprocess.run([sys.executable, "-c", f"import os; os.write(2, b'{word} from a child\\n')"], check=True)


@pytest.fixture(autouse=True)
def shown_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHOW, raising=False)


def test_chatter_goes_into_the_log_and_our_lines_to_the_user(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    progress = Progress(Console(stderr=True))
    log = tmp_path / "log.txt"
    with caught(log, progress.console):
        _chatter("noise")
        with progress.stage("measuring"):
            progress.warn("this matters")
    progress.warn("so does this")
    os.write(2, b"loud again\n")
    said = capfd.readouterr().err
    assert "noise" not in said
    assert log.read_text().splitlines() == ["noise from C++", "noise from Python", "noise from a child"]
    assert [word in said for word in ("this matters", "measuring", "so does this", "loud again")] == [True] * 4


def test_what_was_redirected_before_stays_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook's standard error is no file descriptor."""
    progress = Progress(Console(stderr=True))
    with caught(tmp_path / "log.txt", progress.console):
        print("noise", file=sys.stderr)
        progress.warn("this matters")
    said = capsys.readouterr().err
    assert "this matters" in said
    assert "noise" not in said


def test_an_error_restores_everything(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    @caught(None)
    def fail() -> None:
        _chatter("noise")
        raise ValueError("ours")

    before = sys.stderr
    with pytest.raises(ValueError, match="ours"):
        fail()
    assert sys.stderr is before
    os.write(2, b"loud again\n")
    assert capfd.readouterr().err == "loud again\n"


def test_chatter_can_be_shown(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(chatter.SHOW, "1")
    with caught(tmp_path / "log.txt"):
        os.write(2, b"noise\n")
    assert capfd.readouterr().err == "noise\n"
