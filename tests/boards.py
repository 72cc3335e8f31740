"""Boards for tests: a real tracker, and real RPC servers as processes of their own, on this machine or emulated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from autocomp.devices.boards import registered
from autocomp.hardware.profile import Profile, load_profile

START = 60.0  # seconds a server may take to register: importing TVM takes several on a busy machine


class Servers:
    """RPC servers of one tracker; ``processes`` by the port each listens on."""

    def __init__(self, tracker: str, logs: Path) -> None:
        self.tracker, self.logs = tracker, logs
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(
        self, key: str, port: int, python: Sequence[str] = (sys.executable,), library: Path | None = None
    ) -> None:
        """Start a server of the runtime alone, as a board runs it, and do not wait for it."""
        command = [
            *python,
            "-m",
            "tvm.exec.rpc_server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--port-end",
            str(port + 1),
        ]
        command += ["--tracker", self.tracker, "--key", key, "--load-library", str(library or extra_library())]
        with (self.logs / f"server{port}.log").open("wb") as log:
            environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1"}
            self.processes[port] = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self.logs
            )

    def wait(self, key: str, count: int) -> None:
        end = time.monotonic() + START
        while len(registered(self.tracker).of(key)) < count:
            for port, process in self.processes.items():
                assert process.poll() is None, (self.logs / f"server{port}.log").read_text()
            assert time.monotonic() < end, "\n".join(log.read_text() for log in self.logs.glob("*.log"))
            time.sleep(0.05)

    def kill(self, port: int) -> None:
        process = self.processes.pop(port)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def extra_library() -> Path:
    """TVM's library of functions that a server lends beside the runtime's own."""
    import tvm

    return Path(tvm.__file__).parent / "lib" / "libtvm_runtime_extra.so"


@contextmanager
def tracked(logs: Path, port: int) -> Iterator[Servers]:
    """A tracker near ``port``, and what starts servers there; all of them end with the block."""
    from tvm.rpc.tracker import Tracker

    tracker = Tracker("127.0.0.1", port=port, port_end=port + 50, silent=True)
    servers = Servers(f"127.0.0.1:{tracker.port}", logs)
    try:
        yield servers
    finally:
        for listening in list(servers.processes):
            servers.kill(listening)
        tracker.terminate()


def this_machine(folder: Path, tracker: str, key: str) -> Profile:
    """A profile file of this machine's processor, reached as a board."""
    local = load_profile("x86-host")
    text = {
        "format_version": 1,
        "name": key,
        "reach": "rpc",
        "rpc": {"tracker": tracker, "key": key},
        "target": {name: value for name, value in local.target.items() if name != "num-cores"},
        "lanes": local.lanes,
        "vector_registers": local.vector_registers,
        "precisions": list(local.precisions),
        "int8": local.int8,
    }
    path = folder / f"{key}.yaml"
    path.write_text(yaml.safe_dump(text))
    return load_profile(path)
