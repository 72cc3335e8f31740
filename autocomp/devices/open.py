"""The one place that opens a target, however it is reached."""

from __future__ import annotations

from autocomp.devices.device import Device
from autocomp.hardware.profile import Profile
from autocomp.tuning.store import KernelStore


def open_device(profile: Profile, store: KernelStore | None = None) -> Device:
    """Open a profile's target. UsageError if it cannot be reached; ``store`` replaces the user's kernel store."""
    if profile.reach == "estimate":
        from autocomp.devices.estimated import EstimatedDevice

        return EstimatedDevice(profile, store)
    if profile.reach == "rpc":
        from autocomp.devices.rpc import RpcDevice

        return RpcDevice(profile, store)
    from autocomp.devices.local import LocalDevice

    return LocalDevice(profile, store)
