"""The estimate of one kernel: count its blocks, trace parts of its run, time those on the core's model, scale by the counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from autocomp.cache import cache_dir, write_atomically
from autocomp.errors import ObjectError
from autocomp.estimate import hooks
from autocomp.estimate.core import simulate
from autocomp.estimate.decode import decode
from autocomp.estimate.emulator import Counts, Tensor, count_blocks, trace_windows
from autocomp.estimate.instruction import Instruction
from autocomp.estimate.instructions import Core
from autocomp.estimate.objects import BASE, Image, load_image

VERSION = 2  # raise when a change makes stored estimates worth making again

# In instructions, as 4 bytes of code each. Kernels up to _WHOLE are traced whole; of longer ones the start and a few windows
# further on, of which a first part only fills the caches.
_WHOLE = 1_500_000
_START = 600_000
_WINDOW, _FILLING = 250_000, 60_000
_SPREAD = (0.3, 0.6, 0.9)  # where in the run the windows lie
_EXTRA_WINDOWS = 3  # for blocks that ran in none of those
_SHARE = 0.002  # of the run: a block that takes less is charged the average of the others
_LIMIT = 1 << 36  # bytes of code: a kernel that runs longer takes more than 20 seconds to count


@dataclass(frozen=True)
class KernelEstimate:
    """What a kernel is estimated to take on a core.

    ``sampled`` is the share of the executed instructions that the core's model has seen run; the others are charged the
    average. ``unknown_share`` is the share without a row in the core's table, ``unknown`` names them; each call of the C library
    (``calls``) counts as as many instructions as the cycles it is charged.
    """

    core: str
    clock_hz: float
    cycles: float
    instructions: int
    sampled: float
    unknown_share: float
    unknown: tuple[str, ...] = ()
    calls: int = 0
    misses: tuple[int, ...] = ()  # by cache level, in what was simulated
    mispredicts: int = 0

    @property
    def seconds(self) -> float:
        return self.cycles / self.clock_hz


def estimate_kernel(
    object_bytes: bytes, tensors: Sequence[tuple[str, Sequence[int]]], core: Core, *, store: bool = True
) -> KernelEstimate:
    """Estimate the cycles of a kernel called again and again with tensors of these dtypes and shapes, from its object file.

    Equal arguments give equal results; they are kept on disk unless ``store`` is false. ObjectError if the object holds what is
    unknown, or the kernel fails.
    """
    shaped = [(str(dtype), tuple(int(size) for size in shape)) for dtype, shape in tensors]
    path = _path(object_bytes, shaped, core)
    if store and (kept := _kept(path)):
        return kept
    image = load_image(object_bytes)
    if image.isa != core.isa:
        raise ObjectError(f"the object is {image.isa} code, the core {core.name} runs {core.isa}")
    estimate = _estimate(image, shaped, core)
    if store:
        write_atomically(path, json.dumps(asdict(estimate)).encode())
    return estimate


def _estimate(image: Image, tensors: Sequence[Tensor], core: Core) -> KernelEstimate:
    counts = count_blocks(image, tensors, _LIMIT)
    code = _Code(image, counts)
    parts, ranges = trace_windows(image, tensors, _windows(counts), _capacity(counts))
    trace = np.concatenate([code.match(part, filling=index > 0) for index, part in enumerate(parts)])
    result = simulate(trace, code.instructions, core, ranges, repeated=len(parts) == 1)
    seen = result.executions > 0
    total = int(code.executions.sum())
    sampled = int(code.executions[seen].sum())
    cycles = float((code.executions[seen] * (result.instruction_cycles[seen] / result.executions[seen])).sum())
    cycles *= total / max(sampled, 1)
    called = {name: calls for name, at in image.externals.items() if (calls := code.executions_at(at))}
    calls = sum(called.values())
    unknown = {
        instruction.text.split()[0]: 0 for instruction in code.instructions if not core.timing(instruction).known
    }
    strange = sum(
        int(ran)
        for instruction, ran in zip(code.instructions, code.executions, strict=True)
        if not core.timing(instruction).known
    )
    charged = calls * core.call_cycles
    return KernelEstimate(
        core.name, core.clock_hz, cycles + charged, total, sampled / max(total, 1), (strange + charged) / (total + charged),
        tuple(sorted([*unknown, *called])), calls, result.misses, result.mispredicts,
    )  # fmt: skip


class _Code:
    """The instructions of the blocks that ran, numbered by address, and how often each did."""

    def __init__(self, image: Image, counts: Counts) -> None:
        span = image.code_end - BASE
        self.number_at = np.full(span, -1, np.int64)
        found: dict[int, Instruction] = {}
        for start, size in zip(counts.starts.tolist(), counts.sizes.tolist(), strict=True):
            if start in found and start + size - found[start].length in found:
                continue
            for instruction in decode(image.isa, image.data[start : start + size], BASE + start):
                found[instruction.address - BASE] = instruction
        offsets = sorted(found)
        self.instructions = [found[offset] for offset in offsets]
        self.number_at[offsets] = np.arange(len(offsets))
        self.length = np.array([instruction.length for instruction in self.instructions], np.int64)
        self.accessed = np.array([instruction.emulated for instruction in self.instructions], np.int64)
        change = np.zeros(span + 1, np.int64)  # executions begin and end with blocks
        np.add.at(change, counts.starts, counts.counts)
        np.add.at(change, counts.starts + counts.sizes, -counts.counts)
        self.executions = np.cumsum(change)[offsets]

    def executions_at(self, address: int) -> int:
        number = self.number_at[address - BASE]
        return int(self.executions[number]) if number >= 0 else 0

    def match(self, records: np.ndarray, *, filling: bool) -> np.ndarray:
        """A window's records as rows (instruction, address, attributed); the first of a later window only fill the caches."""
        blocks = (records[records < 0] >> hooks.SIZE_SHIFT) & 0x7FFF
        rows = np.empty((int(blocks.sum()) // int(self.length.min()) + 1, 3), np.int64)
        rows = rows[: hooks.match_accesses(records, BASE, self.number_at, self.length, self.accessed, rows)]
        if filling:
            rows[: min(_FILLING, len(rows) // 4), 2] = 0
        return rows


def _windows(counts: Counts) -> list[tuple[int, int]]:
    """Parts of the run to trace, in bytes of code executed."""
    executed = counts.executed
    if executed <= 4 * _WHOLE:
        return [(0, executed + 1)]
    windows = [(0, 4 * _START)] + [(int(executed * at), int(executed * at) + 4 * _WINDOW) for at in _SPREAD]
    weight = counts.sizes * counts.counts / executed
    for first in np.sort(counts.first[weight > _SHARE]).tolist():
        if len(windows) == 1 + len(_SPREAD) + _EXTRA_WINDOWS:
            break
        if not any(start <= first < end - 4 * _FILLING for start, end in windows):
            windows.append((first, first + 4 * _WINDOW))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(windows):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _capacity(counts: Counts) -> int:
    """Records that hold the windows: an instruction makes 4 at most on average (a pair of 16-byte registers in parts of 8)."""
    longest = min(counts.executed // 4, _START + (len(_SPREAD) + _EXTRA_WINDOWS) * _WINDOW, 4 * _WHOLE)
    return 4 * max(longest, 1) + 4 * hooks.BLOCK_ACCESSES


def _path(object_bytes: bytes, tensors: Sequence[Tensor], core: Core) -> Path:
    digest = hashlib.sha256(object_bytes)
    digest.update(json.dumps([VERSION, tensors, core.digest]).encode())
    return cache_dir() / "estimates" / f"{digest.hexdigest()[:32]}.json"


def _kept(path: Path) -> KernelEstimate | None:
    """A stored estimate; None if there is none that can be read."""
    try:
        facts = json.loads(path.read_text())
        return KernelEstimate(**{**facts, "unknown": tuple(facts["unknown"]), "misses": tuple(facts["misses"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
