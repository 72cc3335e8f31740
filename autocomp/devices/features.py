"""What a board is: the instruction sets its kernel reports, its clock and its name, and a profile held to what it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autocomp.hardware.link import architecture_of
from autocomp.hardware.profile import DOTS, Profile, features_of

if TYPE_CHECKING:
    from autocomp.devices.boards import Session

_AT_HWCAP = 16  # the entry of the auxiliary vector: getauxval(3)
# LLVM's names of what we use, and the bits of AT_HWCAP on arm64: https://docs.kernel.org/arch/arm64/elf_hwcaps.html and
# arch/arm64/include/uapi/asm/hwcap.h (HWCAP_ASIMDHP, HWCAP_ASIMDDP)
_BITS = {"fullfp16": 10, "dotprod": 20}
_NAMES = {"fullfp16": "16-bit float arithmetic", "dotprod": "byte dot product"}
_CPU = "/sys/devices/system/cpu/cpu{core}"


@dataclass(frozen=True)
class BoardFacts:
    """What a board tells of itself; None where it does not tell.

    ``features`` are the instruction sets among those the kernels use; ``clock_hz`` is now, ``full_clock_hz`` the highest.
    """

    address: str
    model: str = ""
    features: frozenset[str] | None = None
    clock_hz: float | None = None
    full_clock_hz: float | None = None
    celsius: float | None = None


def read_board(session: Session, profile: Profile | None = None) -> BoardFacts:
    """Ask a board for its name, clock and temperature (sysfs) and, given a profile, for its instruction sets."""
    cores = session.read("/sys/devices/system/cpu/online").replace(",", "-").split("-")
    core = cores[-1] or "0"  # big.LITTLE parts number their big cores last
    folder = _CPU.format(core=core) + "/cpufreq"
    return BoardFacts(
        session.address,
        session.read("/sys/firmware/devicetree/base/model"),
        _features(session, profile) if profile else None,
        _number(session.read(f"{folder}/scaling_cur_freq"), 1e3),
        _number(session.read(f"{folder}/cpuinfo_max_freq"), 1e3),
        _number(session.read("/sys/class/thermal/thermal_zone0/temp"), 1e-3),
    )


def fit_to_board(profile: Profile, facts: BoardFacts) -> tuple[Profile, tuple[str, ...]]:
    """A profile without what its board lacks, and a note on each thing withdrawn. The same profile where nothing is lacking."""
    if facts.features is None:
        return profile, ()
    architecture = architecture_of(profile.target)
    lacking = [name for name in _BITS if name not in facts.features and _uses(profile, name)]
    notes = []
    for feature in lacking:
        for name in profile.precisions:
            if feature in features_of(name, profile.int8, architecture):
                notes.append(
                    f"board {facts.address} has no {_NAMES[feature]} ({feature}): precision {name} is withdrawn"
                )
    precisions = tuple(
        name for name in profile.precisions if not features_of(name, profile.int8, architecture) & set(lacking)
    )
    int8 = "none" if DOTS.get(profile.int8) in lacking else profile.int8
    if not lacking:
        return profile, ()
    target = dict(profile.target)
    # The processor's name implies what this board lacks: the bare architecture and what is there replace it.
    target["mcpu"] = "generic"
    target["mattr"] = ["+neon", *(f"+{name}" for name in sorted(facts.features))]
    return replace(profile, target=target, precisions=precisions, int8=int8), tuple(notes)


def _uses(profile: Profile, feature: str) -> bool:
    from autocomp.hardware import host

    return host.has_feature(_bare(profile.target), feature)


def _bare(target: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in target.items() if key != "num-cores"}


def _features(session: Session, profile: Profile) -> frozenset[str] | None:
    """Run a kernel that calls the C library's getauxval: a stock server has no other way to tell. Only arm64's bits are known."""
    if architecture_of(profile.target) != "aarch64":
        return None
    import numpy as np
    import tvm
    from tvm.target import Target

    from autocomp.devices.boards import temporary_library

    plain = {"kind": "llvm", "mtriple": profile.target["mtriple"], "mcpu": "generic", "mattr": ["+neon"]}
    executable = tvm.compile(tvm.IRModule({"main": _ask_kernel()}), Target(plain))
    answer = session.array(np.zeros(1, "int64"))
    session.load(temporary_library(executable, plain))["main"](answer)
    word = int(answer.numpy()[0])
    return frozenset(name for name, bit in _BITS.items() if word >> bit & 1)


def _ask_kernel() -> Any:
    from tvm import te, tirx

    word = te.compute(
        (1,), lambda _: tirx.call_extern("int64", "getauxval", tirx.const(_AT_HWCAP, "int64")), name="word"
    )
    return te.create_prim_func([word]).with_attr("global_symbol", "main")


def _number(text: str, scale: float) -> float | None:
    try:
        return float(text) * scale
    except ValueError:
        return None
