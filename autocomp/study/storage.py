"""The database that holds studies: opened, checked before any work, and claimed by one process at a time."""

from __future__ import annotations

import os
import platform
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.errors import UsageError, cut, shown

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

# Chosen by hand, not measured: longer than a process that works leaves out its sign (one told trial or measurement), shorter than a night.
SILENT = 1800.0  # seconds without a sign of life after which a process on another machine counts as gone
_SIGN = 60.0  # seconds between two signs
_OWNER = "owner"


def open_storage(url: str) -> RDBStorage:
    """An RDB storage; SQLite writes ahead, so that a commit waits for no disk and a kill loses none."""
    from optuna.storages import RDBStorage
    from sqlalchemy import event

    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None)
    if url.startswith("sqlite"):

        @event.listens_for(storage.engine, "connect")
        def write_ahead(connection: Any, _record: object) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            # with WAL: safe against kills; a power cut may cost seconds
            connection.execute("PRAGMA synchronous=NORMAL")

        storage.engine.dispose()  # the connections made so far know nothing of it
    return storage


def check_storage(url: str) -> None:
    """Open a storage and leave it again. UsageError if it cannot be opened."""
    try:
        with _opened(url, "be opened") as storage:
            storage.get_all_studies()
    except (ValueError, TypeError, AttributeError) as error:  # what is no address at all
        raise UsageError(
            f"storage: {cut(masked(url))} is no address of a database ({shown(error)}), such as sqlite:///runs.db"
        ) from error


def read_study(url: str, name: str) -> dict[str, Any] | None:
    """The records of a whole study, None where there is no such study. UsageError if the storage cannot be read, or the study is at work."""
    with _opened(url, "be read") as storage:
        if url.startswith("sqlite"):
            _check_file(storage)
        studies = {study.study_name: study for study in storage.get_all_studies()}
        if name not in studies:
            return None
        found = dict(storage.get_study_user_attrs(studies[name]._study_id))
    _refuse_living(found.get(_OWNER), url)
    return found


@contextmanager
def _opened(url: str, what: str) -> Iterator[RDBStorage]:
    """A storage for a look at it."""
    with storage_errors(url, what):
        storage = open_storage(url)
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()


def _check_file(storage: RDBStorage) -> None:
    """Every page of a SQLite file: one damaged in the middle would be found when it is too late."""
    from sqlalchemy.exc import DatabaseError

    with storage.engine.connect() as connection:
        found = connection.exec_driver_sql("PRAGMA quick_check").scalar()
    if found != "ok":
        raise DatabaseError(None, None, Exception(str(found)))


class Claim:
    """One process's hold on a study: others are refused while it lives. UsageError if another one holds it."""

    def __init__(self, storage: RDBStorage, study_id: int, url: str) -> None:
        self._storage, self._study_id = storage, study_id
        self._token = uuid.uuid4().hex
        _refuse_living(storage.get_study_user_attrs(study_id).get(_OWNER), url)
        self._say()
        owner = storage.get_study_user_attrs(study_id)[_OWNER]
        if owner["token"] != self._token:  # two came at once
            _refuse_living(owner, url)

    def sign(self) -> None:
        """Say now and then that this process lives."""
        if time.monotonic() - self._said > _SIGN:
            self._say()

    def release(self) -> None:
        """Let others have the study."""
        self._storage.set_study_user_attr(self._study_id, _OWNER, None)

    def _say(self) -> None:
        self._said = time.monotonic()
        owner = {"token": self._token, "host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._storage.set_study_user_attr(self._study_id, _OWNER, {**owner, "seen": time.time()})


def _refuse_living(owner: Any, url: str) -> None:
    if not owner or (owner["pid"] == os.getpid() and owner["host"] == _host()):
        return
    here = owner["host"] == _host()
    living = _started(owner["pid"]) == owner["started"] if here else time.time() - owner["seen"] < SILENT
    if living:
        raise UsageError(
            f"another process ({owner['pid']} on {owner['host'].partition(' ')[0]}) is searching in this study of {masked(url)}: wait for it, "
            f"or choose another --out. Where that machine died, its hold ends {SILENT / 60:.0f} minutes after its last sign of life"
        )


def _host() -> str:
    """This machine since it was started, and this container: where process numbers mean the same."""
    parts = [platform.node()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append("?")
    return " ".join(parts)


def _started(pid: int) -> str:
    """When a process of this machine was started, in the kernel's ticks; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def masked(url: str) -> str:
    """An address without the password in it."""
    return re.sub(r"(://[^/@:]*):[^@]*@", r"\1:***@", url)


@contextmanager
def storage_errors(url: str, what: str) -> Iterator[None]:
    """Turn what SQL and Optuna raise into one message."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError, ImportError) as error:
        reason = str(getattr(error, "orig", None) or error.__cause__ or error).splitlines()[0]
        raise UsageError(
            f"the study's storage {masked(url)} cannot {what}: {cut(reason, 500)}; what was told before is kept. "
            "Check the path and the free space, or name another: storage: in a config file, or AUTOCOMP_STORAGE"
        ) from error
