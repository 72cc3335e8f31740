"""Text that every Python brings along: the source of its standard library, as numbered tokens and the role of each.

Tokens are parts of words in lower case (``readLine`` is two), single digits, single signs and line ends: what can be seen without
parsing. Roles come from Python's own tokenizer and the neighbouring tokens; see ``ROLES``.
"""

from __future__ import annotations

import hashlib
import io
import keyword
import re
import sysconfig
import tokenize
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from autocomp.errors import UsageError

LENGTH = 64  # tokens of a window
VOCABULARY = 1024  # the training files' most frequent tokens, and number 0 for all others
TENTHS = {0: "validation", 1: "test"}  # of the files, by hash of their path; all others are training
FEWEST = 1000  # windows in the held-out files: with fewer, an installation lacks most of its library

# Globs below the library's folder. Parts that Python 3.12 to 3.14 removed or that distributions package apart (tests, tkinter,
# idlelib, lib2to3, distutils) are left out, so that all Pythons read nearly the same.
SOURCES = (
    "[a-z]*.py", "asyncio/*.py", "collections/*.py", "concurrent/**/*.py", "ctypes/*.py", "email/**/*.py", "html/*.py",
    "http/*.py", "importlib/**/*.py", "json/*.py", "logging/*.py", "multiprocessing/*.py", "unittest/*.py", "urllib/*.py",
    "xml/**/*.py", "xmlrpc/*.py", "zoneinfo/*.py",
)  # fmt: skip

ROLES = (
    "comment",
    "docstring",  # any string in three quotes
    "string",
    "number",
    "keyword",
    "sign",
    "definition",  # the name after def or class
    "call",  # a name before an opening parenthesis
    "method",  # the same after a point
    "attribute",  # after a point, not called
    "argument",  # before = within brackets
    "name",  # any other
)
PROSE = ("comment", "docstring")
NAMES = ("definition", "call", "method", "attribute", "argument", "name")

_PIECE = re.compile(r"\n|[A-Z]?[a-z]+|[A-Z]+|[0-9]|[^\sA-Za-z0-9]")
_LONG_STRING = re.compile(r"[A-Za-z]{0,2}(\"\"\"|''')")


@dataclass(frozen=True)
class Text:
    """Files one after the other: token numbers ``[N]`` and roles ``[N]``, int64, and where windows of 64 may start ``[W]``.

    Windows that ``starts`` names lie apart and within one file each.
    """

    tokens: Tensor
    roles: Tensor
    starts: Tensor

    def windows(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens and the roles of the windows that start there, each ``[len(starts), 64]``."""
        at = starts[:, None] + torch.arange(LENGTH)
        return self.tokens[at], self.roles[at]


def load_text() -> tuple[Text, Text, Text, str]:
    """Return training, validation and test files, and a name of the sources by content.

    The same Python gives the same every time. UsageError if this installation lacks the sources.
    """
    files = _files(Path(sysconfig.get_paths()["stdlib"]))
    parts: dict[str, list[_File]] = {"training": [], "validation": [], "test": []}
    for file in files:
        digest = hashlib.sha256(file.path.encode()).digest()
        parts[TENTHS.get(int.from_bytes(digest[:8]) % 10, "training")].append(file)
    counts = Counter(word for file in parts["training"] for word in file.words)
    # Ties are broken by the word itself: the order of equal counts is no property of the text.
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - 1]
    numbers = {word: place + 1 for place, word in enumerate(ranked)}
    training, validation, test = (_numbered(part, numbers) for part in parts.values())
    content = hashlib.sha256()
    for file in files:
        content.update(f"{file.path} {len(file.words)} {' '.join(file.words)}".encode())
    return training, validation, test, content.hexdigest()[:12]


@dataclass(frozen=True)
class _File:
    path: str
    words: tuple[str, ...]
    roles: tuple[int, ...]


@cache
def _files(root: Path) -> tuple[_File, ...]:
    """Read and tag all sources, which takes about two seconds."""
    paths = sorted({path for glob in SOURCES for path in root.glob(glob)})
    files = tuple(_File(path.relative_to(root).as_posix(), *tagged(path)) for path in paths if "test" not in path.parts)
    if sum(len(file.words) for file in files) < 10 * FEWEST * LENGTH // 2:
        raise UsageError(
            f"task 'tokens' is made of Python's own sources, and {root} holds only {len(files)} of its .py files: "
            "use a Python that ships its standard library as source"
        )
    return files


def tagged(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the tokens of a source file and the index in ``ROLES`` of each."""
    with tokenize.open(path) as file:
        source = file.read()
    lines = [0]  # where each line starts
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    role_at = [ROLES.index("sign")] * (len(source) + 1)
    parsed = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.string.strip()]
    depth = 0
    for index, token in enumerate(parsed):
        before = parsed[index - 1].string if index else ""
        behind = parsed[index + 1].string if index + 1 < len(parsed) else ""
        depth += (token.string in ("(", "[", "{")) - (token.string in (")", "]", "}"))
        role = ROLES.index(_role(token, before, behind, depth))
        start, end = lines[token.start[0] - 1] + token.start[1], lines[token.end[0] - 1] + token.end[1]
        role_at[start:end] = [role] * (end - start)
    found = [(match.group().lower(), role_at[match.start()]) for match in _PIECE.finditer(source)]
    return tuple(word for word, _ in found), tuple(role for _, role in found)


def _role(token: tokenize.TokenInfo, before: str, behind: str, depth: int) -> str:
    if token.type == tokenize.COMMENT:
        return "comment"
    if token.type == tokenize.STRING:
        return "docstring" if _LONG_STRING.match(token.string) else "string"
    if token.type == tokenize.NUMBER:
        return "number"
    if token.type != tokenize.NAME:
        return "sign"
    if keyword.iskeyword(token.string):
        return "keyword"
    if before in ("def", "class"):
        return "definition"
    if before == ".":
        return "method" if behind == "(" else "attribute"
    if behind == "(":
        return "call"
    return "argument" if behind == "=" and depth else "name"


def _numbered(files: list[_File], numbers: dict[str, int]) -> Text:
    tokens = [numbers.get(word, 0) for file in files for word in file.words]
    roles = [role for file in files for role in file.roles]
    starts: list[int] = []
    begin = 0
    for file in files:
        starts += range(begin, begin + len(file.words) - LENGTH + 1, LENGTH)
        begin += len(file.words)
    return Text(torch.tensor(tokens), torch.tensor(roles), torch.tensor(starts))
