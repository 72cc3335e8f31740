"""Find the best tile of each kernel: build a few, time each on the target, keep the fastest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autocomp.errors import AutocompError
from autocomp.hardware import Profile
from autocomp.kernels import compute, half, packing, templates
from autocomp.kernels.intrinsics import dot_product
from autocomp.kernels.store import KernelRecord, KernelStore
from autocomp.kernels.timers import LocalTimer, Timer

_GOOD_ENOUGH = 0.92  # of the measured peak: what is left is within the noise of a short measurement
_PATIENCE = 2  # trials without a gain of 1 % before giving up


@dataclass(frozen=True)
class Tuned:
    """A scheduled function, and the record that says how fast it ran."""

    function: Any
    record: KernelRecord
    trials: int  # made now; 0 for a hit in the store


class Tuner:
    """Tunes fused functions for one profile, through its kernel store, by the times a ``timer`` takes (None: on this machine)."""

    def __init__(self, profile: Profile, store: KernelStore, timer: Timer | None = None, *, budget: int = 8) -> None:
        from tvm.target import Target

        self.profile = profile
        self.store = store
        self.timer: Timer = timer or LocalTimer(profile)
        self.budget = budget
        self.target = Target(dict(profile.target))
        self.trials = 0
        self.tuned = 0

    def tune(self, function: Any) -> Tuned:
        """Return the function scheduled with its best tile, from the store or by measuring. AutocompError if none builds."""
        from tvm_ffi import structural_hash

        anchor = templates.describe(function)
        key = f"{anchor.template}-{structural_hash(function) & (2**64 - 1):016x}-v{templates.VERSION}"
        record = self.store.get(key)
        if record is not None:
            tile = templates.Tile(**record.tile)
            return Tuned(templates.apply(function, tile, anchor, self.profile), record, 0)
        best, trials = self._measure_tiles(function, anchor, self._tiles(anchor))
        record = KernelRecord(
            key, anchor.template, best[1].to_json(), best[0], anchor.flops, trials, anchor.spatial, anchor.reduction
        )
        self.store.add(record)
        self.trials += trials
        self.tuned += 1
        return Tuned(templates.apply(function, best[1], anchor, self.profile), record, trials)

    def peak(self, template: str) -> float | None:
        """Operations a second that this machine reaches in a register-tiled product held in cache; None without arithmetic.

        Measured once per store with the project's own best kernel on one core, so it is a practical peak; times the cores used.
        """
        if template == "rowwise":
            return None
        if self.profile.cores > 1:
            # what a board's timer runs is what is scheduled for one core; on this machine the timer itself counts threads
            timer = self.timer if self.profile.how == "rpc" else None
            single = Tuner(replace(self.profile, cores=1), self.store, timer, budget=self.budget)
            return self.profile.cores * (single.peak(template) or 0.0)
        arithmetic = next((kind for kind in ("int8", "fp16") if template.endswith(kind)), "fp32")
        key = f"peak-{arithmetic}-v{templates.VERSION}"
        record = self.store.get(key)
        if record is None:
            function = _reference_product(arithmetic, self.profile)
            anchor = templates.describe(function)
            tiles = templates.tiles(anchor, self.profile)[: self.budget]
            best, trials = self._measure_tiles(function, anchor, tiles, stop_early=False)
            record = KernelRecord(key, anchor.template, best[1].to_json(), best[0], anchor.flops, trials)
            self.store.add(record)
        return record.flops / record.seconds

    def _tiles(self, anchor: templates.Anchor) -> list[templates.Tile]:
        """The tiles worth measuring; only one where a kernel with the same loops and another epilogue was tuned before."""
        if anchor.spatial and (sibling := self.store.find(anchor.template, anchor.spatial, anchor.reduction)):
            return [templates.Tile(**sibling.tile)]
        return templates.tiles(anchor, self.profile)[: self.budget]

    def _measure_tiles(
        self, function: Any, anchor: templates.Anchor, tiles: list[templates.Tile], *, stop_early: bool = True
    ) -> tuple[tuple[float, templates.Tile], int]:
        peak = self.peak(anchor.template) if stop_early else None
        best: tuple[float, templates.Tile] | None = None
        since, trials, failure = 0, 0, ""
        answers = self.timer.attempt(
            function, tiles, lambda tile: templates.apply(function, tile, anchor, self.profile)
        )
        for tile, seconds, refused in answers:
            trials += 1
            if seconds is None:  # a tile that TVM, LLVM or the machine refuses is one trial lost, not the kernel
                failure = refused
                continue
            since = 0 if best is None or seconds < best[0] * 0.99 else since + 1
            if best is None or seconds < best[0]:
                best = (seconds, tile)
            if peak and anchor.flops / best[0] > _GOOD_ENOUGH * peak:
                break
            if stop_early and since >= _PATIENCE:
                break
        if best is None:
            raise AutocompError(
                f"no schedule of a {anchor.template} kernel {_describe(anchor)} could be built: {failure}"
            )
        answers.close()
        return best, trials


def _reference_product(arithmetic: str, profile: Profile) -> Any:
    """A product small enough for the first-level cache: 24 x 256 times 256 x 64, in float32, float16 or 8-bit integers."""
    from tvm import te

    weight = np.zeros((64, 256), {"int8": "int8", "fp16": "float16"}.get(arithmetic, "float32"))
    if arithmetic == "fp16":
        lanes = 2 * profile.lanes
        packed, dtype = half.pack_dense_weight(weight, lanes), "float16"
    else:
        lanes, dot = profile.lanes, dot_product(profile) if arithmetic == "int8" else None
        packed, dtype = packing.pack_dense_weight(weight, lanes, dot), dot.activation if dot else "float32"
    spec = compute.DenseSpec.of((24, 256), 64, lanes)
    data = te.placeholder((24, 256), dtype, name="data")
    constant = te.placeholder(packed.shape, str(packed.dtype), name="weight")
    if arithmetic == "fp16":
        return te.create_prim_func([data, constant, half.dense(data, constant, spec)])
    return te.create_prim_func([data, constant, compute.dense(data, constant, spec, dot)])


def _describe(anchor: templates.Anchor) -> str:
    return f"{'x'.join(map(str, anchor.spatial))} over {'x'.join(map(str, anchor.reduction))}" if anchor.spatial else ""
