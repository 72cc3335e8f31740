"""Files that are asked for by name where they ship with autocomp, else by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autocomp.config.files import read_yaml
from autocomp.config.shipped import shipped_files
from autocomp.config.versions import current_by_hand
from autocomp.errors import UsageError, shown, suggest


def read_named(folder: str, name: str | Path, what: str, holds: str, newest: int) -> tuple[Path, dict[str, Any]]:
    """The path and the keys of a file that ships in a folder, by name, or of a user's own, by path; ``what`` such a file is called.

    UsageError if there is none, it is no mapping with the key ``holds``, or of a version that is not read.
    """
    shipped = shipped_files(folder)
    path = shipped.get(str(name), Path(name))
    try:
        data = read_yaml(path)
    except FileNotFoundError:
        raise UsageError(
            f"unknown {what} {shown(str(name))}.{suggest(str(name), shipped)} Known: {', '.join(shipped)}, or a path"
        ) from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a {what} must be a mapping with 'format_version' and {holds!r}")
    return path, current_by_hand(data, path, newest)
