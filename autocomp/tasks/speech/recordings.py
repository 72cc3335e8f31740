"""Recordings of single words and of noises that `fetch` put into the cache, by who or what is heard."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from autocomp.cache import cache_dir, sealed, unsealed, write_atomically
from autocomp.errors import CorruptError
from autocomp.tasks.speech.audio import Samples

HEADER = b"autocomp recordings 1 sha256 "
SET_UP = "python -m autocomp.tasks.speech.fetch"

Bank = dict[str, list[Samples]]  # what one speaker says of each word


def path() -> Path:
    return cache_dir() / "tasks" / "speech" / "recordings"


def write(clips: Mapping[str, Sequence[Samples]]) -> None:
    """Keep recordings by ``speaker/word``."""
    file = io.BytesIO()
    flat = {f"{key}/{n}": clip for key, some in clips.items() for n, clip in enumerate(some)}
    np.savez(file, **flat)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
    write_atomically(path(), sealed(HEADER, file.getvalue()))
    _read.cache_clear()


def banks() -> Mapping[str, Bank]:
    """Return what was recorded, by speaker and word; nothing where `fetch` has not run.

    CorruptError if the file does not read back as it was written.
    """
    return _read(path()) if path().exists() else {}


@cache
def _read(file: Path) -> Mapping[str, Bank]:
    content = unsealed(HEADER, file.read_bytes())
    if content is None:
        raise CorruptError(f"the recordings {file} are not what was written: make them again with `{SET_UP}`")
    found: dict[str, Bank] = {}
    with np.load(io.BytesIO(content)) as stored:
        for key in stored.files:
            speaker, word, _ = key.split("/")
            found.setdefault(speaker, {}).setdefault(word, []).append(stored[key])
    return found
