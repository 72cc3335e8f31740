"""Every kind of device keeps the contract that is shipped for whoever adds one; a device that breaks it is told so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import boards
import pytest

from autocomp.devices.contract import check_device
from autocomp.devices.local import LocalDevice
from autocomp.devices.open import open_device
from autocomp.hardware.profile import load_profile
from autocomp.tuning.store import KernelStore

pytestmark = pytest.mark.usefixtures("short_tuning")


def test_this_machine(device: LocalDevice) -> None:
    check_device(device)


def test_an_estimate(tmp_path: Path) -> None:
    profile = load_profile("cortex-a76")
    check_device(open_device(profile, KernelStore.open(profile, tmp_path)))


def test_a_board(tmp_path: Path) -> None:
    with boards.tracked(tmp_path, 9800) as made:
        made.start("hut", 9810)
        made.wait("hut", 1)
        profile = boards.this_machine(made.logs, made.tracker, "hut")
        check_device(open_device(profile, KernelStore.open(profile, tmp_path / "store")))


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        ({"how": "estimated"}, "says how it was obtained"),
        ({"profile": "another"}, "of which profile it is"),
        ({"seconds": 0.0}, "is a time"),
    ],
)
def test_a_broken_promise_is_named(
    broken: dict[str, Any], promise: str, device: LocalDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LocalDevice.time
    monkeypatch.setattr(LocalDevice, "time", lambda self, *given: replace(real(self, *given), **broken))
    with pytest.raises(AssertionError, match=promise):
        check_device(device)
