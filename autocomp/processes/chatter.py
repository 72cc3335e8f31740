"""What TVM, ONNX and torch write to standard error by themselves: into a run's log, or nowhere; our own messages still reach the user.

Much of it comes from C++, which knows no ``sys.stderr``: the file descriptor itself is turned elsewhere. Processes forked meanwhile
inherit that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LOG = "log.txt"
SHOW = "AUTOCOMP_CHATTER"  # an environment variable: set to anything, all of it is shown
_STDOUT, _STDERR = 1, 2


_aside: list[tuple[IO[str], int]] = []  # standard output as it was before it was turned to standard error, and its file


@contextmanager
def said_aside() -> Iterator[None]:
    """Turn standard output to standard error meanwhile, what C++ and child processes print too; `said_plainly` is the way out."""
    before = sys.stdout
    _flush(before)
    kept = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    if not _writes_to(before, _STDOUT):  # a notebook's, or a test's own
        sys.stdout = sys.stderr
    _aside.append((before, kept))
    try:
        yield
    finally:
        _aside.pop()
        _flush(sys.stdout)
        os.dup2(kept, _STDOUT)
        os.close(kept)
        sys.stdout = before


@contextmanager
def said_plainly() -> Iterator[None]:
    """Inside `said_aside`, turn standard output back meanwhile."""
    if not _aside:
        yield
        return
    (stream, kept), now, turned = _aside[-1], sys.stdout, os.dup(_STDOUT)
    _flush(now)
    os.dup2(kept, _STDOUT)
    sys.stdout = stream
    try:
        yield
        stream.flush()  # a reader that has left, a full disk: for the command to tell
    finally:
        _flush(stream)
        os.dup2(turned, _STDOUT)
        os.close(turned)
        sys.stdout = now


@contextmanager
def caught(log: Path | None, console: Console | None = None) -> Iterator[None]:
    """Append standard error to ``log`` (None: drop it) meanwhile; what ``console`` prints goes where it would have gone.

    Nothing is caught where ``AUTOCOMP_CHATTER`` is set, or there is no standard error. Calls may nest; the innermost decides.
    """
    try:
        terminal = os.dup(_STDERR)
    except OSError:
        terminal = -1
    if terminal < 0 or os.environ.get(SHOW):
        if terminal >= 0:
            os.close(terminal)
        yield
        return
    try:
        with (
            open(log or os.devnull, "a", encoding="utf-8", errors="replace", buffering=1) as target,
            _turned(target, terminal, console),
        ):
            yield
    finally:
        os.close(terminal)


@contextmanager
def _turned(target: IO[str], terminal: int, console: Console | None) -> Iterator[None]:
    before, shown = sys.stderr, _follow(console, terminal)
    _flush(before)
    os.dup2(target.fileno(), _STDERR)
    sys.stderr = target
    try:
        yield
    finally:
        sys.stderr = before
        _flush(target)
        os.dup2(terminal, _STDERR)
        if console is not None and shown is not None:
            _flush(shown)
            console.file = None if console.stderr else before  # type: ignore[assignment]  # None: whatever sys.stderr is


def _follow(console: Console | None, terminal: int) -> IO[str] | None:
    """Let a console on standard error write there as before; the stream it now has, if it was changed."""
    if console is None or console.file is not sys.stderr:
        return None
    kept = sys.stderr
    if _writes_to(kept, _STDERR):  # and not a notebook's, or a test's own
        kept = os.fdopen(terminal, "w", encoding="utf-8", errors="replace", closefd=False)
    console.file = kept
    return kept


def _writes_to(stream: IO[str], descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (AttributeError, OSError, ValueError):
        return False


def _flush(stream: IO[str] | None) -> None:
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.flush()
