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
        "autocomp.cli",
        "autocomp.config",
        "autocomp.hardware",
        "autocomp.progress",
        "autocomp.records",
        "autocomp.runfolder",
        "autocomp.task",
    ],
)
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(run.stdout.split())


def test_public_names() -> None:
    import autocomp

    assert {"Task", "search", "SearchResult", "measure", "compile", "load_task", "list_profiles"} <= set(dir(autocomp))
    assert autocomp.Task.__module__ == "autocomp.task"
    assert autocomp.Latency.__module__ == "autocomp.records"
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        _ = autocomp.serch  # the name that is not there is the point


def test_no_module_stands_in_the_place_of_a_public_function() -> None:
    import autocomp

    modules = {module.name for module in pkgutil.iter_modules(autocomp.__path__)}
    assert modules & set(autocomp.__all__) <= {"search"}  # kept a function by the package itself, as tested below


@pytest.mark.parametrize("first", ["autocomp.api", "autocomp.search.goals", "autocomp"])
def test_search_is_the_function_whatever_was_imported_before(first: str) -> None:
    code = f"import {first}, autocomp; autocomp.measure; print(autocomp.search.__module__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "autocomp.api\n"
