"""How one scheduled function is timed on a target: the part of tuning that differs between this machine, a board, and an estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from autocomp.devices.timing import quiet_core
from autocomp.hardware import Profile
from autocomp.kernels.isolated import attempt_each
from autocomp.records import How

T = TypeVar("T")


class Timer(Protocol):
    """Times schedules of one function on one target; ``how`` is what its seconds may be called."""

    how: How

    def attempt(
        self, function: Any, items: Sequence[T], build: Callable[[T], Any]
    ) -> Generator[tuple[T, float | None, str]]:
        """Yield (item, seconds, "") for the schedule that ``build`` makes of each item, or (item, None, why it failed).

        ``function`` is the unscheduled PrimFunc: its parameters tell what the schedules are called with. A failure of one item, a
        crash or a hang included, must not touch the others. The caller may stop early by closing the generator.
        """
        ...


class LocalTimer:
    """Measures on this machine: in a forked child, so that a crash is one trial lost; several threads in this process."""

    how: How = "measured"

    def __init__(self, profile: Profile) -> None:
        from tvm.target import Target

        self.threads = profile.cores
        self.target = Target(dict(profile.target))

    def attempt(
        self, function: Any, items: Sequence[T], build: Callable[[T], Any]
    ) -> Generator[tuple[T, float | None, str]]:
        arguments = random_arguments(function)

        def measure(item: T) -> float:
            return time_function(build(item), arguments, self.target, self.threads)

        # TVM's thread pool does not live through a fork: several threads are timed here
        return attempt_each(items, measure) if self.threads == 1 else attempt_here(items, measure)


def attempt_here(items: Sequence[T], work: Callable[[T], float]) -> Generator[tuple[T, float | None, str]]:
    """``attempt_each`` in this process: an exception is one item's failure, a crash is everybody's."""
    for item in items:
        try:
            yield item, work(item), ""
        except Exception as error:
            lines = str(error).strip().splitlines()
            yield item, None, lines[-1] if lines else type(error).__name__


def time_function(function: Any, arguments: list[Any], target: Any, threads: int = 1, *, repeats: int = 3) -> float:
    """Seconds one scheduled function takes alone, on this machine: the best of ``repeats`` means over about 2 ms each."""
    import tvm

    executable = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target)
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
    arrays = []
    for dtype, shape in signature(function):
        if largest is not None and dtype.startswith("float") and math.prod(shape) * np.dtype(dtype).itemsize > largest:
            array = np.broadcast_to(np.zeros((), dtype), shape)
        elif dtype.startswith("float"):
            array = np.asarray(0.1 * rng.standard_normal(shape), dtype)
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
