"""Boards behind a TVM RPC tracker: who is there, and sessions that end in time.

Every session is opened in a child process (`processes.shared`), so that a board which falls silent costs a time-out and nothing
else, and so that a session is closed whatever happens: the child's end closes it. The server ends a session by itself after the
lifetime that was asked for, which frees a board from a kernel that never returns.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocomp.errors import AutocompError, BoardError, UsageError, last_line, suggest
from autocomp.hardware.profile import Rpc

_ANSWER = 5.0  # seconds in which a tracker answers anything but a request for a board
_RESTART = 8.0  # seconds in which a server that a kernel has crashed comes back (a loop starts it again)
_POLL = 0.25
_BIG_CORES = 1  # TVM's affinity mode: the fastest cores first [tvm/runtime/threading_backend.h]


@dataclass(frozen=True)
class Limits:
    """Seconds after which something has gone wrong: with one kernel, with one module, with waiting for a free board."""

    trial: float = 20.0
    module: float = 120.0
    wait: float = 60.0


@dataclass(frozen=True)
class Board:
    """A server as its tracker lists it; ``address`` is host:port."""

    address: str
    key: str


@dataclass(frozen=True)
class Registered:
    """What a tracker knows: the boards, and of each key how many are free and how many requests wait."""

    boards: tuple[Board, ...]
    free: dict[str, int]
    waiting: dict[str, int]

    def of(self, key: str) -> tuple[Board, ...]:
        return tuple(board for board in self.boards if board.key == key)


def registered(tracker: str) -> Registered:
    """Ask a tracker (``host:port``) for its boards. UsageError where no tracker answers."""
    from tvm.rpc.base import TrackerCode

    try:
        with _connect(tracker, _ANSWER) as connection:
            summary = _ask(connection, [TrackerCode.SUMMARY])
    except OSError as error:
        raise UsageError(
            f"no TVM RPC tracker answers at {tracker} ({error}): start one with `python -m tvm.exec.rpc_tracker --host 0.0.0.0 "
            f"--port {tracker.rpartition(':')[2]}`; `autocomp device setup` prints the commands for tracker and board"
        ) from None
    boards = []
    for entry in summary["server_info"]:
        host, port = entry["addr"]
        boards.append(Board(f"{host}:{port}", str(entry["key"]).removeprefix("server:")))
    queues = summary["queue_info"]
    return Registered(
        tuple(sorted(boards, key=lambda board: (board.key, board.address))),
        {key: int(queue["free"]) for key, queue in queues.items()},
        {key: int(queue["pending"]) for key, queue in queues.items()},
    )


def boards_of(rpc: Rpc) -> tuple[Board, ...]:
    """The boards of a profile's key. UsageError if the tracker does not answer or lists none of that key."""
    known = registered(rpc.tracker)
    found = known.of(rpc.key)
    if not found:
        keys = Counter(board.key for board in known.boards)
        listed = ", ".join(f"{key} ({count})" for key, count in sorted(keys.items())) or "none"
        raise UsageError(
            f"no board of key {rpc.key!r} (rpc.key) is registered at the tracker {rpc.tracker}.{suggest(rpc.key, keys)} "
            f"Registered keys: {listed}; `autocomp device setup` prints the commands that register one"
        )
    return found


class Session:
    """One board lent to this process. Its modules and arrays are the board's; they end with it.

    ``lifetime`` seconds after it was opened the server ends it; parallel kernels use ``threads`` of its cores.
    """

    def __init__(self, rpc: Rpc, lifetime: float, wait: float, threads: int = 1) -> None:
        self.address, matchkey = _request(rpc, wait)
        self.ends = time.monotonic() + lifetime
        self._uploads = 0
        host, _, port = self.address.rpartition(":")
        try:
            import tvm.rpc

            self.remote = tvm.rpc.connect(host, int(port), matchkey, session_timeout=lifetime)
            self.device = self.remote.cpu(0)
            if threads > 1:
                self.remote.get_function("runtime.config_threadpool")(_BIG_CORES, threads)
        except Exception as error:
            raise BoardError(f"board {self.address} refuses a session: {last_line(error)}") from None

    def load(self, library: bytes) -> Any:
        """Upload a shared library and load it there."""
        self._uploads += 1
        name = f"module{self._uploads}.so"
        self.remote.upload(bytearray(library), name)
        return self.remote.load_module(name)

    def array(self, value: Any) -> Any:
        """A numpy array in the board's memory."""
        import tvm

        return tvm.runtime.tensor(value, self.device)

    def random_array(self, shape: Sequence[int], dtype: str) -> Any:
        """An array of random numbers that does not pass through the network. BoardError where the server cannot make one."""
        import tvm

        try:
            fill = self.remote.get_function("tvm.contrib.random.random_fill_for_measure")
        except Exception:
            raise BoardError(
                f"board {self.address} cannot fill an array: start its server with `--load-library .../libtvm_runtime_extra.so`, "
                "as `autocomp device setup` prints"
            ) from None
        array = tvm.runtime.empty(tuple(shape), dtype, self.device)
        fill(array)
        return array

    def read(self, path: str) -> str:
        """A small file of the board's (sysfs: of procfs the server sees no size); an empty text where there is none."""
        with suppress(Exception):
            data = bytes(self.remote.download(path))
            return data.rstrip(b"\0").decode(errors="replace").strip()
        return ""


def temporary_library(executable: Any, target: Any) -> bytes:
    """What TVM has compiled for a target, linked. AutocompError where there is no linker for it."""
    import tempfile

    from autocomp.hardware.link import linker_for
    from autocomp.processes.quiet import quiet_stderr

    with tempfile.TemporaryDirectory(prefix="autocomp-") as folder:
        path = Path(folder) / "module.so"
        with quiet_stderr():
            executable.export_library(str(path), fcompile=linker_for(target))
        return path.read_bytes()


def _request(rpc: Rpc, wait: float) -> tuple[str, str]:
    """Address and one-time key of a free board; waits ``wait`` seconds for one, less if none of the key is registered."""
    from tvm.rpc.base import TrackerCode

    gone = time.monotonic() + min(wait, _RESTART)
    while True:
        try:
            boards_of(rpc)
            break
        except UsageError as error:
            if time.monotonic() > gone:
                raise BoardError(str(error)) from None
        time.sleep(_POLL)
    try:
        with _connect(rpc.tracker, _ANSWER) as connection:
            connection.settimeout(wait)
            host, port, matchkey = _ask(connection, [TrackerCode.REQUEST, rpc.key, "", 1])
    except TimeoutError:
        raise BoardError(f"no board of key {rpc.key!r} became free at {rpc.tracker} in {wait:.0f} s") from None
    except OSError as error:
        raise BoardError(f"the tracker {rpc.tracker} does not answer: {error}") from None
    return f"{host}:{port}", matchkey


def _connect(tracker: str, patience: float) -> socket.socket:
    """A connection to a tracker after its greeting. OSError where none is there."""
    from tvm.rpc import base

    host, _, port = tracker.rpartition(":")
    connection = socket.create_connection((host, int(port)), patience)
    try:
        connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
        if struct.unpack("<i", base.recvall(connection, 4))[0] != base.RPC_TRACKER_MAGIC:
            raise OSError("what answers there is no tracker")
    except BaseException:
        connection.close()
        raise
    return connection


def _ask(connection: socket.socket, message: list[Any]) -> Any:
    from tvm.rpc import base

    base.sendjson(connection, message)
    code, value = base.recvjson(connection)
    if code != base.TrackerCode.SUCCESS:
        raise AutocompError(f"the tracker refuses {message}: {value}")
    return value
