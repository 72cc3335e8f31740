"""Every test run has a cache of its own: what the user has tuned or trained is neither read nor changed.

Tests marked ``board`` run only where they are asked for: they download an arm64 system once, 130 MB, and need qemu.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import autocomp
    from autocomp.api import SearchResult
    from autocomp.devices.local import LocalDevice


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("AUTOCOMP_CACHE")
    os.environ["AUTOCOMP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["AUTOCOMP_CACHE"]
    else:
        os.environ["AUTOCOMP_CACHE"] = before


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> LocalDevice:
    """This machine with an empty store and the first guess of every kernel: what is computed does not depend on the tile."""
    from autocomp.devices.local import LocalDevice
    from autocomp.hardware import load_profile
    from autocomp.kernels.store import KernelStore

    profile = load_profile("x86-host")
    device = LocalDevice(profile, KernelStore.open(profile, tmp_path_factory.mktemp("store")))
    device.tuner.budget = 1
    return device


@pytest.fixture(scope="module")
def short_tuning() -> Iterator[None]:
    """One tile a kernel: what is tested here does not depend on how fast a kernel is."""
    from autocomp.kernels.tune import Tuner

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Tuner.__init__.__kwdefaults__, "budget", 1)
        yield


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``wide`` has two widths, ``full`` keeps all channels, so that a run has but two baselines.

    The head stays fp32: with four outputs from a few inputs, one activation rounded the other way is a percent of them.
    """
    import yaml

    folder = tmp_path_factory.mktemp("spaces")
    for name, keep in (("wide", [1.0, 0.5]), ("full", [1.0])):
        rule = {"layers": "*", "keep": keep, "ranks": [0.25], "precisions": ["fp32", "w8a8"]}
        rules = {"format_version": 1, "rules": [rule, {"layers": "head", "precisions": ["fp32"]}]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(rules))
    return {name: str(folder / f"{name}.yaml") for name in ("wide", "full")}


@pytest.fixture
def without_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the files of front points, half of the time of a run, where a test is about what goes before."""
    from autocomp import finish
    from autocomp.report.data import FrontPoint

    monkeypatch.setattr(finish, "_point", lambda _pipeline, evaluation: FrontPoint(evaluation))


@pytest.fixture
def small(spaces: dict[str, str], tmp_path: Path) -> Callable[..., SearchResult]:
    """Run a search of the ``full`` space with the fewest steps that have every stage."""

    import autocomp

    def run(task: autocomp.Task | str = "tiny_task:task", **options: Any) -> SearchResult:
        settings = {"trials": 4, "measure": 1, "out": tmp_path / "run", "space": spaces["full"], "references": False}
        return autocomp.search(task=task, **settings | options)

    return run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the emulated board out unless ``-m`` speaks of it; what is left out is counted as deselected."""
    if "board" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("board")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("board")]
