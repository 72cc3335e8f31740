"""The examples in docstrings are true: each module that has some is run as `python -m doctest` would."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import autocomp

PACKAGE = Path(autocomp.__file__).parent
# An exception is shown by its full name, as Python shows it; a long message may end in dots.
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert not doctest.testmod(importlib.import_module(name), optionflags=FLAGS).failed


@pytest.mark.parametrize("name", sorted(set(autocomp.__all__) - {"__version__"}))
def test_every_public_name_is_documented(name: str) -> None:
    """With its parts: what a class of the package offers says what it is."""
    subject = getattr(autocomp, name)
    assert inspect.getdoc(subject)
    if inspect.isclass(subject) and not issubclass(subject, Exception):
        for part, value in vars(subject).items():
            if not part.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod)):
                assert inspect.getdoc(value), f"{name}.{part}"
        assert not (subject.__doc__ or "").startswith(f"{name}("), "a dataclass without a docstring of its own"
