"""Cores as data: the files under ``cores/`` say how many instructions start a cycle, on which pipelines, and with what latency.

Facts stand in those files with their sources; this module reads them and finds an instruction's row by its form.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from autocomp.config.versions import current
from autocomp.errors import UsageError, suggest
from autocomp.estimate.instruction import LOAD, LOAD_AND_STORE, STORE, Instruction
from autocomp.hardware.profile import Profile

_CORES = Path(__file__).parent / "cores"
_FORMAT = 1


@dataclass(frozen=True)
class MicroOperation:
    """One micro-operation: the pipelines that can run it as a bit mask, and the cycles it holds one.

    ``address`` marks one that needs only the address of an access and delays no result (the update of a base register).
    """

    pipelines: int
    cycles: int = 1
    address: bool = False


@dataclass(frozen=True)
class Timing:
    """What a row of the table says of an instruction; ``slots`` are the macro-operations it takes at dispatch.

    ``forward`` is how many cycles earlier its accumulator is needed than an operation's result comes; ``known`` is false for
    an instruction without a row.
    """

    latency: int
    operations: tuple[MicroOperation, ...]
    forward: int = 0
    slots: int = 1
    load_latency: int = 0
    eliminated: bool = False
    known: bool = True


@dataclass(frozen=True)
class CacheLevel:
    """A cache: its size and ways, cycles of a load that hits it, bytes a cycle it hands to the level above."""

    name: str
    bytes: int
    ways: int
    latency: int
    bytes_per_cycle: float


@dataclass(frozen=True)
class Queue:
    """An issue queue: the pipelines it feeds, and the micro-operations that wait in it."""

    pipelines: int
    entries: int


@dataclass(frozen=True)
class _Row:
    mnemonic: re.Pattern[str]
    operands: re.Pattern[str] | None
    timing: Timing


@dataclass(frozen=True)
class Core:
    """A processor core: widths, queues, caches, and the table of its instructions (see the files under ``cores/``)."""

    name: str
    isa: str
    description: str
    source: str
    clock_hz: float
    width: int
    window: int
    retire: int
    mispredict: int
    history: int
    store_forward: int
    store_buffer: int
    stores: int
    prefetch: int
    pipelines: tuple[str, ...]
    queues: tuple[Queue, ...]
    load_pipelines: int
    caches: tuple[CacheLevel, ...]
    memory_latency_s: float
    memory_bytes_per_second: float
    call_cycles: int
    unknown: Timing
    rows: tuple[_Row, ...]
    memory_operands: Mapping[str, Any]
    digest: str

    def timing(self, instruction: Instruction) -> Timing:
        """The timing of an instruction, by the first row that matches its form."""
        key = (instruction.form, instruction.access, instruction.written_back >= 0, instruction.eliminated)
        if key not in self._timings:
            self._timings[key] = _timing(self, instruction)
        return self._timings[key]

    @cached_property
    def _timings(self) -> dict[tuple[Any, ...], Timing]:
        return {}

    def adapted(
        self,
        *,
        clock_hz: float | None = None,
        caches: Mapping[str, int] | None = None,
        cache_ways: Mapping[str, int] | None = None,
        memory_bytes_per_second: float | None = None,
    ) -> Core:
        """This core in a given system: its clock, the bytes and ways of its caches by level, its memory bandwidth; None leaves a figure.

        A last level that a profile gives as 0 bytes is left out.
        """
        sizes, ways = caches or {}, cache_ways or {}
        levels = tuple(
            replace(level, bytes=sizes.get(level.name, level.bytes), ways=ways.get(level.name, level.ways))
            for level in self.caches
        )
        changed = replace(
            self,
            clock_hz=clock_hz or self.clock_hz,
            caches=tuple(level for level in levels if level.bytes),
            memory_bytes_per_second=memory_bytes_per_second or self.memory_bytes_per_second,
        )
        facts = [
            changed.clock_hz,
            [(level.bytes, level.ways) for level in changed.caches],
            changed.memory_bytes_per_second,
        ]
        digest = hashlib.sha256(json.dumps([self.digest, facts]).encode()).hexdigest()
        return replace(changed, digest=digest)


def list_cores() -> list[str]:
    """Names of the cores that have a table."""
    return sorted(path.stem for path in _CORES.glob("*.yaml"))


@cache
def load_core(name: str) -> Core:
    """Read a core's file by name. UsageError if there is none, or its file is of a newer version."""
    if name not in list_cores():
        known = list_cores()
        raise UsageError(f"unknown core {name!r}.{suggest(name, known)} Known: {', '.join(known)}")
    text = (_CORES / f"{name}.yaml").read_text()
    facts = current(yaml.safe_load(text), _CORES / f"{name}.yaml", _FORMAT)
    return _core(facts, hashlib.sha256(text.encode()).hexdigest())


def core_of(profile: Profile) -> Core:
    """The core that a profile names, with the profile's clock, caches and memory bandwidth. UsageError if it names none that is known."""
    if not profile.core:
        raise UsageError(
            f"profile {profile.name!r} names no core model to estimate with: add `core:`, one of {', '.join(list_cores())}"
        )
    return load_core(profile.core).adapted(
        clock_hz=profile.clock_hz,
        caches=profile.caches,
        cache_ways=profile.cache_ways,
        memory_bytes_per_second=profile.memory_bandwidth.get("read"),
    )


def _core(facts: Mapping[str, Any], digest: str) -> Core:
    bits = {name: 1 << index for index, name in enumerate(facts["pipelines"])}
    bits |= {name: sum(bits[member] for member in members) for name, members in facts["groups"].items()}

    def operations(names: Sequence[str]) -> tuple[MicroOperation, ...]:
        parts = [str(name).partition("*") for name in names]
        return tuple(MicroOperation(bits[group], int(cycles or 1)) for group, _, cycles in parts)

    def timing(row: Mapping[str, Any], *, known: bool = True) -> Timing:
        return Timing(
            int(row["latency"]),
            operations(row["pipelines"]),
            int(row.get("forward", 0)),
            int(row.get("slots", 1)),
            eliminated=bool(row.get("eliminated", False)),
            known=known,
        )

    rows = tuple(
        _Row(
            re.compile("|".join(f"(?:{pattern})" for pattern in row["match"])),
            re.compile(row["operands"]) if "operands" in row else None,
            timing(row),
        )
        for row in facts["instructions"]
    )
    operands = {
        name: {**entry, "operations": operations(entry["pipelines"])}
        for name, entry in facts.get("memory_operands", {}).items()
    }
    return Core(
        name=facts["name"], isa=facts["isa"], description=facts["description"], source=facts["source"],
        clock_hz=float(facts["clock_hz"]), width=facts["width"], window=facts["window"], retire=facts["retire"],
        mispredict=facts["mispredict"], history=facts["history"], store_forward=facts["store_forward"],
        store_buffer=facts["store_buffer"], stores=facts["stores"], prefetch=facts["prefetch"], pipelines=tuple(facts["pipelines"]),
        queues=tuple(
            Queue(sum(bits[name] for name in queue["pipelines"]), queue["entries"]) for queue in facts["queues"].values()
        ),
        load_pipelines=sum(bits[name] for name in facts["load_pipelines"]),
        caches=tuple(CacheLevel(**level) for level in facts["caches"]),
        memory_latency_s=float(facts["memory"]["latency_s"]),
        memory_bytes_per_second=float(facts["memory"]["bytes_per_second"]),
        call_cycles=facts["call_cycles"], unknown=timing(facts["unknown"], known=False), rows=rows,
        memory_operands=operands, digest=digest,
    )  # fmt: skip


def _timing(core: Core, instruction: Instruction) -> Timing:
    mnemonic, _, operands = instruction.form.partition(" ")
    for row in core.rows:
        if row.mnemonic.fullmatch(mnemonic) and (row.operands is None or row.operands.fullmatch(operands)):
            return _with_memory(core, row.timing, instruction)
    return _with_memory(core, core.unknown, instruction)


def _with_memory(core: Core, timing: Timing, instruction: Instruction) -> Timing:
    """Add what an access costs beside the row: on AArch64 an updated base, on x86-64 the operand in memory itself."""
    if core.isa == "arm64":
        integer = core.queues[0].pipelines & ~1  # but for that of branches, which is the first
        operations = list(timing.operations)
        if instruction.access == LOAD:  # an integer operation of a load shifts its index
            operations = [replace(op, address=not op.pipelines & ~integer) for op in operations]
            timing = replace(timing, load_latency=timing.latency, latency=0)
        if instruction.written_back >= 0:
            operations.append(MicroOperation(integer, address=True))
            timing = replace(timing, slots=timing.slots + 1)
        return replace(timing, operations=tuple(operations))
    if instruction.eliminated:
        return replace(timing, operations=(), latency=0)
    if not instruction.access:
        return timing
    vector = any(40 <= register < 88 for register in (*instruction.reads, *instruction.writes))
    wide = "zmm" in instruction.form
    added: list[MicroOperation] = []
    load_latency = 0
    if instruction.access in (LOAD, LOAD_AND_STORE):
        entry = core.memory_operands["load_512" if wide else "load_vector" if vector else "load"]
        added += entry["operations"]
        load_latency = entry["latency"]
    if instruction.access in (STORE, LOAD_AND_STORE):
        added += core.memory_operands["store_512" if wide else "store_vector" if vector else "store"]["operations"]
    return replace(timing, operations=(*added, *timing.operations), load_latency=load_latency)
