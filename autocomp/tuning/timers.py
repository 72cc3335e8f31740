"""How one scheduled function is timed on a target: the part of tuning that differs between this machine, a board, and an estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from autocomp.errors import last_line
from autocomp.hardware.profile import Profile
from autocomp.hardware.timing import quiet_core
from autocomp.processes.alone import attempt_alone
from autocomp.processes.outcome import Outcome
from autocomp.processes.pool import cores
from autocomp.records.latency import How


class Job(NamedTuple):
    """One trial: ``build`` makes a schedule of ``function``, the unscheduled PrimFunc, whose parameters tell what it is called with."""

    function: Any
    build: Callable[[], Any]


class Timer(Protocol):
    """Times schedules of kernels on one target; ``how`` is what its seconds may be called."""

    how: How

    def attempt(self, jobs: Sequence[Job]) -> list[Outcome[float]]:
        """Return (seconds, "") of each job, or (None, why it failed).

        A failure of one job, a crash or a hang included, must not touch the others. What is measured is alone on its device; schedules may
        be built, and estimated, side by side.
        """
        ...


class LocalTimer:
    """Measures on this machine: in forked children, so that a crash is one trial lost; several threads in this process."""

    how: How = "measured"

    def __init__(self, profile: Profile) -> None:
        from tvm.target import Target

        self.threads = profile.cores
        self.target = Target(dict(profile.target))

    def attempt(self, jobs: Sequence[Job]) -> list[Outcome[float]]:
        def compiled(job: Job) -> Any:
            executable = compile_function(job.build(), self.target)
            executable.jit()["main"]  # asking for it makes its machine code, here, while others build too
            return executable

        def measure(job: Job, executable: Any) -> float:
            return time_executable(executable, random_arguments(job.function), self.threads)

        if self.threads == 1:
            return attempt_alone(jobs, compiled, measure, cores())
        # TVM's thread pool does not live through a fork: several threads are timed here, and a crash is everybody's
        results: list[Outcome[float]] = []
        for job in jobs:
            try:
                results.append(Outcome(measure(job, compiled(job))))
            except Exception as error:
                results.append(Outcome(None, last_line(error)))
        return results


def compile_function(function: Any, target: Any) -> Any:
    """An executable whose ``main`` is a scheduled function."""
    import tvm

    return tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target)


def time_function(function: Any, arguments: list[Any], target: Any, threads: int = 1, *, repeats: int = 3) -> float:
    """Seconds one scheduled function takes alone, on this machine: the best of ``repeats`` means over about 2 ms each."""
    return time_executable(compile_function(function, target), arguments, threads, repeats=repeats)


def time_executable(executable: Any, arguments: list[Any], threads: int = 1, *, repeats: int = 3) -> float:
    """Do as ``time_function`` does, for what ``compile_function`` made."""
    import tvm

    device = tvm.cpu()
    with quiet_core(threads):
        executable(*arguments)
        once = executable.mod.time_evaluator("main", device, number=1, repeat=1)(*arguments).mean
        number = int(min(max(2e-3 / max(once, 1e-8), 1), 10_000))
        return float(
            min(executable.mod.time_evaluator("main", device, number=number, repeat=repeats)(*arguments).results)
        )


def signature(function: Any) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each tensor a function takes, outputs last."""
    return [
        (str(parameter.ty.dtype).removeprefix("T."), tuple(int(size) for size in parameter.ty.shape))
        for parameter in function.params
    ]


def random_arrays(function: Any, largest: int | None = None) -> list[np.ndarray]:
    """Small random values: large ones would saturate what is fused behind a product, and subnormals take other time.

    Float arrays of more than ``largest`` bytes are zeros that take no memory, for a caller that fills its own.
    """
    rng = np.random.default_rng(0)
    normal = 0.1 * rng.standard_normal(1 << 16)  # repeated: drawing millions of them takes longer than timing a kernel
    arrays = []
    for dtype, shape in signature(function):
        if largest is not None and dtype.startswith("float") and math.prod(shape) * np.dtype(dtype).itemsize > largest:
            array = np.broadcast_to(np.zeros((), dtype), shape)
        elif dtype.startswith("float"):
            array = np.resize(normal.astype(dtype), shape)
        elif dtype in ("int8", "uint8", "int16"):
            array = np.asarray(rng.integers(0, 4, shape), dtype)
        else:  # may be an index into another argument: zero is always inside
            array = np.zeros(shape, dtype)
        arrays.append(array)
    return arrays


def random_arguments(function: Any) -> list[Any]:
    """``random_arrays`` as tensors of TVM on this machine."""
    import tvm

    return [tvm.runtime.tensor(array) for array in random_arrays(function)]
