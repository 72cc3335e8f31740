"""autocomp: search how to compress a PyTorch model, measured on its target's own autotuned kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocomp.api import (
        check,
        compile,
        fuse,
        gate,
        measure,
        plan,
        rebuild_report,
        recover,
        resolve,
        search,
        sensitivity,
    )
    from autocomp.errors import (
        AutocompError,
        BoardError,
        CorruptError,
        ExportError,
        InfeasibleError,
        Interrupted,
        MismatchError,
        UsageError,
    )
    from autocomp.fusion.fuse import Fused
    from autocomp.hardware.profile import list_profiles
    from autocomp.records.candidate import Candidate
    from autocomp.records.latency import Latency
    from autocomp.recovery.one import Recovered
    from autocomp.run.result import Point, SearchResult
    from autocomp.study.sampler import AutocompSampler
    from autocomp.tasks.task import Task, load_task

    __version__: str

__all__ = [
    "AutocompError",
    "AutocompSampler",
    "BoardError",
    "Candidate",
    "CorruptError",
    "ExportError",
    "Fused",
    "InfeasibleError",
    "Interrupted",
    "Latency",
    "MismatchError",
    "Point",
    "Recovered",
    "SearchResult",
    "Task",
    "UsageError",
    "__version__",
    "check",
    "compile",
    "fuse",
    "gate",
    "list_profiles",
    "load_task",
    "measure",
    "plan",
    "rebuild_report",
    "recover",
    "resolve",
    "search",
    "sensitivity",
]

# Where each public name lives. Resolved on first use (PEP 562): importing autocomp must not import torch or TVM.
_HOMES = {
    "AutocompError": "autocomp.errors",
    "AutocompSampler": "autocomp.study.sampler",
    "BoardError": "autocomp.errors",
    "Candidate": "autocomp.records.candidate",
    "CorruptError": "autocomp.errors",
    "ExportError": "autocomp.errors",
    "Fused": "autocomp.fusion.fuse",
    "InfeasibleError": "autocomp.errors",
    "Interrupted": "autocomp.errors",
    "Latency": "autocomp.records.latency",
    "MismatchError": "autocomp.errors",
    "Point": "autocomp.run.result",
    "Recovered": "autocomp.recovery.one",
    "SearchResult": "autocomp.run.result",
    "Task": "autocomp.tasks.task",
    "UsageError": "autocomp.errors",
    "check": "autocomp.api",
    "compile": "autocomp.api",
    "fuse": "autocomp.api",
    "gate": "autocomp.api",
    "list_profiles": "autocomp.hardware.profile",
    "load_task": "autocomp.tasks.task",
    "measure": "autocomp.api",
    "plan": "autocomp.api",
    "rebuild_report": "autocomp.api",
    "recover": "autocomp.api",
    "resolve": "autocomp.api",
    "search": "autocomp.api",
    "sensitivity": "autocomp.api",
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
