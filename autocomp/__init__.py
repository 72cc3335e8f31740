"""autocomp: search how to compress a PyTorch model, measured on its target's own autotuned kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocomp.api import SearchResult, compile, measure, search
    from autocomp.hardware.profile import list_profiles
    from autocomp.records.candidate import Candidate
    from autocomp.records.latency import Latency
    from autocomp.tasks.task import Task, load_task

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
    "Candidate": "autocomp.records.candidate",
    "Latency": "autocomp.records.latency",
    "SearchResult": "autocomp.api",
    "Task": "autocomp.tasks.task",
    "compile": "autocomp.api",
    "list_profiles": "autocomp.hardware.profile",
    "load_task": "autocomp.tasks.task",
    "measure": "autocomp.api",
    "search": "autocomp.api",
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
