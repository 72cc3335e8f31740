"""Files that others wrote, read within bounds: a regular file, not too large, not too deep, and no text that explodes.

Everything that is wrong with such a file is one UsageError that names it, whatever its parser would have raised.
"""

from __future__ import annotations

import json
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

import yaml

from autocomp.errors import UsageError, shown

SETTINGS_BYTES = (
    1 << 18
)  # of a config, a profile, a search space: a rule for each of a thousand layers is a fifth of this
RECORDS_BYTES = 1 << 29  # of what a run wrote about itself
DEPTH = 40  # of lists and mappings in each other
NODES = 100_000  # of a YAML file, its aliases written out
_SURROGATE = re.compile(r"\\u[dD][89abAB]")


def read_text(path: Path, limit: int = SETTINGS_BYTES) -> str:
    """The text of a UTF-8 file of at most ``limit`` bytes. FileNotFoundError if there is none; UsageError says what is wrong with it."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"{_named(path)} is a folder: name a file")
        if not stat.S_ISREG(mode):
            raise UsageError(f"{_named(path)} is no regular file (a device or a pipe): copy what it gives into a file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UsageError(f"{_named(path)} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > limit:
        raise UsageError(f"{_named(path)} is larger than {limit >> 10} KiB, more than such a file may have")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{_named(path)} cannot be read: it is no text in UTF-8 (byte {error.start})") from error


def read_yaml(path: Path) -> Any:
    """What a YAML file says, None where it is empty. FileNotFoundError if there is none, UsageError if it is not valid."""
    return parse_yaml(read_text(path), path)


def parse_yaml(text: str, path: Path) -> Any:
    """What a YAML text says; ``path`` is what an error names."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{_named(path)} is not valid YAML: {shown(error, 400)}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        # PyYAML lets through what its constructors raise: a date of month 13, a number of 5000 digits, `!!bool maybe`
        raise UsageError(f"{_named(path)} is not valid YAML: {type(error).__name__}: {shown(error)}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says. Errors as `read_yaml`."""
    text = read_text(path)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError, OverflowError) as error:
        raise UsageError(f"{_named(path)} is not valid TOML: {shown(error, 400)}") from error
    _check_depth(data, path)
    return data


def read_json(path: Path, limit: int = RECORDS_BYTES) -> Any:
    """What a JSON file says. FileNotFoundError if there is none; UsageError if it is not valid, too large or too deep."""
    return parse_json(read_text(path, limit), path)


def parse_json(text: str, path: Path) -> Any:
    """What a JSON text says; ``path`` is what an error names."""
    try:
        data = json.loads(text)
        if _SURROGATE.search(text):  # half a character, which no page and no terminal can show
            json.dumps(data, ensure_ascii=False).encode()
    except RecursionError as error:
        raise UsageError(f"{_named(path)} does not read as JSON: it is nested too deep") from error
    except ValueError as error:
        raise UsageError(f"{_named(path)} does not read as JSON: {shown(error)}") from error
    _check_depth(data, path)
    return data


class _Loader(yaml.SafeLoader):
    """YAML without what makes a small text large, deep or ambiguous."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # nodes in a node, by its identity; of one that is not finished: none

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        mark: Any = event.start_mark
        self._depth += 1
        if self._depth > DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"lists and mappings are nested deeper than {DEPTH}", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            if isinstance(event, yaml.AliasEvent) and id(node) not in self._sizes:
                raise yaml.MarkedYAMLError(None, None, f"*{event.anchor} refers to itself", mark)
            size = self._sizes.get(id(node)) or 1 + sum(self._sizes[id(part)] for part in _parts(node))
            if size > NODES:
                raise yaml.MarkedYAMLError(None, None, f"more than {NODES} values, aliases written out", mark)
            self._sizes[id(node)] = size
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {shown(key.value)} stands twice", key.start_mark)
                seen.add(key.value)
        return node


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_depth(data: Any, path: Path) -> None:
    level = [data]
    for _ in range(DEPTH):
        level = [
            part
            for item in level
            if isinstance(item, dict | list)
            for part in (item.values() if isinstance(item, dict) else item)
            if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise UsageError(f"{_named(path)}: lists and mappings are nested deeper than {DEPTH}")


def _named(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}…{text[-80:]}"
