"""What this machine's processor is: vendor, instruction sets, caches, memory. Linux on x86-64."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from autocomp.errors import UsageError
from autocomp.processes.quiet import quiet_stderr

# Dot products of bytes: AVX-512 VNNI, AVX-VNNI (u8 x s8), Armv8.2 SDOT (s8 x s8, 4 lanes of 4), or widened products.
Int8 = Literal["vnni512", "vnni256", "sdot", "none"]

# The levels of the x86-64 psABI, as /proc/cpuinfo spells their flags ("abm" stands for lzcnt, "pni" for SSE3).
# Source: https://gitlab.com/x86-psABIs/x86-64-ABI, section "Micro-Architecture Levels".
_V2 = {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS = {"x86-64-v4": _V4, "x86-64-v3": _V3, "x86-64-v2": _V2, "x86-64": set[str]()}

# Instruction sets a compiler may use of itself, as cpuinfo and as LLVM spell them.
FEATURES = {
    "sse4_2": "sse4.2",
    "avx": "avx",
    "avx2": "avx2",
    "bmi1": "bmi",
    "bmi2": "bmi2",
    "f16c": "f16c",
    "fma": "fma",
    "abm": "lzcnt",
    "movbe": "movbe",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni",
    "avx_vnni": "avxvnni",
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx_vnni_int8": "avxvnniint8",
    "gfni": "gfni",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "amx_tile": "amx-tile",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
}
MATRIX = (
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)  # of FEATURES: registers of 16 rows, and their products of bytes and of 16 bits
ASK_FOR_MATRIX = (158, 0x1023, 18)  # a system call: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


@dataclass(frozen=True)
class Cpu:
    """A processor as /proc/cpuinfo describes it."""

    model: str
    flags: frozenset[str]

    @property
    def level(self) -> str:
        """The highest x86-64 level whose every instruction set is there."""
        return next(name for name, needed in LEVELS.items() if needed <= self.flags)

    @property
    def lanes(self) -> int:
        """Float32 lanes of the widest vector register: 16, 8 or 4."""
        return {"x86-64-v4": 16, "x86-64-v3": 8}.get(self.level, 4)

    @property
    def vector_registers(self) -> int:
        return 32 if self.level == "x86-64-v4" else 16

    @property
    def int8(self) -> Int8:
        """The dot-product instruction for bytes: VNNI on 512-bit registers, on 256-bit ones, or none."""
        if self.level == "x86-64-v4" and "avx512_vnni" in self.flags:
            return "vnni512"
        return "vnni256" if self.level in ("x86-64-v3", "x86-64-v4") and "avx_vnni" in self.flags else "none"


def parse_cpuinfo(text: str) -> Cpu:
    """Read the first processor of a /proc/cpuinfo; UsageError if it is none of x86-64."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    flags = frozenset(fields.get("flags", "").split())
    if "lm" not in flags:  # "long mode": 64 bits
        raise UsageError("profile x86-host needs a processor of the x86-64 family; this machine has another")
    return Cpu(fields.get("model name", "unknown"), flags)


@lru_cache(maxsize=1)
def this_cpu() -> Cpu:
    """Return this machine's processor; UsageError where there is no /proc/cpuinfo (not Linux) or it is not x86-64."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        raise UsageError("measuring on this machine needs Linux: /proc/cpuinfo cannot be read") from None
    cpu = parse_cpuinfo(text)
    if set(MATRIX) <= cpu.flags and _lends_matrix_registers():
        return cpu
    return replace(cpu, flags=cpu.flags - set(MATRIX))


def _lends_matrix_registers() -> bool:
    """Whether the system lets a process use them: it must be asked (Linux, Documentation/arch/x86/xstate.rst)."""
    return bool(ctypes.CDLL(None).syscall(*(ctypes.c_long(value) for value in ASK_FOR_MATRIX)) == 0)


@lru_cache(maxsize=1)
def detect_target() -> dict[str, Any]:
    """Return TVM's target for this machine.

    LLVM's name of the processor carries its scheduling model, so it is taken where it tells the truth, with the instruction
    sets beyond it. A virtual machine may hide instruction sets that the name implies, and an LLVM older than the processor
    has no name for it: then the target is the generic level, and the instruction sets beyond it by name.
    """
    from tvm.target.codegen import llvm_get_system_cpu

    cpu = this_cpu()
    name = str(llvm_get_system_cpu())
    named: dict[str, Any] = {"kind": "llvm", "mcpu": name}
    if name not in ("", "generic", "x86-64") and not missing(named, cpu):
        beyond = [f"+{set_}" for flag, set_ in FEATURES.items() if flag in cpu.flags and not has_feature(named, set_)]
        return _in_whole_vectors({**named, **({"mattr": beyond} if beyond else {})})
    return _in_whole_vectors(generic_target(cpu))


def _in_whole_vectors(target: dict[str, Any]) -> dict[str, Any]:
    """The target without LLVM's preference for half of a 512-bit register, which it has for some processors.

    It is meant for code with few wide instructions, which would slow the clock down; our products are wide ones anyway. Softmax takes half
    the time without it.
    """
    narrow = "prefer-256-bit"
    return {**target, "mattr": [*target.get("mattr", ()), f"-{narrow}"]} if has_feature(target, narrow) else target


def generic_target(cpu: Cpu) -> dict[str, Any]:
    """Return the target that states a processor's instruction sets one by one, over its x86-64 level."""
    extra = [f"+{FEATURES[flag]}" for flag in sorted(FEATURES) if flag in cpu.flags - LEVELS[cpu.level]]
    # Below AVX-512's level its single sets cannot be used: they need the wide registers.
    usable = [name for name in extra if cpu.level == "x86-64-v4" or not name.startswith("+avx512")]
    return {"kind": "llvm", "mcpu": cpu.level, **({"mattr": usable} if usable else {})}


def missing(target: Mapping[str, Any], cpu: Cpu) -> list[str]:
    """Return the instruction sets (cpuinfo's names) that code for ``target`` may use and ``cpu`` lacks."""
    from tvm.target import Target
    from tvm.target.codegen import target_has_features

    compiled = Target(dict(target))
    return [flag for flag, name in FEATURES.items() if flag not in cpu.flags and target_has_features(name, compiled)]


def has_feature(target: Mapping[str, Any], name: str) -> bool:
    """Whether code for a target may use an instruction set of LLVM's (``dotprod``, ``fullfp16``)."""
    from tvm.target import Target
    from tvm.target.codegen import target_has_features

    return bool(target_has_features(name, Target(dict(target))))


def unknown_features(target: Mapping[str, Any]) -> list[str]:
    """Return the features (``+dotprod``) of a target that LLVM does not know, and would only print a line about."""
    from tvm.target import Target
    from tvm.target.codegen import target_has_features

    features = target.get("mattr", ())
    with quiet_stderr():
        return [
            feature
            for feature in features
            if not target_has_features(feature[1:], Target({**target, "mattr": [f"+{feature[1:]}"]}))
        ]


def is_known_cpu(target: Mapping[str, Any]) -> bool:
    """Whether LLVM knows the processor a target names; if not, it would compile for a baseline one and only log it."""
    from tvm.target.codegen import llvm_get_system_triple, llvm_is_valid_cpu

    if target.get("kind") != "llvm" or "mcpu" not in target:
        return True
    with quiet_stderr():
        return bool(llvm_is_valid_cpu(str(target["mcpu"]), str(target.get("mtriple") or llvm_get_system_triple())))


def cache_sizes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Return bytes of the first core's caches (``l1d``, ``l1i``, ``l2``, ``l3``) as far as the system tells."""
    sizes = {}
    for folder in sorted(root.glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        sizes[f"l{level}{suffix}"] = int(size.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1], 1)
    return sizes


def memory_bytes() -> int | None:
    """Return the machine's memory in bytes, None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def clock_hz() -> float | None:
    """Return the first core's highest clock in Hz, None where the system does not tell (virtual machines)."""
    try:
        return float(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()) * 1e3
    except (OSError, ValueError):
        return None
