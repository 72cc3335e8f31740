"""The one place that opens a target, however it is reached."""

from __future__ import annotations

from dataclasses import replace

from autocomp.devices.device import Device
from autocomp.hardware.energy import Counters, power
from autocomp.hardware.profile import Profile, load_profile
from autocomp.tuning.store import KernelStore


def open_named(name: str) -> Device:
    """Open a target by its profile's name or file. Where the profile does not state what its board draws, this machine's own counters tell."""
    profile = load_profile(name)
    if not counted(profile) or (counters := Counters.open()) is None:
        return open_device(profile)
    from autocomp.devices.local import LocalDevice

    return LocalDevice(replace(profile, power=power(counters, profile.cores)), counters=counters)


def counted(profile: Profile) -> bool:
    """Whether the energy of inferences is counted by this machine: of a profile that does not state what its board draws."""
    return profile.reach == "local" and profile.watts is None and Counters.open() is not None


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
