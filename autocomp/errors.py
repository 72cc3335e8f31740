"""Errors a user can meet; each carries the exit code the command line returns."""

from __future__ import annotations

import difflib
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
    """The search finished, but no measured candidate meets the goals. Exit code 3."""

    exit_code = 3


class Interrupted(AutocompError):
    """The user stopped the run; what was told is kept. Exit code 130."""

    exit_code = 130


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
