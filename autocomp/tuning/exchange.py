"""Stores at rest: which there are, what they hold, and the files by which kernels travel from one store to another.

An exported file is one JSON object: ``format_version``, the store's ``identity``, its ``records``, and a checksum of those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from autocomp.cache import write_atomically
from autocomp.config.files import RECORDS_BYTES, parse_json, read_text
from autocomp.config.versions import current_by_hand
from autocomp.errors import UsageError, shown
from autocomp.tuning.store import (
    KernelRecord,
    KernelStore,
    RecordFields,
    StoreLines,
    read_lines,
    record_from_json,
    stores_folder,
)

FORMAT_VERSION = 1  # of exported files


@dataclass(frozen=True)
class StoreAtRest:
    """One store's folder, read without changing it; ``identity`` is None where ``target.json`` does not read back."""

    folder: Path
    identity: Mapping[str, Any] | None
    lines: StoreLines

    @property
    def tvm(self) -> str:
        return str((self.identity or {}).get("tvm", "unknown"))

    @property
    def target(self) -> str:
        """The target in a few words: processor, added features, threads."""
        target = (self.identity or {}).get("target")
        if not isinstance(target, dict):
            return "unknown (target.json is damaged)"
        cores = target.get("num-cores", 1)
        added = (feature for feature in target.get("mattr", ()) if str(feature).startswith("+"))
        parts = [str(target.get("mcpu") or target.get("kind")), *added]
        return f"{' '.join(parts)}, {cores} thread{'s' if cores != 1 else ''}"


def list_stores(root: Path | None = None) -> list[StoreAtRest]:
    """The stores in the cache folder (or ``root``), by folder name."""
    root = root or stores_folder()
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [read_store(folder) for folder in folders if (folder / "target.json").exists()]


def read_store(folder: Path) -> StoreAtRest:
    """Read one store's folder; one that is not there is empty."""
    try:
        identity = json.loads((folder / "target.json").read_text())
    except (OSError, ValueError):
        identity = None
    return StoreAtRest(folder, identity if isinstance(identity, dict) else None, read_lines(folder / "kernels.jsonl"))


class _ExportFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format_version: Literal[1]
    identity: dict[str, Any]
    sha256: str
    records: list[RecordFields]


@dataclass(frozen=True)
class Exported:
    """What an exported file holds."""

    identity: Mapping[str, Any]
    records: tuple[KernelRecord, ...]


def export_store(store: KernelStore, path: Path) -> int:
    """Write every record of a store into one JSON file, in the order of their keys; returns how many there are."""
    records = [asdict(record) for record in sorted(store.records(), key=lambda record: record.key)]
    document = {
        "format_version": FORMAT_VERSION,
        "identity": store.identity,
        "sha256": _checksum(records),
        "records": records,
    }
    write_atomically(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
    return len(records)


def read_export(path: Path) -> Exported:
    """Read an exported file. UsageError if it is absent, of a newer format, incomplete, or was altered."""
    try:
        text = read_text(path, RECORDS_BYTES)
        document = parse_json(text, path)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except UsageError as error:
        raise UsageError(f"{error}; name a file that `autocomp kernels export` wrote") from error
    if not isinstance(document, dict) or "format_version" not in document:
        raise UsageError(f"{path} is no file of exported kernels: it states no format_version")
    current_by_hand(document, path, FORMAT_VERSION)
    try:
        _ExportFile.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise UsageError(f"{path}: {place}: {fault['msg']}, got {shown(fault['input'], 60)}") from None
    if _checksum(document["records"]) != document["sha256"]:
        raise UsageError(f"{path} was damaged or altered: its records do not match its checksum. Export it again")
    return Exported(document["identity"], tuple(record_from_json(fields) for fields in document["records"]))


def read_exports(paths: Sequence[Path], identity: Mapping[str, Any]) -> dict[Path, Exported]:
    """Read exported files that a store of this identity may take in.

    UsageError names what differs if one of them is for another target or compiler version.
    """
    exports = {path: read_export(path) for path in paths}
    for path, exported in exports.items():
        if found := list(differences(identity, exported.identity)):
            raise UsageError(
                f"{path} holds kernels for another target or compiler, so nothing was merged: {'; '.join(found)}. "
                "Merge it with the --profile and the versions it was exported with"
            )
    return exports


def differences(here: Mapping[str, Any], there: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Say what differs between two identities, key by key."""
    for key in sorted({*here, *there}):
        mine, other = here.get(key, "absent"), there.get(key, "absent")
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            yield from differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            yield f"{prefix}{key} is {other} in the file, {mine} here"


def _checksum(records: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(list(records), sort_keys=True).encode()).hexdigest()
