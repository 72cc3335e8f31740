"""autocomp: search how to compress a PyTorch model, measured on its target's own autotuned kernels."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocomp.api import SearchResult, compile, measure, search
    from autocomp.hardware import list_profiles
    from autocomp.records import Candidate, Latency
    from autocomp.task import Task, load_task

    __version__: str

__all__ = [
    "Candidate",
    "Latency",
    "SearchResult",
    "Task",
    "__version__",
    "compile",
    "list_profiles",
    "load_task",
    "measure",
    "search",
]

# Where each public name lives. Resolved on first use (PEP 562): importing autocomp must not import torch or TVM.
_HOMES = {
    "Candidate": "autocomp.records",
    "Latency": "autocomp.records",
    "SearchResult": "autocomp.api",
    "Task": "autocomp.task",
    "compile": "autocomp.api",
    "list_profiles": "autocomp.hardware",
    "load_task": "autocomp.task",
    "measure": "autocomp.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("autocomp")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'autocomp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


class _Package(ModuleType):
    """Keeps ``autocomp.search`` the function: importing the folder of that name would put the folder in its place."""

    @property
    def search(self) -> Any:
        from autocomp.api import search

        return search

    @search.setter
    def search(self, folder: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
