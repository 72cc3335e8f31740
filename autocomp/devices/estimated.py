"""A processor that is not there, as a target: kernels are emulated and timed on a model of its core, and nothing is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.devices.device import Compiled, latency_model
from autocomp.devices.local import check_compiled
from autocomp.errors import UsageError
from autocomp.hardware.profile import Profile
from autocomp.processes.outcome import Outcome
from autocomp.processes.shared import attempt_shared
from autocomp.records.latency import How, Latency
from autocomp.tuning.store import KernelStore
from autocomp.tuning.timers import Job, signature
from autocomp.tuning.tune import Tuner

if TYPE_CHECKING:
    import torch

    from autocomp.compiler.build import Scheduled

_WORKERS = 2  # estimates do not disturb each other as measurements would
_TIMEOUT = 60.0
_CHECKED = 2  # inputs that are emulated and compared with torch: each costs as much as some thousand inferences
# One call of a kernel through TVM's virtual machine. Not part of the core's model: on x86-64 such a call takes about 0.3 us
# (benchmarks/main_job.py: whole modules over the sum of their kernels), and this core runs scalar code at about a third of that rate.
_CALL_SECONDS = 1e-6
# Of 190 held-out schedules that the same method estimated on x86-64, 95 % were off by less than this against native time (the median by
# 6 %): reports/benchmarks/estimate_validation.md. The Cortex-A76's own table was checked against published figures only.
ERROR = 0.38


class EstimateTimer:
    """Estimates kernels from their object code, on several processes at once. Repeated runs give the same seconds."""

    how: How = "estimated"

    def __init__(self, profile: Profile) -> None:
        from tvm.target import Target

        from autocomp.estimate import core_of

        self.core = core_of(profile)
        self.target = Target(dict(profile.target))
        self._ready = False

    def attempt(self, jobs: Sequence[Job]) -> list[Outcome[float]]:
        from autocomp.estimate import compile_object, estimate_kernel

        self._make_ready()

        def estimate(job: Job) -> float:
            return estimate_kernel(compile_object(job.build(), self.target), signature(job.function), self.core).seconds

        return attempt_shared(jobs, estimate, min(_WORKERS, len(jobs)), _TIMEOUT)

    def _make_ready(self) -> None:
        """Estimate a trifle here, so that the forked processes find what numba compiles.

        Where nothing is cached that takes 15 seconds and more. A process that is stopped before its end leaves no cache to the next.
        """
        if self._ready:
            return
        from tvm import te

        from autocomp.estimate import compile_object, estimate_kernel

        x = te.placeholder((64,), name="x")
        doubled = te.create_prim_func([x, te.compute((64,), lambda i: x[i] + x[i], name="y")])
        code = compile_object(doubled, self.target)
        estimate_kernel(code, [("float32", (64,))] * 2, self.core, store=False)
        self._ready = True


class EstimatedModel:
    """A module of kernels for a core that is not there; ``run`` emulates the machine code of every kernel."""

    checked_inputs = _CHECKED

    def __init__(self, scheduled: Scheduled, profile: Profile, target: Any, library: bytes | None = None) -> None:
        self.profile = profile
        self.kernels = scheduled.kernels
        self.memory = scheduled.memory
        self._scheduled = scheduled
        self._target = target
        self._library = library
        self._objects: dict[str, bytes] = {}

    def run(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Compute the outputs by emulation: of the library's functions if it was loaded, else of each kernel's object."""
        import torch

        from autocomp.compiler.interpret import interpret
        from autocomp.graph.plain import plain_tensor

        arrays = [plain_tensor(tensor).detach().contiguous().numpy() for tensor in inputs]
        result = interpret(self._scheduled.module, arrays, self._runner())
        return tuple(map(torch.from_numpy, result)) if isinstance(result, tuple) else torch.from_numpy(result)

    def time(self, *inputs: torch.Tensor) -> Latency:
        """The sum of the kernels' estimates and of their calls; inputs are taken so that every target is asked alike.

        Where kernels ran instructions that the core's table has no row for, ``device`` names them and their share of all that ran.
        """
        seconds = sum(kernel.seconds + _CALL_SECONDS for kernel in self.kernels)
        device = describe_estimate(self.profile) + self._unknown()
        return Latency(
            seconds, 0.0, "estimated", self.profile.name, device, (), self.kernels, ERROR,
            memory=self.memory, watts=self.profile.watts,
        )  # fmt: skip

    def tail(self, *inputs: torch.Tensor) -> dict[str, float]:
        """None: an estimate is the same every time."""
        return {}

    def _unknown(self) -> str:
        from autocomp.estimate import core_of, estimate_kernel

        core = core_of(self.profile)
        executed, unknown, names = 0, 0.0, set()
        for kernel in self.kernels:
            tensors = signature(self._scheduled.module[kernel.name])
            estimate = estimate_kernel(self._object(kernel.name), tensors, core)
            executed += estimate.instructions
            unknown += estimate.unknown_share * estimate.instructions
            names |= set(estimate.unknown)
        if not unknown:
            return ""
        return (
            f", {unknown / executed:.2%} of the instructions are not in the core's table ({', '.join(sorted(names))})"
        )

    def _object(self, name: str) -> bytes:
        from autocomp.estimate import compile_object

        if name not in self._objects:
            self._objects[name] = compile_object(self._scheduled.module[name], self._target)
        return self._objects[name]

    def save(self, path: str | Path) -> Path:
        """Write the shared library for the target. AutocompError where there is no linker for it."""
        import tvm

        from autocomp.hardware.link import linker_for
        from autocomp.processes.quiet import quiet_stderr

        executable = tvm.compile(self._scheduled.module, self._target)
        with quiet_stderr():
            executable.export_library(str(path), fcompile=linker_for(self.profile.target))
        return Path(path)

    def reload(self, path: str | Path) -> EstimatedModel:
        """The same steps with the code of a saved library. UsageError if it is none."""
        from autocomp.errors import ObjectError
        from autocomp.estimate.libraries import Library

        try:
            data = Path(path).read_bytes()
            Library(data)
        except OSError as error:
            raise UsageError(f"{path} is not a compiled model: {error.strerror}") from error
        except ObjectError as error:
            raise UsageError(f"{path} is not a compiled model: {error}") from error
        return EstimatedModel(self._scheduled, self.profile, self._target, data)

    def _runner(self) -> Callable[[str, list[np.ndarray]], list[np.ndarray]]:
        from autocomp.estimate import run_kernel
        from autocomp.estimate.libraries import Library

        if self._library is not None:
            return Library(self._library).run
        return lambda name, arrays: run_kernel(self._object(name), arrays)


class EstimatedDevice:
    """Compiles for a profile's processor, checks by emulation, and estimates. UsageError if its core has no model."""

    def __init__(self, profile: Profile, store: KernelStore | None = None) -> None:
        timer = EstimateTimer(profile)
        self.profile = profile
        self.notes: tuple[str, ...] = ()
        self.store = KernelStore.open(profile) if store is None else store  # an empty one is falsy
        self.tuner = Tuner(profile, self.store, timer)
        self.model = latency_model(profile, self.tuner)

    def compile(self, model: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]]) -> EstimatedModel:
        """Build a module for the shapes of the first inputs, and compare its emulated code with torch on the first two.

        MismatchError names the first layer that differs; ExportError as ``schedule``.
        """
        compiled = self._build(model, inputs[0])
        check_compiled(model, compiled.run, inputs[: compiled.checked_inputs], lambda m: self._build(m, inputs[0]).run)
        return compiled

    def time(self, compiled: Compiled, example_inputs: tuple[torch.Tensor, ...]) -> Latency:
        """The module's estimate; it is the same every time."""
        return compiled.time(*example_inputs)

    def time_in_turn(self, modules: Sequence[Compiled], example_inputs: tuple[torch.Tensor, ...]) -> list[Latency]:
        """The modules' estimates."""
        return [module.time(*example_inputs) for module in modules]

    def _build(self, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> EstimatedModel:
        from autocomp.compiler.build import schedule

        return EstimatedModel(schedule(model, inputs, self.profile, self.tuner), self.profile, self.tuner.target)


def describe_estimate(profile: Profile) -> str:
    """One line that says what an estimate is of."""
    clock = f" @ {profile.clock_hz / 1e9:.1f} GHz" if profile.clock_hz else ""
    return f"core model of {profile.core}{clock}, {profile.cores} core"
