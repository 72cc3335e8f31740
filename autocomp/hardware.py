"""Hardware profiles: what a target is, which instructions it has, and how it is reached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from autocomp import host
from autocomp.config import read_mapping, validated
from autocomp.errors import UsageError, suggest
from autocomp.host import Int8
from autocomp.records import Precision
from autocomp.resources import shipped_files

Reach = Literal["local", "rpc", "estimate"]
# What a profile with `target: detect` finds out by itself; all of it must be written down with a fixed target.
_ISA_KEYS = ("lanes", "vector_registers", "precisions", "int8")


@dataclass(frozen=True)
class Profile:
    """A target of compilation and measurement.

    ``target`` is TVM's target as a dict; ``lanes`` the float32 lanes of a vector register; ``precisions`` those with
    kernels; ``int8`` the byte dot-product instruction (``none``: widened products, slower); ``cores`` the threads a run
    uses; ``caches`` bytes by level; ``device`` the processor's name where the machine itself tells it.
    """

    name: str
    description: str
    target: Mapping[str, Any]
    how: Reach
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

    @property
    def fingerprint(self) -> str:
        """Ten hex digits of what kernels and their times depend on: target, instructions, cores, device; no names."""
        identity = [dict(self.target), self.lanes, self.vector_registers, self.int8, self.cores, self.how, self.device]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


class ProfileFile(BaseModel):
    """A profile as its YAML file states it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    format_version: Literal[1]
    name: str = Field(min_length=1)
    description: str = ""
    how: Reach
    target: Any = Field(description="`detect` (this machine), or TVM's target as keys and values")
    lanes: int | None = Field(None, ge=1, le=64, description="float32 lanes of a vector register")
    vector_registers: int | None = Field(None, ge=8, le=64)
    precisions: list[Precision] | None = Field(None, min_length=1, description="precisions with kernels")
    int8: Int8 | None = Field(None, description="byte dot-product instruction; none: widened products")
    cores: int = Field(1, ge=1, description="threads one inference uses")
    clock_hz: float | None = Field(None, gt=0)
    caches: dict[str, int] = Field(default_factory=dict, description="bytes by level: l1d, l1i, l2, l3")
    memory_bytes: int | None = Field(None, gt=0)
    source: str = Field("", description="where the figures come from")

    @field_validator("target")
    @classmethod
    def _target_is_detect_or_dict(cls, value: Any) -> Any:
        if value != "detect" and not (isinstance(value, dict) and isinstance(value.get("kind"), str)):
            raise ValueError("must be `detect`, or TVM's target with its kind ({kind: llvm, mcpu: ...})")
        return value

    @model_validator(mode="after")
    def _isa_is_complete(self) -> ProfileFile:
        given = [key for key in _ISA_KEYS if getattr(self, key) is not None]
        if self.target == "detect" and self.how != "local":
            raise ValueError(f"must have how: local where the target is `detect`, got how: {self.how}")
        if self.target == "detect" and given:
            raise ValueError(f"must leave out {', '.join(given)} where the target is `detect`: they are detected too")
        if self.target != "detect" and len(given) < len(_ISA_KEYS):
            lacking = [key for key in _ISA_KEYS if key not in given]
            raise ValueError(f"must state {', '.join(lacking)}, as the target is not `detect`")
        return self


def list_profiles() -> list[str]:
    """Return the names of the profiles that come with autocomp."""
    return list(shipped_files("hardware_profiles"))


def load_profile(name_or_path: str | Path) -> Profile:
    """Load a profile by name, or from a YAML file given by its path, and complete it with what this machine tells.

    UsageError if there is no such profile, its file is wrong (file, key, rule, value), or it is local and this machine
    lacks an instruction set that code for it would use.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(text)
    else:
        shipped = shipped_files("hardware_profiles")
        if text not in shipped:
            raise UsageError(
                f"unknown hardware profile {text!r}.{suggest(text, shipped)} Known: {', '.join(shipped)}; "
                "your own is given by the path of its YAML file"
            )
        path = shipped[text]
    stated = validated(ProfileFile, read_mapping(path), f"{path}: ")
    if stated.target != "detect" and not host.is_known_cpu(stated.target):
        raise UsageError(f"{path}: target.mcpu: LLVM knows no processor {stated.target['mcpu']!r}")
    return _on_this_machine(stated) if stated.how == "local" else _as_stated(stated, dict(stated.target))


def profile_schema() -> dict[str, Any]:
    """Return the JSON schema of a profile file."""
    return ProfileFile.model_json_schema()


def _on_this_machine(stated: ProfileFile) -> Profile:
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
    machine |= {
        "lanes": cpu.lanes,
        "vector_registers": cpu.vector_registers,
        # Eight-bit kernels widen with AVX2's instructions at least.
        "precisions": ("fp32", "w8a8") if cpu.lanes >= 8 else ("fp32",),
        "int8": cpu.int8,
    }
    return _as_stated(stated, host.detect_target(), **machine)


def _as_stated(stated: ProfileFile, target: dict[str, Any], **found: Any) -> Profile:
    fields = stated.model_dump(exclude={"format_version", "target"}) | found
    fields["precisions"] = tuple(fields["precisions"])
    return Profile(target={"num-cores": stated.cores, **target}, **fields)
