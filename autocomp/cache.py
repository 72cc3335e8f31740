"""Where results that outlive one run are kept: trained built-in models, tuned kernels."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from autocomp.errors import UsageError


def cache_dir() -> Path:
    """Return the user's cache folder of autocomp; it need not exist yet.

    ``AUTOCOMP_CACHE`` if set, else ``$XDG_CACHE_HOME/autocomp``, else ``~/.cache/autocomp``. UsageError if the place
    named is there but is no folder.
    """
    own = os.environ.get("AUTOCOMP_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    if own:
        folder = Path(own).expanduser()
    elif base:
        folder = Path(base).expanduser() / "autocomp"
    else:
        folder = Path.home() / ".cache" / "autocomp"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the cache must be a folder, but {folder} is a file: set AUTOCOMP_CACHE to a folder")
    return folder.absolute()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
