"""Where a kernel stands under the roofline of its machine (Williams, Waterman, Patterson 2009).

Peak arithmetic comes from the store's peak records, which tuning measures; the bandwidth of main memory is measured here,
once per store, and kept as a record beside them.

Arithmetic intensity is operations over the bytes a kernel must move at least once: inputs, weights and outputs, reckoned from
its anchor's loop extents. Those do not tell a stride, a border or the groups of a convolution, nor what its epilogue reads, so
a convolution counts as stride 1 over the channels that one output reads: the intensity is an upper bound there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from autocomp.errors import AutocompError
from autocomp.hardware.profile import Profile
from autocomp.kernels import weight_only
from autocomp.records.precisions import ARITHMETICS, arithmetic_of, weight_bytes_of
from autocomp.tuning.store import KernelRecord, KernelStore

if TYPE_CHECKING:
    from autocomp.tuning.timers import Timer

STREAM = "peak-memory-v1"  # key of the record that holds the measured bandwidth
_LARGEST = 1 << 30  # bytes streamed at most
_ACCUMULATORS = 8  # independent sums: two loads a cycle, and an addition takes 3 to 4 cycles


@dataclass(frozen=True)
class Roofline:
    """A machine's measured limits: operations a second by the name of an arithmetic, and bytes a second of main memory; None if unknown."""

    peaks: Mapping[str, float] = field(default_factory=dict)
    bandwidth: float | None = None

    def peak(self, operator: str) -> float | None:
        """The limit of an operator's arithmetic."""
        return self.peaks.get(arithmetic_of(operator).name)

    def to_json(self) -> dict[str, float | None]:
        return {**{name: self.peaks.get(name) for name in ARITHMETICS}, "bandwidth": self.bandwidth}


@dataclass(frozen=True)
class Position:
    """A kernel under the roofline; None where a figure does not apply or is unknown.

    ``rate`` is in operations a second, ``peak_fraction`` is of the measured peak, ``intensity`` in operations a byte. A kernel
    whose data stay in a cache may run above the limit that main memory sets; ``bound`` says which limit is the lower one.
    """

    rate: float | None = None
    peak_fraction: float | None = None
    intensity: float | None = None
    bound: Literal["compute", "memory"] | None = None


def is_peak(record: KernelRecord) -> bool:
    """Whether a record is one of the machine's limits, not a kernel of a model."""
    return record.key.startswith("peak-")


def roofline(records: Iterable[KernelRecord]) -> Roofline:
    """The limits among a store's records; of several versions of one, the newest."""
    newest: dict[str, tuple[int, KernelRecord]] = {}
    for record in filter(is_peak, records):
        name, _, version = record.key.removeprefix("peak-").rpartition("-v")
        number = int(version) if version.isdigit() else 0
        if name not in newest or number >= newest[name][0]:
            newest[name] = (number, record)
    rates = {name: record.flops / record.seconds for name, (_, record) in newest.items() if record.flops}
    stream = newest.get("memory")
    bandwidth = stream[1].tile["bytes"] / stream[1].seconds if stream else None
    return Roofline({name: rates[name] for name in ARITHMETICS if name in rates}, bandwidth)


def position(record: KernelRecord, limits: Roofline) -> Position:
    """Place a record under the roofline."""
    if not record.flops:
        return Position()  # data movement and row-wise kernels: no arithmetic is counted for them
    rate, peak, moved = record.flops / record.seconds, limits.peak(record.operator), traffic(record)
    intensity = record.flops / moved if moved else None
    bound: Literal["compute", "memory"] | None = None
    if intensity and peak and limits.bandwidth:
        bound = "compute" if intensity * limits.bandwidth >= peak else "memory"
    return Position(rate, rate / peak if peak else None, intensity, bound)


def traffic(record: KernelRecord) -> float | None:
    """Bytes of inputs, weights and outputs, each moved once; None for an operator whose loops do not tell them."""
    spatial, reduction = record.spatial, record.reduction
    if not spatial or not reduction:
        return None
    if record.operator in weight_only.TEMPLATES:
        return weight_only.traffic(record.operator, spatial, reduction)
    arithmetic, depth = arithmetic_of(record.operator), math.prod(reduction)
    size, outputs = _element(record), arithmetic.result * math.prod(spatial)
    *rows, channels = spatial
    match record.operator.removesuffix(f"_{arithmetic.name}"):
        case "dense":
            return size * (math.prod(rows) * depth + depth * channels) + outputs
        case "batch_matmul":
            batch, m = math.prod(rows[:-1]), rows[-1]
            return size * batch * (m * depth + depth * channels) + outputs
        case "conv2d" if len(spatial) == 4 and len(reduction) >= 3:
            inputs = math.prod(rows) * math.prod(reduction[2:])
            return size * (inputs + depth * channels) + outputs
        case "winograd":  # the data at each of the points, and the products
            return size * (math.prod(rows) * depth + math.prod(rows[:2]) * depth * channels) + outputs
        case "depthwise":
            return size * (math.prod(spatial) + depth * channels) + outputs
    return None


def _element(record: KernelRecord) -> float:
    """Bytes of one weight and of one input."""
    pairs = arithmetic_of(record.operator).dot and record.reduction[-1] == 2  # whose products are of 16 bits
    return 2.0 if pairs else weight_bytes_of(record.operator)


def measure_bandwidth(profile: Profile, store: KernelStore, timer: Timer | None = None) -> float:
    """Bytes a second that the profile's threads read from main memory; measured if the store does not know it yet.

    A sum over an array of four times the last-level cache, 64 MiB at least and a tenth of memory at most; by ``timer`` where the
    target is not this machine. AutocompError if it could not be timed.
    """
    record = store.get(STREAM)
    if record is None:
        import numpy as np
        import tvm
        from tvm.target import Target

        from autocomp.tuning.timers import Job, time_function

        blocks, width = 64 * profile.cores, _ACCUMULATORS * profile.lanes
        wanted = max(4 * profile.caches.get("l3", 0), 64 << 20)
        limit = min(_LARGEST, (profile.memory_bytes or _LARGEST) // 10)
        depth = max(min(wanted, limit) // (blocks * width * 4), 1)
        stream = _stream(blocks, depth, width, profile)
        if timer is not None:
            ((timed, failure),) = timer.attempt([Job(stream, lambda: stream)])
            if timed is None:
                raise AutocompError(f"the memory bandwidth could not be measured: {failure}")
            seconds = timed
        else:
            data = tvm.runtime.tensor(np.ones((blocks, depth, width), "float32"))
            sums = tvm.runtime.tensor(np.zeros((blocks, width), "float32"))
            seconds = time_function(stream, [data, sums], Target(dict(profile.target)))
        moved = blocks * depth * width * 4
        record = KernelRecord(STREAM, "stream", {"bytes": moved}, seconds, 0, 1)
        store.add(record)
    return float(record.tile["bytes"] / record.seconds)


def _stream(blocks: int, depth: int, width: int, profile: Profile) -> Any:
    """Sum of each block's rows, a few registers of running sums at a time."""
    from tvm import s_tir, te

    data = te.placeholder((blocks, depth, width), name="data")
    row = te.reduce_axis((0, depth), "row")
    function = te.create_prim_func([data, te.compute((blocks, width), lambda b, w: te.sum(data[b, row, w], [row]))])
    schedule = s_tir.Schedule(function)
    (anchor,) = schedule.get_child_blocks(schedule.get_sblock("root"))
    sums = schedule.cache_write(anchor, 0, "local")
    block, across, down = schedule.get_loops(anchor)
    vector, lane = schedule.split(across, [None, profile.lanes])
    schedule.reorder(block, down, vector, lane)
    schedule.reverse_compute_at(sums, block)
    if profile.cores > 1:
        schedule.parallel(block)
    schedule.unroll(vector)
    schedule.vectorize(lane)
    start = schedule.decompose_reduction(anchor, down)
    for written in (start, sums):
        first, second = schedule.split(schedule.get_loops(written)[-1], [None, profile.lanes])
        schedule.unroll(first)
        schedule.vectorize(second)
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)
