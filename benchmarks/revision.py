"""Which state of the sources a benchmark ran: a figure that is kept says what it is of."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent.parent


@cache
def revision(folder: Path = SOURCES) -> str:
    """The short hash of the commit, ``+`` behind it where files differ from it, ``unknown`` outside git.

    Read once in a process: what is committed while a benchmark runs is not what ran. Tables under ``reports`` are not
    looked at: one benchmark's table says nothing of the sources that the next one runs.
    """
    commit = _git(folder, "rev-parse", "--short", "HEAD")
    if commit is None:
        return "unknown"
    return commit + ("+" if _git(folder, "status", "--porcelain", "--", ".", ":(exclude)reports") else "")


def _git(folder: Path, *command: str) -> str | None:
    """What git says; None where it is not there, or refuses."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
