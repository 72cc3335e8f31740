"""Errors a user can meet; each carries the exit code the command line returns."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class AutocompError(Exception):
    """Something failed that is no mistake of the caller's. Exit code 1."""

    exit_code = 1


class UsageError(AutocompError):
    """Bad input: the rule, the value received, where it stood, what to do. Exit code 2."""

    exit_code = 2


class ExportError(UsageError):
    """The model cannot be exported, or uses an operation the compiler does not know."""


class MismatchError(AutocompError):
    """A compiled module computes something else than the torch model; its time must not count."""


class ObjectError(AutocompError):
    """An object file holds what the emulator does not know, or the kernel in it failed: it has no estimate."""


class BoardError(AutocompError):
    """A board did not answer, or its session was lost; another try may succeed, and the search goes on without it."""


class CorruptError(AutocompError):
    """A stored file does not read back as it was written; the caller rebuilds it and says so."""


class InfeasibleError(AutocompError):
    """The search finished, but no delivered candidate meets the goals. Exit code 3."""

    exit_code = 3


class Interrupted(AutocompError):
    """The run was stopped; what was told is kept. Exit code 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""

    exit_code = 130


def shown(value: object, limit: int = 200) -> str:
    """A value as a message echoes it, of any size and nesting: at most about ``limit`` characters, on one line.

    Texts are quoted; what an exception says stands as it is.

    Examples:
        >>> shown("digits"), shown(list(range(1000)))
        ("'digits'", '[0, 1, 2, 3, 4, 5, ...]')
    """
    if isinstance(value, BaseException):
        text = " ".join(str(value).split())
    elif isinstance(value, str):
        text = repr(value[: limit + 1])
    else:
        brief = reprlib.Repr()
        brief.maxlevel, brief.maxlist, brief.maxdict, brief.maxtuple, brief.maxset = 3, 6, 6, 6, 6
        brief.maxstring = brief.maxlong = brief.maxother = limit
        try:
            text = " ".join(brief.repr(value).split())
        except ValueError:  # a whole number of more digits than Python writes
            text = f"a {type(value).__name__} too long to show"
    return cut(text, limit + 2)


def cut(text: str, limit: int = 200) -> str:
    """A text of at most ``limit`` characters, and a sign where the rest is left out."""
    return text if len(text) <= limit else text[:limit] + "…"


class ModelWarning(UserWarning):
    """What must be said of a model that was compiled all the same."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, or an empty string.

    Examples:
        >>> suggest("digit", ["digits", "tokens"])
        " Did you mean 'digits'?"
    """
    near = difflib.get_close_matches(name[:200], list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def last_line(error: BaseException) -> str:
    """The line of an error that says what was wrong; TVM's are preceded by pages of trace."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return cut(lines[-1].strip(), 1000) if lines else type(error).__name__
