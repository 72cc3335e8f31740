"""The database that holds studies: opened, checked before any work, and claimed by one process at a time."""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from filelock import Timeout

from autocomp.cache import unwritable_reason
from autocomp.config.addresses import JOURNAL, masked
from autocomp.errors import UsageError, cut, shown

if TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage

# Chosen by hand, not measured: longer than a process that works leaves out its sign (one told trial or measurement), shorter than a night.
SILENT = 1800.0  # seconds without a sign of life after which a process on another machine counts as gone
_SIGN = 60.0  # seconds between two signs
# Seconds after which a claim stands, and must be what is read (Fischer's mutual exclusion): longer than another takes from finding a study
# free to writing its own claim. A database of many users takes longer than a file. Chosen by hand, not measured.
SETTLES_IN_A_FILE, SETTLES = 0.05, 1.0
_OWNER = "owner"
T = TypeVar("T")
PATIENCE = 30.0  # seconds that a database's server may be away while a search runs, as when it is started again
TRIES = 2  # of what a lost connection cut off, beside the last
# At most three connections of one search, each looked at before it is used: PostgreSQL has 100 for all, unless told otherwise.
CONNECTIONS = {"pool_size": 1, "max_overflow": 2, "pool_pre_ping": True}


def open_storage(url: str) -> BaseStorage:
    """The storage at an address: a journal (``journal:///path``), or a database."""
    if url.startswith(JOURNAL):
        from optuna.exceptions import StorageInternalError
        from optuna.storages import JournalStorage

        from autocomp.study.journal import StudyFile

        path = Path(url.removeprefix(JOURNAL))
        try:
            return JournalStorage(StudyFile(path))
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            AssertionError,
        ) as error:  # lines, but not of a study
            raise StorageInternalError(
                f"{path.name} holds something else than a study ({type(error).__name__})"
            ) from None
    return _database(url)


def close_storage(storage: BaseStorage) -> None:
    """Let go of a storage; SQLite then folds its write-ahead log into the one file."""
    from optuna.storages import JournalStorage, RDBStorage

    from autocomp.study.journal import StudyFile

    storage.remove_session()
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()
    elif isinstance(storage, JournalStorage) and isinstance(storage._backend, StudyFile):
        storage._backend.settle()


def _database(url: str) -> RDBStorage:
    """An RDB storage; SQLite writes ahead, so that a commit waits for no disk and a kill loses none, a server may be started again meanwhile."""
    from optuna.storages import RDBStorage
    from sqlalchemy import event

    local = url.startswith("sqlite")
    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}} if local else dict(CONNECTIONS))
    if not local:
        event.listen(storage.engine, "do_connect", _patiently)
        return storage

    @event.listens_for(storage.engine, "connect")
    def write_ahead(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        # with WAL: safe against kills; a power cut may cost seconds
        connection.execute("PRAGMA synchronous=NORMAL")

    storage.engine.dispose()  # the connections made so far know nothing of it
    return storage


def _patiently(dialect: Any, _record: object, arguments: Any, parameters: Any) -> Any:
    """Connect to a database; where its server is away, try again for `PATIENCE` seconds."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return dialect.connect(*arguments, **parameters)
        except Exception:  # of whichever driver
            if time.monotonic() > end:
                raise
            time.sleep(1.0)


def whatever_is_lost(work: Callable[[], T]) -> T:
    """Do something that may be done twice; once more where a connection was lost in its midst. The new one is waited for (`PATIENCE`)."""
    from sqlalchemy.exc import DBAPIError

    for _ in range(TRIES):
        try:
            return work()
        except Exception as error:
            lost = (
                error if isinstance(error, DBAPIError) else error.__cause__
            )  # Optuna passes it on in an error of its own
            if not isinstance(lost, DBAPIError) or not lost.connection_invalidated:
                raise
    return work()


def check_storage(url: str) -> None:
    """Open a storage and leave it again. UsageError if it cannot be opened."""
    try:
        with _opened(url, "be opened") as storage:
            storage.get_all_studies()
    except (ValueError, TypeError, AttributeError) as error:  # what is no address at all
        raise UsageError(
            f"storage: {cut(masked(url))} is no address of a database ({shown(error)}), such as sqlite:///runs.db or journal:///runs.journal"
        ) from error


class Recorded(NamedTuple):
    """What a study has recorded of itself, and how many of its trials are finished."""

    attrs: dict[str, Any]
    finished: int


def read_study(url: str, name: str) -> Recorded | None:
    """What is recorded of a study, None where there is no such study. UsageError if the storage cannot be read, or the study is at work."""
    with _opened(url, "be read") as storage:
        if url.startswith("sqlite"):
            _check_file(storage)
        studies = {study.study_name: study for study in storage.get_all_studies()}
        if name not in studies:
            return None
        study_id = studies[name]._study_id
        attrs = dict(storage.get_study_user_attrs(study_id))
        finished = sum(trial.state.is_finished() for trial in storage.get_all_trials(study_id, deepcopy=False))
    _refuse_living(attrs.get(_OWNER), url)
    return Recorded(attrs, finished)


@contextmanager
def _opened(url: str, what: str) -> Iterator[BaseStorage]:
    """A storage for a look at it."""
    with storage_errors(url, what):
        storage = open_storage(url)
        try:
            yield storage
        finally:
            close_storage(storage)


def _check_file(storage: BaseStorage) -> None:
    """Every page of a SQLite file: one damaged in the middle would be found when it is too late."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import DatabaseError

    assert isinstance(storage, RDBStorage)
    with storage.engine.connect() as connection:
        found = connection.exec_driver_sql("PRAGMA quick_check").scalar()
    if found != "ok":
        raise DatabaseError(None, None, Exception(str(found)))


class Claim:
    """One process's hold on a study: others are refused while it lives. UsageError if another one holds it."""

    def __init__(self, storage: BaseStorage, study_id: int, url: str) -> None:
        self._storage, self._study_id = storage, study_id
        self._token = uuid.uuid4().hex
        _refuse_living(storage.get_study_user_attrs(study_id).get(_OWNER), url)
        self._url = url
        self._say()
        time.sleep(SETTLES_IN_A_FILE if url.startswith(JOURNAL) else SETTLES)
        self._refuse_other()  # of two that came at once, the one that wrote last stays

    def sign(self) -> None:
        """Say now and then that this process lives. UsageError if another one took the study."""
        if time.monotonic() - self._said > _SIGN:
            self._refuse_other()
            self._say()

    def _refuse_other(self) -> None:
        owner = self._storage.get_study_user_attrs(self._study_id).get(_OWNER)
        if owner and owner["token"] != self._token:
            _refuse_living(owner, self._url)

    def release(self) -> None:
        """Let others have the study, unless another one has it by now."""
        owner = self._storage.get_study_user_attrs(self._study_id).get(_OWNER)
        if owner and owner["token"] == self._token:
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


@contextmanager
def storage_errors(url: str, what: str) -> Iterator[None]:
    """Turn what SQL and Optuna raise into one message."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError, ImportError, OSError, Timeout) as error:
        if isinstance(error, OSError) and error.filename and not url.endswith(Path(str(error.filename)).name):
            raise  # of another file
        reason = unwritable_reason(error) if isinstance(error, OSError) else None
        if isinstance(error, FileNotFoundError) and what == "be written":
            reason = "it is not there any more, moved or removed while the search ran"
        reason = reason or str(
            getattr(error, "orig", None) or getattr(error, "strerror", None) or error.__cause__ or error
        )
        reason = (reason.splitlines() or [type(error).__name__])[0]
        what_to_check = "the path and the free space" if url.startswith(("sqlite", JOURNAL)) else "that its server runs"
        raise UsageError(
            f"the study's storage {masked(url)} cannot {what}: {cut(reason, 500)}; what was told before is kept. "
            f"Check {what_to_check}, or name another with --storage"
        ) from error
