"""Find the best tile of each kernel: build a few, time each on the target, keep the fastest."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from autocomp.errors import AutocompError, last_line
from autocomp.hardware.profile import Profile
from autocomp.kernels import templates
from autocomp.kernels.tile import Anchor, Tile
from autocomp.processes.outcome import Outcome
from autocomp.records.precisions import arithmetic_of, load
from autocomp.tuning.store import KernelRecord, KernelStore
from autocomp.tuning.timers import Job, LocalTimer, Timer

_GOOD_ENOUGH = 0.92  # of the measured peak: what is left is within the noise of a short measurement
_PEAK_TILES = 4  # of the product that a machine's peak is measured with: one of the first guesses reaches it
_PATIENCE = 2  # trials without a gain of 1 % before giving up
# Of products in float32 the first guesses are near the best (`kernels.templates`): of 72 kernels of six networks, a third trial took 0.5 % off
# the geometric mean of their times. Of others, 3 %.
_PATIENCE_OF = {"dense": 1, "conv2d": 1, "batch_matmul": 1, "winograd": 1}


@dataclass(frozen=True)
class Tuned:
    """A scheduled function, and the record that says how fast it ran."""

    function: Any
    record: KernelRecord
    trials: int  # made now; 0 for a hit in the store


@dataclass(frozen=True)
class _Kernel:
    function: Any
    anchor: Anchor
    key: str

    @property
    def loops(self) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
        """What the tile depends on; None where that is not known."""
        return (self.anchor.template, self.anchor.spatial, self.anchor.reduction) if self.anchor.spatial else None


@dataclass(frozen=True)
class _Found:
    seconds: float
    tile: Tile
    trials: int


class Tuner:
    """Tunes fused functions for one profile, through its kernel store, by the times a ``timer`` takes (None: on this machine).

    Where ``elsewhere`` is set (in a process that may disturb what others time), it is asked first to have functions tuned.
    """

    def __init__(self, profile: Profile, store: KernelStore, timer: Timer | None = None, *, budget: int = 8) -> None:
        from tvm.target import Target

        self.profile = profile
        self.store = store
        self.timer: Timer = timer or LocalTimer(profile)
        self.budget = budget
        self.target = Target(dict(profile.target))
        self.elsewhere: Callable[[Sequence[Any]], object] | None = None
        self.trials = 0
        self.tuned = 0

    def tune(self, function: Any) -> Tuned:
        """Return the function scheduled with its best tile, from the store or by measuring. AutocompError if none builds."""
        return self.tune_all([function])[0]

    def tune_all(self, functions: Sequence[Any]) -> list[Tuned]:
        """Do as ``tune`` does for all kernels of a module: their trials are built side by side, and timed one after the other.

        AutocompError if a kernel has no schedule that builds; what was found for the others is kept.
        """
        kernels = [self._kernel(function) for function in functions]
        if self.elsewhere is not None and (missing := self._missing(kernels)):
            self.elsewhere([kernel.function for kernel in missing.values()])
            self.store.reload()
        new = self._fill(kernels)
        return [self._tuned(kernel, new.pop(kernel.key, 0)) for kernel in kernels]

    def fill(self, functions: Sequence[Any]) -> None:
        """See to it that the store has a record of every function. AutocompError as ``tune_all``."""
        self._fill([self._kernel(function) for function in functions])

    def _missing(self, kernels: Sequence[_Kernel]) -> dict[str, _Kernel]:
        return {kernel.key: kernel for kernel in kernels if self.store.get(kernel.key) is None}

    def _fill(self, kernels: Sequence[_Kernel]) -> dict[str, int]:
        """Tune what the store lacks; trials by key."""
        missing = self._missing(kernels)
        first: dict[Any, str] = {}  # of the kernels with the same loops; the others take over its tile
        for kernel in missing.values():
            first.setdefault(kernel.loops or kernel.key, kernel.key)
        leaders = set(first.values())
        new: dict[str, int] = {}
        for wave in (leaders, missing.keys() - leaders):
            new |= self._race([kernel for key, kernel in missing.items() if key in wave])
        return new

    def _kernel(self, function: Any) -> _Kernel:
        from tvm_ffi import structural_hash

        anchor = templates.describe(function)
        key = f"{anchor.template}-{structural_hash(function) & (2**64 - 1):016x}-v{templates.VERSION}"
        return _Kernel(function, anchor, key)

    def _tuned(self, kernel: _Kernel, trials: int) -> Tuned:
        record = self.store.get(kernel.key)
        assert record is not None
        function = self._scheduled(kernel, record)
        if function is None:  # the record is of a file of others': the last one counts
            trials += self._race([kernel])[kernel.key]
            record = self.store.get(kernel.key)
            assert record is not None
            function = self._scheduled(kernel, record)
        if function is None:
            raise AutocompError(f"the kernel {kernel.key} has no schedule that builds")
        return Tuned(function, record, trials)

    def _scheduled(self, kernel: _Kernel, record: KernelRecord) -> Any | None:
        """The function with a record's tile; None where that is not one of its."""
        try:
            return templates.apply(kernel.function, Tile(**record.tile), kernel.anchor, self.profile)
        except Exception as error:
            print(f"the record of {kernel.key} does not fit: {last_line(error)}", file=sys.stderr)  # into the run's log
            return None

    def _race(self, kernels: Sequence[_Kernel]) -> dict[str, int]:
        """Find the best tiles of kernels that are in the store afterwards; their trials by key."""
        failures = []
        trials = {}
        for kernel, found in zip(kernels, self._search(kernels), strict=True):
            if isinstance(found, AutocompError):
                failures.append(found)
                continue
            anchor = kernel.anchor
            self.store.add(
                KernelRecord(
                    kernel.key, anchor.template, found.tile.to_json(), found.seconds, anchor.flops, found.trials,
                    anchor.spatial, anchor.reduction,
                )
            )  # fmt: skip
            trials[kernel.key] = found.trials
            self.trials += found.trials
            self.tuned += 1
        if failures:
            raise failures[0]
        return trials

    def peak(self, template: str) -> float | None:
        """Operations a second that this machine reaches in a register-tiled product held in cache; None without arithmetic.

        Measured once per store with the project's own best kernel on one core, so it is a practical peak; times the cores used.
        """
        if template == "rowwise":
            return None
        if self.profile.cores > 1:
            # what a board's timer runs is what is scheduled for one core; on this machine the timer itself counts threads
            timer = self.timer if self.profile.reach == "rpc" else None
            single = Tuner(replace(self.profile, cores=1), self.store, timer, budget=self.budget)
            return self.profile.cores * (single.peak(template) or 0.0)
        arithmetic = arithmetic_of(template)
        key = f"peak-{arithmetic.name}-v{templates.VERSION}"
        record = self.store.get(key)
        if record is None:
            kernel = self._kernel(load(arithmetic.product)(self.profile))
            (found,) = self._search([kernel], stop_early=False)
            if isinstance(found, AutocompError):
                raise found
            record = KernelRecord(
                key, kernel.anchor.template, found.tile.to_json(), found.seconds, kernel.anchor.flops, found.trials
            )
            self.store.add(record)
        return record.flops / record.seconds

    def _tiles(self, kernel: _Kernel, stop_early: bool) -> list[Tile]:
        """The tiles to measure; only one where a kernel with the same loops and another epilogue was tuned before."""
        if stop_early and kernel.loops and (sibling := self.store.find(*kernel.loops)):
            with suppress(TypeError):  # no tile of a kernel's: a file of others'
                return [Tile(**sibling.tile)]
        return templates.tiles(kernel.anchor, self.profile)[: self.budget if stop_early else _PEAK_TILES]

    def _others(self, kernel: _Kernel, tried: Sequence[Tile]) -> list[Tile]:
        """What to fall back on, one after the other, where none of the tiles builds: there is always a schedule."""
        first = templates.tiles(kernel.anchor, self.profile)[:1]
        return [tile for tile in (*first, *templates.LAST_RESORT) if tile not in tried]

    def _search(self, kernels: Sequence[_Kernel], *, stop_early: bool = True) -> list[_Found | AutocompError]:
        """Try tiles of all kernels in rounds, one of each that is not done yet; what each kernel's search ends with."""
        searches = [self._tries(kernel, stop_early) for kernel in kernels]
        ended: dict[int, _Found | AutocompError] = {}
        answers: dict[int, Outcome[float] | None] = dict.fromkeys(range(len(kernels)))
        while answers:
            wanted: dict[int, Tile] = {}
            for index, answer in answers.items():
                try:
                    wanted[index] = searches[index].send(answer)
                except StopIteration as end:
                    ended[index] = end.value
            jobs = [
                Job(
                    kernels[index].function,
                    partial(templates.apply, kernels[index].function, tile, kernels[index].anchor, self.profile),
                )
                for index, tile in wanted.items()
            ]
            answers = dict(zip(wanted, self.timer.attempt(jobs) if jobs else (), strict=True))
        return [ended[index] for index in range(len(kernels))]

    def _tries(
        self, kernel: _Kernel, stop_early: bool
    ) -> Generator[Tile, Outcome[float] | None, _Found | AutocompError]:
        """One kernel's search: yields the tile to try next, is sent (seconds, "") or (None, why not), and returns what it found."""
        anchor = kernel.anchor
        peak = self.peak(anchor.template) if stop_early else None
        best: _Found | None = None
        since, trials, failure = 0, 0, ""
        tiles = self._tiles(kernel, stop_early)
        for tile in itertools.chain(tiles, self._others(kernel, tiles)):
            if best is not None and trials >= len(tiles):
                break
            answer = yield tile
            assert answer is not None
            seconds, refused = answer
            trials += 1
            if seconds is None:  # a tile that TVM, LLVM or the machine refuses is one trial lost, not the kernel
                failure = refused
                continue
            since = 0 if best is None or seconds < best.seconds * 0.99 else since + 1
            if best is None or seconds < best.seconds:
                best = _Found(seconds, tile, trials)
            if peak and anchor.flops / best.seconds > _GOOD_ENOUGH * peak:
                break
            if stop_early and since >= _PATIENCE_OF.get(anchor.template, _PATIENCE):
                break
        if best is None:
            return AutocompError(
                f"no schedule of a {anchor.template} kernel {_describe(anchor)} could be built: {failure}"
            )
        return replace(best, trials=trials)


def _describe(anchor: Anchor) -> str:
    return f"{'x'.join(map(str, anchor.spatial))} over {'x'.join(map(str, anchor.reduction))}" if anchor.spatial else ""
