"""Timing hygiene: one measurement at a time on a device, on a pinned core, repeated, with its spread."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from filelock import FileLock

from autocomp.cache import cache_dir

UNSTABLE = 0.10  # a relative spread above this is reported as unstable
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
