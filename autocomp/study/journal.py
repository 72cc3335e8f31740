"""A study's file: Optuna's journal, one line for each thing that happened, made to outlive kills.

A process that is killed while it writes leaves half a line behind, on which Optuna's own backend would stumble for ever once another line
follows. Here the next writer takes it away first. The lock is one that the system frees when a process ends, however it ends. What a kill
cannot lose, a power cut may: the last seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages.journal import JournalFileBackend


class StudyFile(JournalFileBackend):
    """Optuna's journal backend on a file. OSError where the file cannot be written, StorageInternalError where it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writers = FileLock(path.with_name(f".{path.name}.lock"), timeout=60)  # the base's own is not taken
        super().__init__(str(path))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._writers, self._path.open("r+b") as file:
            _drop_half_a_line(file.fileno())
            end = file.seek(0, os.SEEK_END)
            try:
                file.write(lines)
                file.flush()  # to the system, which outlives this process; waiting for the disk would take most of a trial's time
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise

    def settle(self) -> None:
        """Wait until all of it is on the disk."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        try:
            yield from super().read_logs(log_number_from)
        except (ValueError, UnicodeDecodeError) as error:
            raise StorageInternalError(f"a line of {self._path.name} is damaged ({error})") from None


def _drop_half_a_line(descriptor: int) -> None:
    """Cut off what stands behind the last line's end."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    if end == 0 or os.pread(descriptor, 1, end - 1) == b"\n":
        return
    block, at = 1 << 16, end
    while at > 0:
        start = max(0, at - block)
        found = os.pread(descriptor, at - start, start).rfind(b"\n")
        if found >= 0:
            os.ftruncate(descriptor, start + found + 1)
            return
        at = start
    os.ftruncate(descriptor, 0)
