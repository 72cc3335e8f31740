"""Files that others wrote, read within bounds: a regular file, not too large, not too deep, and no text that explodes.

Everything that is wrong with such a file is one UsageError that names it, whatever its parser would have raised.
"""

from __future__ import annotations

import json
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from autocomp.errors import UsageError, cut, shown, suggest

# Of a config, a profile, a search space: a rule for each of a thousand layers is a fifth of this.
SETTINGS_BYTES = 1 << 18
RECORDS_BYTES = 1 << 29  # of what a run wrote about itself
DEPTH = 40  # of lists and mappings in each other
NODES = 100_000  # of a YAML file, its aliases written out
MOST_FAULTS = 8  # of one file in one message
_SURROGATE = re.compile(r"\\u[dD][89abAB]")

M = TypeVar("M", bound=BaseModel)


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


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or TOML file that holds a mapping; UsageError with the place if it does not."""
    try:
        data = read_toml(path) if path.suffix == ".toml" else read_yaml(path)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError(f"{path} must hold keys and values (key: value), got {type(data).__name__}")
    return data


def validated(model: type[M], data: Mapping[str, Any], origins: Mapping[str, str] | str) -> M:
    """Validate data into a model; UsageError lists every fault as ``origin key: rule, got value``.

    ``origins`` is where the data stood, for all keys or by top-level key.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        lines = []
        faults = error.errors(include_url=False)
        for fault in faults[:MOST_FAULTS]:
            place = fault["loc"]
            origin = origins if isinstance(origins, str) else _origin_of(place, origins)
            key = "".join(f"[{part}]" if isinstance(part, int) else f".{cut(str(part))}" for part in place).lstrip(".")
            lines.append(f"{origin}{key + ': ' if key else ''}{_explain(model, fault)}")
        if len(faults) > MOST_FAULTS:
            lines.append(f"and {len(faults) - MOST_FAULTS} more")
        raise UsageError("\n".join(lines)) from None


def _origin_of(place: tuple[int | str, ...], origins: Mapping[str, str]) -> str:
    """The flag or file a fault came from; a goal is remembered by its dotted name."""
    return origins.get(".".join(map(str, place[:2])), origins.get(str(place[0]), "") if place else "")


# Rules that pydantic words for programmers, in words for the writer of a file.
_RULES = {
    "model_type": "keys and values (key: value)",
    "dict_type": "keys and values (key: value)",
    "list_type": "a list ([first, second])",
    "string_type": "text",
    "string_too_short": "a non-empty text",
    "too_short": "a list with at least one entry",
    "int_type": "a whole number",
    "bool_type": "true or false",
}


def _explain(model: type[BaseModel], fault: Any) -> str:
    """Say a pydantic fault in our words: the rule, then the value received."""
    kind, value, place = fault["type"], fault["input"], fault["loc"]
    if kind == "extra_forbidden":
        known = _keys_at(model, place[:-1])
        for name, field in model.model_fields.items():
            nested = _model_in(field.annotation) if len(place) == 1 else None
            if nested is not None and place[-1] in nested.model_fields:
                return f"this key stands under {name}: ({name}: {{{place[-1]}: {shown(value)}}})"
        return f"there is no such key.{suggest(str(place[-1]), known)} Known keys: {', '.join(sorted(known))}"
    if kind == "missing":
        return "this key must be given"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        hint = ""
        if is_number(value) and "e" in value.lower():
            hint = f"; YAML reads {cut(value)} as text, write {_with_point(value)}"
        elif is_number(value):
            hint = "; leave out the quotes"
        return f"must be a number, got the text {shown(value)}{hint}"
    if kind == "int_type" and isinstance(value, float):
        return f"must be a whole number, got {shown(value)}"
    if kind in _RULES:
        return f"must be {_RULES[kind]}, got {shown(value)}"
    message = cut(fault["msg"].removeprefix("Value error, ").removeprefix("Input should be "))
    if message.startswith("must") or not place:  # a rule about several keys names them
        return message if shown(value) in message or not place else f"{message}, got {shown(value)}"
    return f"must be {message}, got {shown(value)}"


def _with_point(text: str) -> str:
    """``1e-3`` as YAML 1.1 wants it: ``1.0e-3``, with a point and a signed exponent."""
    mantissa, _, exponent = text.lower().partition("e")
    signed = exponent if exponent[0] in "+-" else f"+{exponent}"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{signed}"


def _keys_at(model: type[BaseModel], place: tuple[int | str, ...]) -> set[str]:
    """The keys a model knows at a place inside it (models nested in models, lists and unions)."""
    found: list[type[BaseModel]] = [model]
    for part in place:
        if isinstance(part, str) and part in found[-1].model_fields:
            found.append(_model_in(found[-1].model_fields[part].annotation) or found[-1])
    return set(found[-1].model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, getattr(annotation, "__args__", ()))), None)
