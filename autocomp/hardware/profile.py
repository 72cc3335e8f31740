"""Hardware profiles: what a target is, which instructions it has, and how it is reached."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from autocomp.config.files import read_mapping, validated
from autocomp.config.goals import LONGEST
from autocomp.config.shipped import shipped_files
from autocomp.config.versions import current_by_hand
from autocomp.errors import UsageError, shown, suggest
from autocomp.hardware import host
from autocomp.hardware.host import Int8
from autocomp.hardware.link import architecture_of, this_architecture
from autocomp.records.precisions import FORMATS, Format, Precision

FORMAT_VERSION = 1
Reach = Literal["local", "rpc", "estimate"]
# What a profile with `target: detect` finds out by itself; all of it must be written down with a fixed target.
_ISA_KEYS = ("lanes", "vector_registers", "precisions", "int8")
CacheLevel = Literal["l1d", "l1i", "l2", "l3"]
_CORES = Path(__file__).parent.parent / "estimate" / "cores"
LINE = 64  # bytes of a cache line, on x86-64 and on every Cortex-A
# What LLVM must know of a processor for a dot product; what precisions need is in their table, and all else runs on the bare architecture.
DOTS: Mapping[Int8, str] = {"sdot": "dotprod", "vnni512": "avx512vnni", "vnni256": "avxvnni"}
# What of TVM's target a profile may state; the threads are `cores`.
_TARGET_KEYS = ("kind", "mtriple", "mcpu", "mattr", "mabi", "mfloat-abi", "num-cores")


@dataclass(frozen=True)
class Rpc:
    """Where boards are lent: a TVM RPC tracker (``host:port``), and the key under which boards of this kind register."""

    tracker: str
    key: str

    @property
    def address(self) -> tuple[str, int]:
        host_name, _, port = self.tracker.rpartition(":")
        return host_name, int(port)


@dataclass(frozen=True)
class Profile:
    """A target of compilation and measurement.

    ``target`` is TVM's target as a dict; ``lanes`` the float32 lanes of a vector register; ``precisions`` those with
    kernels; ``int8`` the byte dot-product instruction (``none``: widened products, slower); ``cores`` the threads a run
    uses; ``caches`` bytes and ``cache_ways`` the associativity by level; ``memory_bandwidth`` bytes a second that one core
    reads or copies; ``power`` watts of the whole board, idle and with so many ``cores`` busy; ``device`` the processor's name where the machine
    itself tells it.
    ``core`` names the core model of an estimate, ``rpc`` says where a board is lent.
    """

    name: str
    description: str
    target: Mapping[str, Any]
    reach: Reach
    lanes: int
    vector_registers: int
    precisions: tuple[Precision, ...]
    int8: Int8
    cores: int = 1
    clock_hz: float | None = None
    caches: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: int | None = None
    source: str = ""
    device: str = ""
    cache_ways: Mapping[str, int] = field(default_factory=dict)
    memory_bandwidth: Mapping[str, float] = field(default_factory=dict)
    power: Mapping[str, float] = field(default_factory=dict)
    core: str = ""
    rpc: Rpc | None = None

    @property
    def matrix(self) -> bool:
        """Whether the target states that it multiplies bytes in matrix registers (`kernels.matrix`)."""
        return {f"+{host.FEATURES[flag]}" for flag in host.MATRIX} <= set(self.target.get("mattr", ()))

    @property
    def watts(self) -> float | None:
        """What one inference draws above the idle board, its cores' share of what all draw when busy; None where ``power`` does not say.

        At a fixed clock energy follows time: what is computed makes little difference beside that.
        """
        if not {"idle", "load"} <= {*self.power}:
            return None
        busy = max(self.power.get("cores", 1), self.cores)
        return max(self.power["load"] - self.power["idle"], 0.0) * self.cores / busy

    @property
    def fingerprint(self) -> str:
        """Ten hex digits of what kernels and their times depend on: target, instructions, cores, device; no names.

        Of an estimate also the core model and the figures it reckons with; of boards the key they share.
        """
        identity: list[Any] = [dict(self.target), self.lanes, self.vector_registers, self.int8, self.cores, self.reach]
        identity.append(self.device)
        if self.reach == "estimate":
            figures = (self.caches, self.cache_ways, self.memory_bandwidth)
            identity += [self.core, self.clock_hz, *map(dict, figures)]
        elif self.reach == "rpc" and self.rpc:
            identity.append(self.rpc.key)
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def features_of(precision: Precision, int8: Int8, architecture: str) -> set[str]:
    """LLVM's names of the instruction sets that the kernels of a precision need, ``int8`` being the dot product they are built on."""
    form = FORMATS[precision]
    return {
        name for name in (form.needs(architecture), DOTS.get(int8, "") if form.family.arithmetic.dot else "") if name
    }


def is_address(text: str) -> bool:
    """Whether a text is ``host:port`` of something on a network."""
    found = re.fullmatch(r"([\w.-]{1,253}|\[[0-9a-fA-F:.]{2,45}\]):([0-9]{1,5})", text, re.ASCII)
    return found is not None and 0 < int(found[2]) < 2**16


def is_board_key(text: str) -> bool:
    """Whether a text may name a kind of board: a word that no shell and no YAML reads otherwise."""
    return re.fullmatch(r"[\w.-]{1,64}", text, re.ASCII) is not None


class RpcFile(BaseModel):
    """The ``rpc`` entry of a profile file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tracker: str = Field(description="host:port of the TVM RPC tracker")
    key: str = Field(min_length=1, description="key under which the boards register")

    @field_validator("tracker")
    @classmethod
    def _tracker_is_address(cls, value: str) -> str:
        if not is_address(value):
            raise ValueError("must be host:port (192.168.1.10:9190)")
        return value

    @field_validator("key")
    @classmethod
    def _key_is_a_word(cls, value: str) -> str:
        if not is_board_key(value):
            raise ValueError("must be letters, digits and . _ - (pi5), 64 at most")
        return value


class PowerFile(BaseModel):
    """The ``power`` entry of a profile file: watts of the whole board."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    idle: float | None = Field(None, gt=0, le=1000, description="watts with nothing to do")
    load: float | None = Field(None, gt=0, le=1000, description="watts with so many cores busy")
    cores: int | None = Field(None, ge=1, le=1024, description="how many that was; one unless given")


class BandwidthFile(BaseModel):
    """The ``memory_bandwidth`` entry of a profile file: what one core reaches in main memory, in bytes a second."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    read: float | None = Field(None, ge=1e6, le=1e13, description="bytes read")
    copy_: float | None = Field(None, ge=1e6, le=1e13, alias="copy", description="bytes copied, each counted once")


class ProfileFile(BaseModel):
    """A profile as its YAML file states it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    format_version: Literal[1]
    name: str = Field(min_length=1, max_length=100, description="by which reports and files call it")
    description: str = Field("", max_length=1000, description="a line for `autocomp profiles`")
    reach: Reach = Field(description="timed on this machine, on a board, or by a model of the core")
    target: Any = Field(description="`detect` (this machine), or TVM's target as keys and values")
    lanes: int | None = Field(None, ge=1, le=64, description="float32 lanes of a vector register")
    vector_registers: int | None = Field(None, ge=8, le=64, description="vector registers of a core")
    precisions: list[Precision] | None = Field(None, min_length=1, description="precisions with kernels")
    int8: Int8 | None = Field(None, description="byte dot-product instruction; none: widened products")
    cores: int = Field(1, ge=1, le=1024, description="threads one inference uses")
    clock_hz: float | None = Field(None, ge=1e6, le=1e11, description="in Hz: 2.4e+9")
    caches: dict[CacheLevel, int] = Field(default_factory=dict, description="bytes by level: l1d, l1i, l2, l3")
    cache_ways: dict[CacheLevel, int] = Field(default_factory=dict, description="associativity by level")
    memory_bytes: int | None = Field(None, gt=0, le=2**50, description="main memory, in bytes")
    memory_bandwidth: BandwidthFile | None = Field(None, description="bytes a second of one core: read, copy")
    power: PowerFile | None = Field(None, description="watts of the whole board: idle, load; cores")
    core: str | None = Field(None, min_length=1, description="core model of an estimate")
    rpc: RpcFile | None = Field(None, description="tracker and key of the boards")
    source: str = Field("", description="where the figures come from")

    @field_validator("target")
    @classmethod
    def _target_is_detect_or_dict(cls, value: Any) -> Any:
        if value == "detect":
            return value
        if not (isinstance(value, dict) and isinstance(value.get("kind"), str)):
            raise ValueError("must be `detect`, or TVM's target with its kind ({kind: llvm, mcpu: ...})")
        if value["kind"] != "llvm":
            raise ValueError(
                f"must have kind: llvm, as kernels are made for processors alone, got {shown(value['kind'])}"
            )
        for key, option in value.items():
            if key not in _TARGET_KEYS:
                known = ", ".join(_TARGET_KEYS)
                raise ValueError(f"must have no key {shown(key)}.{suggest(str(key), _TARGET_KEYS)} Known keys: {known}")
            if key == "mattr":
                if not (isinstance(option, list) and all(isinstance(f, str) and f[:1] in ("+", "-") for f in option)):
                    raise ValueError(
                        f"must have mattr as a list of features, each with its sign ([+dotprod]), got {shown(option)}"
                    )
            elif key != "num-cores" and not (
                isinstance(option, str) and option.isprintable() and 0 < len(option) < 100
            ):
                raise ValueError(f"must have {key} as a short text, got {shown(option)}")
        return value

    @field_validator("lanes")
    @classmethod
    def _lanes_are_a_power_of_two(cls, value: int | None) -> int | None:
        if value and value & (value - 1):
            raise ValueError("must be a power of two")
        return value

    @field_validator("caches")
    @classmethod
    def _caches_hold_lines(cls, value: dict[CacheLevel, int]) -> dict[CacheLevel, int]:
        for level, size in value.items():
            if not 0 < size <= 2**40 or size % LINE:
                raise ValueError(f"must be bytes, whole lines of {LINE}: {level} is {size}")
        return value

    @model_validator(mode="after")
    def _caches_have_their_ways(self) -> ProfileFile:
        for level, ways in self.cache_ways.items():
            size = self.caches.get(level)
            if size is None:
                raise ValueError(f"must state caches.{level} where cache_ways.{level} is stated")
            if ways < 1 or size % (LINE * ways):
                raise ValueError(f"must have a cache_ways.{level} that divides its {size // LINE} lines, got {ways}")
        return self

    @model_validator(mode="after")
    def _reach_is_complete(self) -> ProfileFile:
        if self.reach == "rpc" and self.rpc is None:
            raise ValueError("must state rpc ({tracker: host:port, key: ...}) where reach is rpc")
        if self.reach == "local" and self.rpc is not None:
            raise ValueError("must leave out rpc where reach is local")
        if self.reach == "estimate":
            # The model counts cycles: without a clock, cache sizes and a bandwidth it cannot say seconds.
            lacking = [key for key in ("core", "clock_hz") if getattr(self, key) is None]
            lacking += [f"caches.{level}" for level in ("l1d", "l2") if level not in self.caches]
            if lacking:
                raise ValueError(f"must state {', '.join(lacking)} where reach is estimate")
        return self

    @model_validator(mode="after")
    def _cores_are_told_once(self) -> ProfileFile:
        stated = self.target.get("num-cores", self.cores) if isinstance(self.target, dict) else self.cores
        if stated != self.cores:
            raise ValueError(f"must have the same cores and target.num-cores, got {self.cores} and {shown(stated)}")
        return self

    @model_validator(mode="after")
    def _isa_is_complete(self) -> ProfileFile:
        given = [key for key in _ISA_KEYS if getattr(self, key) is not None]
        if self.target == "detect" and self.reach != "local":
            raise ValueError(f"must have reach: local where the target is `detect`, got reach: {self.reach}")
        if self.target == "detect" and given:
            raise ValueError(f"must leave out {', '.join(given)} where the target is `detect`: they are detected too")
        if self.target != "detect" and len(given) < len(_ISA_KEYS):
            lacking = [key for key in _ISA_KEYS if key not in given]
            raise ValueError(f"must state {', '.join(lacking)}, as the target is not `detect`")
        return self


def list_profiles() -> list[str]:
    """Return the names of the profiles that come with autocomp.

    Examples:
        >>> list_profiles()
        ['cortex-a76', 'rk3588', 'x86-64-v3', 'x86-host']
    """
    return list(shipped_files("hardware_profiles"))


def load_profile(name_or_path: str | Path) -> Profile:
    """Load a profile by name, or from a YAML file given by its path, and complete it with what this machine tells.

    Raises:
        UsageError: There is no such profile; its file is wrong (file, key, rule, value); or it is local, and this machine lacks an instruction
            set that code for it would use.

    Examples:
        >>> profile = load_profile("cortex-a76")
        >>> profile.reach, profile.lanes, profile.clock_hz
        ('estimate', 4, 2400000000.0)
    """
    text = str(name_or_path)
    if not text.isprintable() or len(text) > LONGEST:
        raise UsageError(f"a hardware profile is named by one line of at most {LONGEST} characters, got {shown(text)}")
    if text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(text)
    else:
        shipped = shipped_files("hardware_profiles")
        if text not in shipped:
            raise UsageError(
                f"unknown hardware profile {shown(text)}.{suggest(text, shipped)} Known: {', '.join(shipped)}; "
                "your own is given by the path of its YAML file"
            )
        path = shipped[text]
    data = current_by_hand(read_mapping(path), path, FORMAT_VERSION)
    if "how" in data and "reach" not in data:  # its name of version 0.2 and before
        data["reach"] = data.pop("how")
    stated = validated(ProfileFile, data, f"{path}: ")
    if stated.target != "detect" and not host.is_known_cpu(stated.target):
        triple = f" of {stated.target['mtriple']!r}" if "mtriple" in stated.target else ""
        raise UsageError(f"{path}: target.mcpu: LLVM knows no processor {stated.target['mcpu']!r}{triple}")
    if stated.target != "detect":
        _check_instructions(stated, path)
    cores = [file.stem for file in sorted(_CORES.glob("*.yaml"))]
    if stated.core is not None and stated.core not in cores:
        raise UsageError(
            f"{path}: core: there is no core model {shown(stated.core)}.{suggest(stated.core, cores)} Known: {', '.join(cores)}"
        )
    return _on_this_machine(stated) if stated.reach == "local" else _as_stated(stated, dict(stated.target))


def profile_schema() -> dict[str, Any]:
    """Return the JSON schema of a profile file."""
    return ProfileFile.model_json_schema()


def _check_instructions(stated: ProfileFile, path: Path) -> None:
    """Refuse features that LLVM does not know, and precisions whose instructions the stated processor lacks: the code would die at its first
    run."""
    for feature in host.unknown_features(stated.target):
        raise UsageError(f"{path}: target.mattr: LLVM knows no feature {feature!r} of this processor")
    asked: list[tuple[str, str, str]] = []
    if stated.int8 is not None:
        asked.append(("int8", stated.int8, DOTS.get(stated.int8, "")))
    architecture = architecture_of(stated.target)
    asked += [("precisions", name, FORMATS[name].needs(architecture)) for name in stated.precisions or ()]
    for key, value, needed in asked:
        if needed and not host.has_feature(stated.target, needed):
            raise UsageError(
                f"{path}: {key}: {value} needs the instruction set {needed}, which target.mcpu "
                f"{stated.target.get('mcpu', 'generic')!r} lacks: leave it out, or add +{needed} to target.mattr"
            )


def _on_this_machine(stated: ProfileFile) -> Profile:
    if stated.target != "detect" and (wanted := architecture_of(stated.target)) != this_architecture():
        raise UsageError(
            f"profile {stated.name!r} is measured on this machine, but its target is of {wanted}, this machine is of {this_architecture()}: "
            "state reach: estimate or reach: rpc"
        )
    there = os.cpu_count() or 1
    if stated.cores > there:
        raise UsageError(f"profile {stated.name!r} asks for {stated.cores} cores of this machine, which has {there}")
    cpu = host.this_cpu()
    machine: dict[str, Any] = {
        "caches": stated.caches or host.cache_sizes(),
        "memory_bytes": stated.memory_bytes or host.memory_bytes(),
        "clock_hz": stated.clock_hz or host.clock_hz(),
        "device": cpu.model,
    }
    if stated.target != "detect":
        if lacking := host.missing(stated.target, cpu):
            raise UsageError(
                f"profile {stated.name!r} is measured on this machine, but its processor ({cpu.model}) lacks "
                f"{', '.join(lacking)}: choose another profile"
            )
        return _as_stated(stated, dict(stated.target), **machine)
    target = host.detect_target()

    def offered(form: Format) -> bool:
        needed = form.needs(this_architecture())
        return 0 < form.family.detected <= cpu.lanes and (not needed or host.has_feature(target, needed))

    machine |= {
        "lanes": cpu.lanes,
        "vector_registers": cpu.vector_registers,
        "precisions": tuple(name for name, form in FORMATS.items() if offered(form)),
        "int8": cpu.int8,
    }
    return _as_stated(stated, target, **machine)


def _as_stated(stated: ProfileFile, target: dict[str, Any], **found: Any) -> Profile:
    fields = stated.model_dump(exclude={"format_version", "target"}, by_alias=True) | found
    fields["precisions"] = tuple(fields["precisions"])
    fields["core"] = fields["core"] or ""
    fields["rpc"] = Rpc(**fields["rpc"]) if fields["rpc"] else None
    for key in ("memory_bandwidth", "power"):
        fields[key] = {name: value for name, value in (fields[key] or {}).items() if value is not None}
    return Profile(target={"num-cores": stated.cores, **target}, **fields)
