"""Importing what every command imports stays cheap: heavy libraries are imported where they are used."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

HEAVY = {"torch", "tvm", "optuna", "onnxruntime", "onnx", "sklearn", "pandas", "plotly"}


@pytest.mark.parametrize(
    "module",
    [
        "autocomp",
        "autocomp.cli.main",
        "autocomp.config.settings",
        "autocomp.hardware.profile",
        "autocomp.progress",
        "autocomp.records.evaluation",
        "autocomp.run.folder",
        "autocomp.tasks.task",
    ],
)
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(run.stdout.split())


def test_public_names() -> None:
    import autocomp

    assert {"Task", "search", "SearchResult", "measure", "compile", "load_task", "list_profiles"} <= set(dir(autocomp))
    assert autocomp.Task.__module__ == "autocomp.tasks.task"
    assert autocomp.Latency.__module__ == "autocomp.records.latency"
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        _ = autocomp.serch  # the name that is not there is the point


def test_no_module_stands_in_the_place_of_a_public_function() -> None:
    import autocomp

    assert not {module.name for module in pkgutil.iter_modules(autocomp.__path__)} & set(autocomp.__all__)


def test_every_public_name_is_itself_when_everything_has_been_imported() -> None:
    """Importing a module binds its name in the package: ``autocomp.measure`` was one after the first search."""
    code = """
import importlib, pkgutil, autocomp
for module in pkgutil.walk_packages(autocomp.__path__, "autocomp."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*(name for name in autocomp.__all__ if type(getattr(autocomp, name)).__name__ == "module"))
print(autocomp.search.__module__, autocomp.measure.__module__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["autocomp.api", "autocomp.api"]
