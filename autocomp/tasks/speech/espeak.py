"""Synthetic voices: espeak-ng, from pip's espeakng-loader, called through ctypes in a process of its own.

The library keeps random numbers and the end of the last utterance from one call to the next. In a fresh process the same orders, one
after the other, give the same samples. They are kept in the cache, and mapped into memory: processes share them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from filelock import FileLock

from autocomp.cache import cache_dir, write_atomically
from autocomp.errors import AutocompError, UsageError, last_line
from autocomp.tasks.speech.audio import Samples, as_float, resampled, to_int16, trimmed
from autocomp.tasks.speech.words import as_heard

# espeak-ng's speak_lib.h: AUDIO_OUTPUT_SYNCHRONOUS, espeakRATE, espeakPITCH, espeakCHARS_UTF8, POS_CHARACTER
SYNCHRONOUS, RATE_OF_WORDS, PITCH, UTF8, BY_CHARACTER = 2, 1, 3, 1, 1
SEED = 7
ENGLISH = "gmw/en"  # how all its accents begin; voices of other languages are given words as they are heard


@dataclass(frozen=True)
class Order:
    """What is to be said, by whom (``gmw/en-US+f3``: accent and variant), at how many words a minute, and how high (0 to 99)."""

    voice: str
    text: str
    rate: int = 175
    pitch: int = 50


def require() -> None:
    """Refuse to go on without the packages of the extra ``speech``, or espeak-ng itself: UsageError, naming what is missing."""
    needed = {"espeakng_loader": "espeakng-loader (synthetic voices)", "jiwer": "jiwer (error rates)"}
    if missing := [what for module, what in needed.items() if find_spec(module) is None]:
        raise UsageError(
            f"the task 'speech' needs packages that are not installed, {', '.join(missing)}: pip install 'autocomp[speech]'"
        )
    import espeakng_loader

    for path in map(Path, (espeakng_loader.get_library_path(), espeakng_loader.get_data_path())):
        if not path.exists():
            raise UsageError(
                f"espeak-ng is not there, espeakng-loader should have brought {path}: pip install --force-reinstall espeakng-loader"
            )


def data_folder() -> Path:
    """Return where espeak-ng's voices lie."""
    require()
    import espeakng_loader

    return Path(espeakng_loader.get_data_path())


def synthesised(orders: Sequence[Order]) -> list[Samples]:
    """Return each order as 8 kHz mono without silence around it.

    Raises:
        UsageError: espeakng-loader is not installed (`require`).
        AutocompError: The process failed; the message has what it said last.
    """
    require()
    if not orders:
        return []
    asked = json.dumps([astuple(_spelt(order)) for order in orders]).encode()
    name = hashlib.sha256(version("espeakng-loader").encode() + asked).hexdigest()[:16]
    path = cache_dir() / "tasks" / "speech" / f"said-{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        found = _stored(path)
        if found is None:
            write_atomically(path, _said(asked))
            found = _stored(path)
    if found is None or len(found) != len(orders):
        raise AutocompError(f"what espeak-ng said does not read back: delete {path}")
    return found


def _spelt(order: Order) -> Order:
    return order if order.voice.startswith(ENGLISH) else replace(order, text=as_heard(order.text))


def _stored(path: Path) -> list[Samples] | None:
    """Return what is kept: the lengths, then all samples. None if the file is not there, or not whole."""
    try:
        with path.open("rb") as file:
            lengths = np.load(file)
            start = file.tell()
        samples = np.memmap(path, np.int16, "r", start, (int(lengths.sum()),))
    except (OSError, ValueError, EOFError):
        return None
    return np.split(samples, np.cumsum(lengths)[:-1])


def _said(asked: bytes) -> bytes:
    """Return what the process wrote that was given these orders."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "autocomp.tasks.speech.espeak"]
    done = subprocess.run(command, input=asked, capture_output=True, env=environment, check=False)
    if done.returncode:
        said = last_line(RuntimeError(done.stderr.decode(errors="replace")))
        raise AutocompError(f"espeak-ng failed with exit code {done.returncode}: {said}")
    return done.stdout


def _spoken(orders: Sequence[Order]) -> Iterator[Samples]:
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    parts: list[Samples] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def heard(samples: ctypes._Pointer[ctypes.c_short], count: int, _: int | None) -> int:
        if count > 0 and samples:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    rate = library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    library.espeak_SetSynthCallback(heard)
    library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
    for order in orders:
        parts.clear()
        if library.espeak_SetVoiceByName(order.voice.encode()):
            raise ValueError(f"espeak-ng has no voice {order.voice!r}")
        library.espeak_SetParameter(RATE_OF_WORDS, order.rate, 0)
        library.espeak_SetParameter(PITCH, order.pitch, 0)
        text = order.text.encode()
        library.espeak_Synth(text, len(text) + 1, 0, BY_CHARACTER, 0, UTF8, None, None)
        said = np.concatenate(parts) if parts else np.zeros(1, np.int16)
        yield to_int16(trimmed(resampled(as_float(said, order.voice), rate)))


if __name__ == "__main__":
    spoken = list(_spoken([Order(*order) for order in json.load(sys.stdin.buffer)]))
    np.save(sys.stdout.buffer, np.array([len(samples) for samples in spoken]))
    sys.stdout.buffer.write(np.concatenate(spoken).tobytes())
