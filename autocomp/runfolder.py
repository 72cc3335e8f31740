"""The run folder: whether it can be written, whether it holds a run already, and the settings of that run."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from autocomp.cache import write_atomically
from autocomp.config import Settings, differences, dump_settings, read_settings
from autocomp.errors import UsageError

CONFIG = "config.yaml"
# Room asked for before any work starts: a small run's layers and models need about as much.
_PROBE_BYTES = 1 << 20
_HOPELESS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "it is not yours to write",
    errno.EPERM: "it is not yours to write",
    errno.ENOTDIR: "a part of its path is a file",
    errno.EEXIST: "it is a file",
}


def check_run_folder(settings: Settings, resume: bool) -> Path:
    """Check, before any work, that a run may start (or resume) in ``settings.out``; return the folder.

    UsageError if it cannot be written or is full, holds a run and ``resume`` is not set, holds none and it is, or the
    run in it had other settings (each that differs is named).
    """
    folder = Path(settings.out)
    probe(folder)
    config = folder / CONFIG
    if not config.exists():
        if resume:
            raise UsageError(f"there is no run to resume in {folder} (no {CONFIG}): check --out, or leave out --resume")
        return folder
    if not resume:
        raise UsageError(f"{folder} holds a run already: continue it with --resume, or choose another --out")
    if changed := differences(read_settings(config), settings):
        raise UsageError(
            f"the run in {folder} had other settings, so it cannot be resumed with these:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nresume it with the same settings (only trials, measure, minutes may differ), or choose another --out"
        )
    return folder


def open_run_folder(settings: Settings, resume: bool) -> Path:
    """Check the run folder, create it, and write the resolved settings into it; UsageError as `check_run_folder`."""
    folder = check_run_folder(settings, resume)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, dump_settings(settings).encode())
    return folder


def probe(folder: Path) -> None:
    """Write a file into a folder and take it away again, with the folders made for it; UsageError if that fails."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    file = folder / f".probe.{os.getpid()}"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                stream.write(bytes(_PROBE_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            if folder.is_dir():
                file.unlink(missing_ok=True)
    except OSError as error:
        reason = unwritable_reason(error) or error.strerror or str(error)
        raise UsageError(f"the output folder {folder} cannot be written: {reason}; choose another --out") from error
    finally:
        for path in absent:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def unwritable_reason(error: OSError) -> str | None:
    """Say in words why nothing can be written, None if the error is of another kind."""
    return _HOPELESS.get(error.errno or 0)
