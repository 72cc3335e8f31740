"""Every test run has a cache of its own: what the user has tuned or trained is neither read nor changed.

Tests marked ``board`` run only where they are asked for: they download an arm64 system once, 130 MB, and need qemu.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the emulated board out unless ``-m`` speaks of it; what is left out is counted as deselected."""
    if "board" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("board")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("board")]
