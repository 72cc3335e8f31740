"""A study in a real PostgreSQL, whose server is started again in mid-search, and taken away for good; only with -m postgres."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import tiny_task

import autocomp
from autocomp.errors import UsageError
from autocomp.study import storage as storage_module
from autocomp.study.storage import CONNECTIONS, open_storage

pytestmark = [pytest.mark.postgres, pytest.mark.usefixtures("short_tuning", "without_exports")]
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
PASSWORD = "not-to-be-seen"


class Server:
    """A PostgreSQL of its own in a folder; as root it is run by the user that Debian's package made."""

    def __init__(self, folder: Path) -> None:
        assert PROGRAMS, "PostgreSQL is not installed: apt install postgresql"
        self.folder = folder
        self._as = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "pw").write_text(PASSWORD)
        if self._as:
            subprocess.run(["chown", "-R", "postgres", folder], check=True)
            for parent in folder.parents[:3]:  # pytest's folders are root's alone
                parent.chmod(parent.stat().st_mode | 0o055)
        self._run("initdb", "-D", "data", "-A", "scram-sha-256", "-U", "autocomp", "--pwfile=pw")
        self.start()
        with psycopg.connect(self.address("postgres", ""), autocommit=True) as connection:
            connection.execute("create database studies")

    def address(self, database: str = "studies", driver: str = "+psycopg") -> str:
        return f"postgresql{driver}://autocomp:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        self._run("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", f"-p {self.port} -k . -h 127.0.0.1", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", "data", "-m", "fast", "-w", "stop")

    def ask(self, query: str) -> list[tuple[int, ...]]:
        with psycopg.connect(self.address(driver="")) as connection:
            return connection.execute(query).fetchall()  # type: ignore[call-overload, no-any-return]

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [*self._as, PROGRAMS[-1] / program, *arguments], cwd=self.folder, check=True, stdout=subprocess.DEVNULL
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("postgres"))
    yield found
    found.stop()


def search(
    server: Server, out: Path, spaces: dict[str, str], trials: int, resume: bool = False
) -> autocomp.SearchResult:
    return autocomp.search(
        task=tiny_task.task(), out=out, space=spaces["full"], trials=trials, measurements=2, references=False,
        storage=server.address(), resume=resume,
    )  # fmt: skip


def restarted_at(server: Server, told: int) -> threading.Thread:
    """A thread that starts the server again once so many trials of the newest study are complete."""

    def wait() -> None:
        newest = (
            "select count(*) from trials where state = 'COMPLETE' and study_id = (select max(study_id) from studies)"
        )
        while not server.ask(newest)[0][0] >= told:
            time.sleep(0.1)
        server.stop()
        time.sleep(2.0)
        server.start()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_server_that_is_started_again_costs_no_trial(server: Server, tmp_path: Path, spaces: dict[str, str]) -> None:
    opened = open_storage(server.address())  # makes the tables that the thread asks
    opened.remove_session()
    before = server.ask("select count(*) from studies")[0][0]
    undisturbed = search(server, tmp_path / "a", spaces, 60)
    search(server, tmp_path / "b", spaces, 5)
    thread = restarted_at(server, 12)
    result = search(server, tmp_path / "b", spaces, 60, resume=True)
    thread.join()
    told = result.run.summary.told
    assert told == undisturbed.run.summary.told > 12
    counted = server.ask(
        f"select study_id, count(*), count(distinct number) from trials where state = 'COMPLETE' and study_id > {before} group by 1"
    )
    assert [each[1:] for each in counted] == [(told, told)] * 2
    shown = b"".join(
        path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file() and path.name != "config.yaml"
    )
    assert PASSWORD.encode() not in shown
    assert (tmp_path / "b/config.yaml").stat().st_mode & 0o077 == 0


def test_a_search_takes_few_connections(server: Server) -> None:
    storage = open_storage(server.address())
    try:
        storage.get_all_studies()
        there = server.ask("select count(*) from pg_stat_activity where datname = 'studies'")[0][0]
        assert there <= CONNECTIONS["pool_size"] + CONNECTIONS["max_overflow"] + 1  # and this question's own
    finally:
        storage.remove_session()
        storage.engine.dispose()  # type: ignore[attr-defined]


def test_a_server_that_stays_away_ends_the_search_and_it_goes_on(
    server: Server, tmp_path: Path, spaces: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "PATIENCE", 0.5)
    search(server, tmp_path / "run", spaces, 5)
    stopping = threading.Timer(3.0, server.stop)
    stopping.start()
    try:
        with pytest.raises(UsageError, match="Check that its server runs"):
            search(server, tmp_path / "run", spaces, 5000, resume=True)
    finally:
        stopping.join()
        server.start()
    told = server.ask(
        "select count(*) from trials where state = 'COMPLETE' and study_id = (select max(study_id) from studies)"
    )[0][0]
    result = search(server, tmp_path / "run", spaces, told + 5, resume=True)
    assert result.run.summary.told >= told
