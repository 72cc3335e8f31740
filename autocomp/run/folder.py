"""The run folder: whether it can be written, whether it holds a run already, the settings of that run, and its name in a database."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from autocomp.cache import sweep, unwritable_reason, write_atomically
from autocomp.config.addresses import JOURNAL, masked
from autocomp.config.files import validated
from autocomp.config.settings import Settings, differences, dump_settings, read_settings
from autocomp.errors import AutocompError, UsageError, cut
from autocomp.records.table import read_evaluations
from autocomp.study.storage import Recorded, read_study

CONFIG = "config.yaml"
LOCK = ".lock"  # held by whatever writes to a run folder
PROVENANCE = "provenance.json"
STUDY = "study.journal"  # where no other storage is asked for
OLD_STUDY = "study.db"  # where version 0.1 kept it
PLACE = "folder"  # the attribute of a study in a database of the user's: the run folder that it is of
WRITTEN = "results written"  # the attribute that says how often they were: an older copy of a study has a lower number
LOST = "lost weights"  # the attribute with files of weights that were learnt, and were not there when the run went on
_NAME = "run.json"
_RESULTS = ("front.json", "report.html", "evaluations.csv")
# Room asked for before any work starts: a small run's layers and models need about as much.
_PROBE_BYTES = 1 << 20


def check_run_folder(settings: Settings, resume: bool, folder: Path | None = None) -> Path:
    """Check, before any work, that a run may start (or resume) in ``folder``, by default ``settings.out``; return the folder.

    UsageError if it cannot be written or is full, holds a run and ``resume`` is not set, holds none and it is, or the
    run in it had other settings (each that differs is named).
    """
    folder = folder or Path(settings.out)
    probe(folder)
    config = folder / CONFIG
    if not config.exists():
        if resume:
            raise no_run(folder)
        if parts := [name for name in (STUDY, OLD_STUDY, *_RESULTS) if (folder / name).exists()]:
            raise UsageError(
                f"{folder} holds parts of a run ({', '.join(parts)}) without its {CONFIG}; nothing was touched: choose another --out, or move "
                "them away"
            )
        return folder
    if not resume:
        raise UsageError(f"{folder} holds a run already: continue it with --resume, or choose another --out")
    if changed := differences(read_settings(config), settings):
        raise UsageError(
            f"the run in {folder} had other settings, so it cannot be resumed with these:\n"
            + "\n".join(f"  {masked(line)}" for line in changed)
            + "\nresume it with the same settings (only trials, measurements, minutes may differ), or choose another --out"
        )
    return folder


def as_begun(settings: Settings, folder: Path) -> Settings:
    """Settings of a run that goes on: what they leave to autocomp is as the run in the folder was begun. UsageError as `read_settings`."""
    if settings.auto is not True or not (folder / CONFIG).exists():
        return settings
    begun = read_settings(folder / CONFIG)
    kept: dict[str, Any] = {name: getattr(begun, name) for name in settings.left}
    if isinstance(begun.auto, dict):  # of what is left to it, not of what is stated now
        kept["auto"] = {name: why for name, why in begun.auto.items() if name in settings.left}
    else:
        kept["auto"] = begun.auto
    validated(Settings, {**settings.model_dump(), **kept}, "")  # what is stated now must go with it
    return settings.model_copy(update=kept)


def no_run(folder: Path) -> UsageError:
    """What is said of a folder that holds no run to go on with."""
    return UsageError(
        f"there is no run to resume in {cut(str(folder))} (no {CONFIG}): check --out, or leave out --resume"
    )


def open_run_folder(settings: Settings, resume: bool, folder: Path | None = None) -> dict[str, Any] | None:
    """Check the run folder, create it, and write the resolved settings into it; UsageError as `check_run_folder`.

    Returns what the study of a run that is resumed has recorded of it, None for a new run. UsageError also if that study is lost, damaged,
    or being searched in by another process.
    """
    folder = check_run_folder(settings, resume, folder)
    known = _recorded(settings, folder) if resume else None
    if resume and isinstance(settings.auto, dict):
        begun = read_settings(folder / CONFIG)
        reasons = {name: why for name, why in settings.auto.items() if getattr(settings, name) == getattr(begun, name)}
        settings = settings.model_copy(update={"auto": reasons})  # why a value was chosen says nothing of another one
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / "layers", *folder.glob("models/*")):
        sweep(place)
    secret = settings.storage is not None and masked(settings.storage) != settings.storage
    write_atomically(folder / CONFIG, dump_settings(settings).encode(), private=secret)
    if not resume:
        name = {"format_version": 1, "study": f"{cut(folder.absolute().name, 40)}-{uuid.uuid4().hex[:12]}"}
        write_atomically(folder / _NAME, (json.dumps(name) + "\n").encode())
    return known


def abandon_run_folder(folder: Path) -> None:
    """Take away what makes a folder hold a run: a start that failed must not stand in the way of the next one."""
    for name in (CONFIG, _NAME, STUDY, f".{STUDY}.lock"):
        (folder / name).unlink(missing_ok=True)


def study_of(settings: Settings, folder: Path) -> tuple[str, str]:
    """The address of the database with a run's study, and the study's name in it: the run's own, wherever its folder is moved."""
    if settings.storage is None:
        old = (folder / OLD_STUDY).exists() and not (folder / STUDY).exists()
        return f"sqlite:///{folder / OLD_STUDY}" if old else f"{JOURNAL}{folder / STUDY}", "autocomp"
    try:
        return settings.storage, str(json.loads((folder / _NAME).read_text())["study"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{folder / _NAME}, which names this run's study in the database, is missing or damaged: put it back, or choose another --out"
        ) from None


def _recorded(settings: Settings, folder: Path) -> dict[str, Any]:
    """What the study of a run has recorded. One that is lost, though there are results, is not begun anew over them."""
    url, name = study_of(settings, folder)
    results = [result for result in _RESULTS if (folder / result).exists()]
    file = folder / (OLD_STUDY if url.startswith("sqlite") else STUDY)
    lost = settings.storage is None and not (file.exists() and file.stat().st_size)
    found = None if lost else read_study(url, name)
    if found is None and results:
        where = (
            f"{file} is {'empty' if file.exists() else 'missing'}" if lost else f"the database has no study {name!r}"
        )
        raise UsageError(
            f"the run in {folder} has results ({', '.join(results)}), but {where}, so it cannot be resumed. Nothing was touched: put the study "
            "back, or choose another --out for a new run"
        )
    if found is not None:
        if settings.storage is not None:
            _refuse_copy(found, folder)
        _refuse_older(found, folder)
    return found.attrs if found else {}


def _refuse_copy(found: Recorded, folder: Path) -> None:
    """UsageError if the study is of another folder that is there still: weights and files of two folders would go into one front."""
    other = Path(str(found.attrs.get(PLACE, folder)))
    try:
        same = other.samefile(folder)
        its = (other / _NAME).read_bytes() == (folder / _NAME).read_bytes()
    except OSError:  # it was moved here
        return
    if its and not same:
        raise UsageError(
            f"{folder} is a copy: its study in the database is that of {cut(str(other))}, which is still there. Go on in that folder, or "
            "begin a new run with another --out"
        )


def _refuse_older(found: Recorded, folder: Path) -> None:
    """UsageError if the results know of more than the study holds: it was cut, or is a copy of an earlier time."""
    try:
        told = len(read_evaluations(folder))
    except AutocompError:  # there are none, or they are damaged: they are written anew
        told = 0
    earlier = study_bytes(folder) < _then(folder, "study_bytes") or found.attrs.get(WRITTEN, 0) < _then(
        folder, "results_written"
    )
    if told > found.finished or earlier:
        raise UsageError(
            f"the study of the run in {folder} holds less than its results say: it was cut, or is a copy of an earlier time. Nothing was "
            "touched: put the whole study back, or choose another --out for a new run"
        )


def study_bytes(folder: Path) -> int:
    """The size of a run's journal, which only grows; 0 where it has none."""
    file = folder / STUDY
    return file.stat().st_size if file.exists() else 0


def _then(folder: Path, what: str) -> int:
    """A number that the results have of the study when they were written; 0 where they do not say."""
    try:
        return int(json.loads((folder / PROVENANCE).read_text())[what])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def probe(
    folder: Path, what: str = "output folder", remedy: str = "choose another --out", size: int = _PROBE_BYTES
) -> None:
    """Write a file into a folder and take it away again, with the folders made for it; UsageError if that fails.

    ``what`` names the folder, ``remedy`` says what to do; ``size`` bytes must have room.
    """
    absent: list[Path] = []
    file = folder / f".probe.{os.getpid()}"
    try:
        try:
            absent += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                stream.write(bytes(size))
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            if folder.is_dir():
                file.unlink(missing_ok=True)
    except OSError as error:
        reason = unwritable_reason(error) or error.strerror or str(error)
        raise UsageError(f"the {what} {cut(str(folder))} cannot be written: {reason}; {remedy}") from error
    finally:
        for path in absent:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
