"""The kernel store: what tuning found, per target and compiler version, append-only and safe against a kill at any moment.

One folder per target fingerprint: ``target.json`` says what it is for, ``kernels.jsonl`` has one record a line, each with a
checksum. A line that does not check (a torn write) is skipped, counted, and tuned again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from autocomp.cache import cache_dir
from autocomp.errors import UsageError
from autocomp.hardware import Profile
from autocomp.records import FORMAT_VERSION


@dataclass(frozen=True)
class KernelRecord:
    """One tuned kernel: its anchor's loop extents, the tile chosen, its time in seconds, how many trials found it."""

    key: str
    operator: str
    tile: Mapping[str, Any]
    seconds: float
    flops: int
    trials: int
    spatial: tuple[int, ...] = ()
    reduction: tuple[int, ...] = ()


class KernelStore:
    """Records of one target, by kernel key. Several processes may append at once; the last record of a key counts."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.corrupt = 0
        self._records: dict[str, KernelRecord] = {}
        self._by_loops: dict[tuple[str, tuple[int, ...], tuple[int, ...]], KernelRecord] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock")
        self._path = folder / "kernels.jsonl"
        with self._lock:
            self._check_identity(identity)
            self._load()

    @classmethod
    def open(cls, profile: Profile, root: Path | None = None) -> KernelStore:
        """The user's store for a profile, in the cache folder (``AUTOCOMP_CACHE``) unless ``root`` is given."""
        identity = {
            "format_version": FORMAT_VERSION,
            "target": dict(profile.target),
            "fingerprint": profile.fingerprint,
            "tvm": version("apache-tvm"),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return cls((root or cache_dir() / "kernels") / digest, identity)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> KernelRecord | None:
        return self._records.get(key)

    def find(self, operator: str, spatial: tuple[int, ...], reduction: tuple[int, ...]) -> KernelRecord | None:
        """A record of the same operator over the same loop extents, whatever was fused behind it."""
        return self._by_loops.get((operator, spatial, reduction))

    def records(self) -> list[KernelRecord]:
        return list(self._records.values())

    def add(self, record: KernelRecord) -> None:
        """Append one record; it is on disk when this returns."""
        line = _encode(record)
        with self._lock, self._path.open("ab") as file:
            if file.tell() and not self._ends_with_newline():
                line = b"\n" + line  # a torn last line stays alone on its own
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._keep(record)

    def _keep(self, record: KernelRecord) -> None:
        self._records[record.key] = record
        self._by_loops.setdefault((record.operator, record.spatial, record.reduction), record)

    def _ends_with_newline(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        path = self.folder / "target.json"
        if not path.exists():
            path.write_text(json.dumps(identity, indent=2) + "\n")
            return
        try:
            stored = json.loads(path.read_text())
        except ValueError:
            self.corrupt += 1
            path.write_text(json.dumps(identity, indent=2) + "\n")
            return
        if stored != identity:
            raise UsageError(
                f"the kernel store {self.folder} was filled for another target or compiler ({stored}); "
                f"it does not serve {dict(identity)}. Choose another store folder"
            )

    def _load(self) -> None:
        if not self._path.exists():
            return
        for line in self._path.read_bytes().split(b"\n"):
            if not line.strip():
                continue
            record = _decode(line)
            if record is None:
                self.corrupt += 1
            else:
                self._keep(record)


def _encode(record: KernelRecord) -> bytes:
    body = json.dumps(asdict(record), sort_keys=True)
    return f"{hashlib.sha256(body.encode()).hexdigest()[:12]} {body}\n".encode()


def _decode(line: bytes) -> KernelRecord | None:
    checksum, _, body = line.partition(b" ")
    if hashlib.sha256(body).hexdigest()[:12].encode() != checksum:
        return None
    fields = json.loads(body)
    for name in ("spatial", "reduction"):
        fields[name] = tuple(fields[name])
    return KernelRecord(**fields)
