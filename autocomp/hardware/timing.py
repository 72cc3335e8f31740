"""Timing hygiene: one measurement at a time on a device, on a pinned core, repeated, with its spread."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from autocomp.cache import cache_dir
from autocomp.records.latency import Latency

UNSTABLE = 0.10  # a relative spread above this is reported as unstable
STEADY = 0.05  # a spread below this is as good as it gets on many machines
STOLEN = 0.02  # of the time taken from this machine by its host, above which a measurement is repeated
PAUSES = (1.0, 3.0, 6.0)  # seconds before a disturbed measurement is repeated: what disturbs may be over by then
_BIG_CORES = 1  # TVM's affinity mode: the fastest cores first [tvm/runtime/threading_backend.h]


def median_and_spread(samples: list[float]) -> tuple[float, float]:
    """Median, and interquartile range over the median."""
    low, middle, high = np.percentile(samples, [25, 50, 75])
    return float(middle), float((high - low) / middle) if middle else 0.0


@contextmanager
def quiet_core(threads: int = 1, device: str = "local") -> Iterator[None]:
    """Hold the device's lock and keep the calling thread on one core (several threads: on as many); no garbage collection meanwhile.

    The last cores that this process may use are taken: interrupts tend to be served by the first.
    """
    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{device}.lock"):
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, set(sorted(allowed)[-threads:]))
        if threads > 1:
            _start_threads(threads)
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            os.sched_setaffinity(0, allowed)
            if collecting:
                gc.enable()


def steady(take: Callable[[], Sequence[Latency]]) -> list[Latency]:
    """Latencies that ``take`` measures together, repeated with pauses while they are disturbed; the steadiest of all times it was called.

    What spreads too far even then, or had too much of its time taken by the machine's host, is marked as noisy.
    """
    kept: tuple[float, list[Latency], float] | None = None
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        before = _ticks()
        taken = list(take())
        stolen = _stolen(before, _ticks())
        worst = max((latency.spread for latency in taken), default=0.0)
        if kept is None or worst + stolen < kept[0]:
            kept = worst + stolen, taken, stolen
        if worst <= STEADY and stolen <= STOLEN:
            break
    assert kept is not None
    _, taken, stolen = kept
    return [replace(latency, noisy=latency.spread > UNSTABLE or stolen > UNSTABLE) for latency in taken]


def _ticks() -> tuple[int, int]:
    """Ticks of all cores so far that the host of a virtual machine took, and all ticks; zeros where the system does not tell."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0, 0
    return (fields[7] if len(fields) > 7 else 0), sum(fields)


def _stolen(before: tuple[int, int], after: tuple[int, int]) -> float:
    """The share of the machine's time that its host took."""
    passed = after[1] - before[1]
    return (after[0] - before[0]) / passed if passed > 0 else 0.0


def _start_threads(count: int) -> None:
    """Give TVM's pool so many threads; by itself it takes half of what the system reports, for hyper-threading's sake."""
    import tvm

    os.environ["TVM_NUM_THREADS"] = str(count)  # the limit that the pool is made with
    configure = tvm.get_global_func("runtime.config_threadpool")
    configure(_BIG_CORES, count)


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, repeats: int = 30, seconds: float = 0.02, warm_up: int = 3
) -> dict[str, list[float]]:
    """Time several functions in turn, A B C A B C …, so that a drift of the machine's speed meets all of them.

    Each sample is the mean of as many calls as fill ``seconds``. Returns seconds a call, ``repeats`` samples each.
    """
    counts: dict[str, int] = {}
    for name, function in functions.items():
        for _ in range(warm_up):
            function()
        start = time.perf_counter()
        function()
        counts[name] = max(1, round(seconds / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            for _ in range(counts[name]):
                function()
            samples[name].append((time.perf_counter() - start) / counts[name])
    return samples
