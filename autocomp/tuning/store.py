"""The kernel store: what tuning found, per target and compiler version, append-only and safe against a kill at any moment.

One folder per target fingerprint: ``target.json`` says what it is for, ``kernels.jsonl`` has one record a line, each with a
checksum. A line that does not check (a torn write) is skipped, counted, and tuned again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autocomp.cache import cache_dir, sweep, write_atomically
from autocomp.errors import UsageError
from autocomp.hardware.profile import Profile
from autocomp.records.evaluation import FORMAT_VERSION


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


@dataclass(frozen=True)
class StoreLines:
    """A store's file as it stands: every record in the order written, and the numbers of the lines that do not check."""

    records: tuple[KernelRecord, ...] = ()
    damaged: tuple[int, ...] = ()

    @property
    def latest(self) -> dict[str, KernelRecord]:
        """The records that count, by key."""
        return {record.key: record for record in self.records}

    @property
    def superseded(self) -> int:
        """Records that a later one of the same key replaced."""
        return len(self.records) - len(self.latest)


@dataclass(frozen=True)
class Merged:
    """What a merge did: records of new keys, faster records of known keys, and those left out as no faster."""

    new: int
    faster: int
    left_out: int


class KernelStore:
    """Records of one target, by kernel key. Several processes may append at once; the last record of a key counts."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self._records: dict[str, KernelRecord] = {}
        self._by_loops: dict[tuple[str, tuple[int, ...], tuple[int, ...]], KernelRecord] = {}
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        self._locks: dict[int, FileLock] = {}  # by process: a forked one may not use its parent's
        self._path = folder / "kernels.jsonl"
        with self._lock:
            damaged = self._check_identity(identity)
            self.corrupt = damaged + len(self._load().damaged)

    @classmethod
    def open(cls, profile: Profile, root: Path | None = None) -> KernelStore:
        """The user's store for a profile, in the cache folder (``AUTOCOMP_CACHE``) unless ``root`` is given."""
        identity = identity_of(profile)
        return cls((root or stores_folder()) / folder_name(identity), identity)

    @property
    def _lock(self) -> FileLock:
        return self._locks.setdefault(os.getpid(), FileLock(self.folder / "lock"))

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> KernelRecord | None:
        return self._records.get(key)

    def find(self, operator: str, spatial: tuple[int, ...], reduction: tuple[int, ...]) -> KernelRecord | None:
        """A record of the same operator over the same loop extents, whatever was fused behind it."""
        return self._by_loops.get((operator, spatial, reduction))

    def records(self) -> list[KernelRecord]:
        return list(self._records.values())

    def reload(self) -> None:
        """Take note of what other processes have added."""
        self._load()

    def add(self, record: KernelRecord) -> None:
        """Append one record; it is on disk when this returns."""
        with self._lock:
            self._append([record])

    def merge(self, records: Iterable[KernelRecord]) -> Merged:
        """Take records made elsewhere for the same identity, of each key the faster one; on disk when this returns."""
        with self._lock:
            self._load()  # another process may have appended since this one read
            taken: dict[str, KernelRecord] = {}
            left_out = 0
            for record in records:
                known = taken.get(record.key) or self._records.get(record.key)
                if known is not None and record.seconds >= known.seconds:
                    left_out += 1
                    continue
                taken[record.key] = record
            faster = sum(key in self._records for key in taken)
            self._append(list(taken.values()))
        return Merged(len(taken) - faster, faster, left_out)

    def compact(self) -> StoreLines:
        """Rewrite the file without damaged and superseded lines, whole or not at all; returns what it held before."""
        with self._lock:
            before = self._load()
            if before.damaged or before.superseded:
                write_atomically(self._path, b"".join(map(_encode, before.latest.values())))
            self.corrupt = 0
        return before

    def _append(self, records: list[KernelRecord]) -> None:
        data = b"".join(map(_encode, records))
        if not data:
            return
        with self._path.open("ab") as file:
            if file.tell() and not self._ends_with_newline():
                data = b"\n" + data  # a torn last line stays alone on its own
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        for record in records:
            self._keep(record)

    def _keep(self, record: KernelRecord) -> None:
        self._records[record.key] = record
        loops = (record.operator, record.spatial, record.reduction)
        if loops not in self._by_loops or self._by_loops[loops].key == record.key:
            self._by_loops[loops] = record

    def _ends_with_newline(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _check_identity(self, identity: Mapping[str, Any]) -> int:
        """Write down, or compare, what the store is for; returns how many damaged files were replaced (0 or 1)."""
        path = self.folder / "target.json"
        if not path.exists():
            write_atomically(path, (json.dumps(identity, indent=2) + "\n").encode())
            return 0
        try:
            stored = json.loads(path.read_text())
        except ValueError:
            write_atomically(path, (json.dumps(identity, indent=2) + "\n").encode())
            return 1
        if stored != identity:
            raise UsageError(
                f"the kernel store {self.folder} was filled for another target or compiler ({stored}); "
                f"it does not serve {dict(identity)}. Choose another store folder"
            )
        return 0

    def _load(self) -> StoreLines:
        lines = read_lines(self._path)
        for record in lines.records:
            self._keep(record)
        return lines


def stores_folder() -> Path:
    """Where the user's stores lie, one folder each."""
    return cache_dir() / "kernels"


def identity_of(profile: Profile) -> dict[str, Any]:
    """What the kernels of a profile depend on: target, instructions and device, and the compiler's version."""
    return {
        "format_version": FORMAT_VERSION,
        "target": dict(profile.target),
        "fingerprint": profile.fingerprint,
        "tvm": version("apache-tvm"),
    }


def folder_name(identity: Mapping[str, Any]) -> str:
    """The name of the folder of the store with this identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(path: Path) -> StoreLines:
    """Read a store's file without changing anything; an absent file holds nothing."""
    if not path.exists():
        return StoreLines()
    records, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        record = _decode(line)
        if record is None:
            damaged.append(number)
        else:
            records.append(record)
    return StoreLines(tuple(records), tuple(damaged))


def _encode(record: KernelRecord) -> bytes:
    body = json.dumps(asdict(record), sort_keys=True)
    return f"{hashlib.sha256(body.encode()).hexdigest()[:12]} {body}\n".encode()


def _decode(line: bytes) -> KernelRecord | None:
    checksum, _, body = line.partition(b" ")
    if hashlib.sha256(body).hexdigest()[:12].encode() != checksum:
        return None
    try:
        RecordFields.model_validate_json(body)
    except ValidationError:  # written whole, by an autocomp with other records
        return None
    return record_from_json(json.loads(body))


MOST_UNROLLED = 4096  # of our own tiles the largest has 224


class _TileFields(BaseModel):
    """What `kernels.templates.Tile` has; a field that is not there has its default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rows: int = Field(default=1, ge=0, le=4096)
    vectors: int = Field(default=1, ge=0, le=64)
    unroll: int = Field(default=1, ge=1, le=4096)
    channels_outer: bool = True
    rows_up: int = Field(default=1, ge=1, le=4096)
    band: int = Field(default=0, ge=0, le=1 << 20)
    matrix: bool = False
    bytes: int = Field(default=0, ge=0)  # that the record of a stream has in a tile's place

    @model_validator(mode="after")
    def _in_bounds(self) -> _TileFields:
        """What is unrolled is a few thousand instructions at most: a compiler would not come to an end with more."""
        if max(self.rows, 1) * max(self.vectors, 1) * self.unroll > MOST_UNROLLED:
            raise ValueError(f"unrolls more than {MOST_UNROLLED} steps")
        return self


class RecordFields(BaseModel):
    """A record as a file has it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    key: str = Field(min_length=1)
    operator: str
    tile: _TileFields
    seconds: float = Field(gt=1e-10, lt=3600)  # of one kernel
    flops: int = Field(ge=0)
    trials: int = Field(ge=0)
    spatial: tuple[int, ...]
    reduction: tuple[int, ...]


def record_from_json(fields: Mapping[str, Any]) -> KernelRecord:
    """A record from the fields that ``dataclasses.asdict`` gave."""
    tuples = {name: tuple(fields[name]) for name in ("spatial", "reduction")}
    return KernelRecord(**{**fields, **tuples})
