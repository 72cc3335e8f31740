"""What a board reaches: its arithmetic peaks and memory bandwidth, measured with the kernels that a search would use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from autocomp.devices.boards import Limits
from autocomp.devices.features import BoardFacts, read_board
from autocomp.devices.rpc import RpcDevice, on_a_board, rpc_of
from autocomp.errors import AutocompError
from autocomp.hardware.profile import Profile
from autocomp.records.precisions import ARITHMETICS, FORMATS, Precision
from autocomp.tuning.roofline import measure_bandwidth
from autocomp.tuning.store import KernelStore


@dataclass(frozen=True)
class Probed:
    """A board as found. ``peaks`` are operations a second of one core held in cache, ``bandwidth`` bytes a second read.

    What could not be measured is left out, and ``notes`` says why; they also say what the profile asks for and the board lacks.
    """

    facts: BoardFacts
    precisions: tuple[Precision, ...]
    peaks: dict[str, float] = field(default_factory=dict)
    bandwidth: float | None = None
    notes: tuple[str, ...] = ()


def probe(
    profile: Profile,
    folder: Path,
    limits: Limits | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Probed:
    """Measure a free board of a profile's key anew, with a kernel store of its own in ``folder``. UsageError, BoardError."""
    limits = limits or Limits()
    progress("asking the board what it is")
    asked = replace(profile, reach="rpc")
    device = RpcDevice(asked, KernelStore.open(asked, folder), limits)
    facts = on_a_board(rpc_of(profile), lambda session: read_board(session, asked), limits)
    peaks: dict[str, float] = {}
    bandwidth, notes = None, list(device.notes)
    used = {FORMATS[precision].family.arithmetic for precision in device.profile.precisions}
    for name, arithmetic in ARITHMETICS.items():
        if arithmetic not in used:  # the board has no kernel for it
            continue
        progress(f"measuring {name} arithmetic")
        try:
            peaks[name] = device.tuner.peak(arithmetic.template("dense")) or 0.0
        except AutocompError as error:
            notes.append(f"{name}: {error}")
    progress("measuring the memory bandwidth")
    try:
        bandwidth = measure_bandwidth(device.profile, device.store, device.tuner.timer)
    except AutocompError as error:
        notes.append(str(error))
    return Probed(facts, device.profile.precisions, peaks, bandwidth, tuple(notes))
