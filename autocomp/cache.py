"""Where results that outlive one run are kept: trained built-in models, tuned kernels."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
import uuid
from pathlib import Path

from autocomp.errors import UsageError

# Seconds after which a file half written is nobody's: until then another machine's process may be writing it.
_FORGOTTEN = 86_400.0


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


def write_atomically(path: Path, data: bytes, private: bool = False) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old content or the new, never a part of it.

    A ``private`` one can be read by its owner alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            if private:
                os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Take away what writers that were killed left in a folder."""
    for path in folder.glob(".*.*"):
        made = re.fullmatch(r"\..+\.(\d+)\.[0-9a-f]{8}", path.name)
        if made is None:
            continue
        try:
            if not Path(f"/proc/{made[1]}").exists() or time.time() - path.stat().st_mtime > _FORGOTTEN:
                path.unlink()
        except OSError:  # another process was faster, or it is not ours
            continue


_HOPELESS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "it is not yours to write",
    errno.EPERM: "it is not yours to write",
    errno.ENOTDIR: "a part of its path is a file",
    errno.EEXIST: "it is a file",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ELOOP: "a link in its path leads to itself",
}


def unwritable_reason(error: OSError) -> str | None:
    """Say in words why nothing can be written, None if the error is of another kind."""
    return _HOPELESS.get(error.errno or 0)


def sealed(header: bytes, payload: bytes, salt: bytes = b"") -> bytes:
    """A file's content with a first line that says what it is, and holds a checksum of ``salt`` and payload."""
    return _first_line(header, payload, salt) + b"\n" + payload


def unsealed(header: bytes, content: bytes, salt: bytes = b"") -> bytes | None:
    """The payload that `sealed` wrote; None where it is not what was written."""
    first, _, payload = content.partition(b"\n")
    return payload if first == _first_line(header, payload, salt) else None


def _first_line(header: bytes, payload: bytes, salt: bytes) -> bytes:
    digest = hashlib.sha256(salt)
    digest.update(payload)
    return header + digest.hexdigest().encode()
