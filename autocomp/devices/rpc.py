"""Boards as a target: kernels and whole modules are compiled here, and checked and timed there through a TVM RPC tracker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autocomp.devices.boards import Limits, Session, boards_of, temporary_library
from autocomp.devices.device import Compiled, latency_model, quieter
from autocomp.devices.features import fit_to_board, read_board
from autocomp.devices.local import check_compiled
from autocomp.errors import BoardError, UsageError, last_line
from autocomp.hardware.profile import Profile, Rpc
from autocomp.hardware.timing import median_and_spread
from autocomp.processes.outcome import Outcome
from autocomp.processes.shared import attempt_shared
from autocomp.records.latency import How, KernelTime, Latency
from autocomp.tuning.store import KernelStore
from autocomp.tuning.timers import Job, compile_function, random_arrays
from autocomp.tuning.tune import Tuner

if TYPE_CHECKING:
    import numpy as np
    import torch

R = TypeVar("R")

_LIVES = 2  # a session lasts so many time limits and is used for one: the job that starts last still ends in time
_LARGE = 4 << 20  # bytes above which an array of a trial is made on the board instead of sent
_SECONDS = 2e-3  # of one sample of a kernel
_MODULE_SECONDS = 1e-2  # of one sample of a module
_SLOWED = 0.97  # of its highest clock: below, a board has been slowed down


class RpcTimer:
    """Measures kernels on every board of a key at once, one at a time on each."""

    how: How = "measured"

    def __init__(self, profile: Profile, limits: Limits | None = None) -> None:
        self.profile = profile
        self.rpc = rpc_of(profile)
        self.limits = limits or Limits()

    def attempt(self, jobs: Sequence[Job]) -> list[Outcome[float]]:
        try:
            boards = len(boards_of(self.rpc))
        except UsageError:
            boards = 1  # which waits for one to come back, and reports the failure as a trial's
        trial = _Trial(self.profile, self.limits)
        return attempt_shared(jobs, trial, min(boards, len(jobs)), self._patience())

    def _patience(self) -> float:
        return self.limits.trial + self.limits.wait


class _Lent:
    """A session that is opened when first needed, kept for the next job, and replaced before it can end in the midst of one."""

    def __init__(self, rpc: Rpc, limit: float, wait: float, threads: int = 1) -> None:
        self.rpc, self.limit, self.wait, self.threads = rpc, limit, wait, threads
        self.session: Session | None = None

    def use(self, work: Callable[[Session], R]) -> R:
        """Run a job on the board. BoardError for whatever goes wrong there; the session is given up then."""
        import time

        if self.session is None or self.session.ends - time.monotonic() < self.limit:
            self.session = None
            self.session = Session(self.rpc, _LIVES * self.limit, self.wait, self.threads)
        try:
            return work(self.session)
        except Exception as error:
            address, self.session = self.session.address, None
            raise BoardError(f"on board {address}: {last_line(error)}") from None


class _Trial:
    """Build, upload and time one schedule after another; lives in a child process."""

    def __init__(self, profile: Profile, limits: Limits) -> None:
        self.profile = profile
        self.lent = _Lent(rpc_of(profile), limits.trial, limits.wait, profile.cores)

    def __call__(self, job: Job) -> float:
        from tvm.target import Target

        executable = compile_function(job.build(), Target(dict(self.profile.target)))
        library = temporary_library(executable, self.profile.target)
        return self.lent.use(lambda session: self._time(session, library, random_arrays(job.function, _LARGE)))

    def _time(self, session: Session, library: bytes, arrays: Sequence[np.ndarray]) -> float:
        arguments = [
            session.random_array(array.shape, str(array.dtype))
            if array.nbytes > _LARGE and array.dtype.kind == "f"
            else session.array(array)
            for array in arrays
        ]
        module = session.load(library)
        once = module.time_evaluator("main", session.device, number=1, repeat=2)(*arguments).results[-1]
        number = int(min(max(_SECONDS / max(once, 1e-8), 1), 10_000))
        return float(min(module.time_evaluator("main", session.device, number=number, repeat=3)(*arguments).results))


@dataclass(frozen=True)
class _Timed:
    """What timing a module on a board gives back."""

    samples: tuple[float, ...]
    address: str
    clock_hz: float | None = None
    full_clock_hz: float | None = None


class RemoteModel:
    """A linked module of tuned kernels; ``run`` and ``time`` upload it to a board and run it there, in TVM's virtual machine."""

    checked_inputs = 16

    def __init__(
        self,
        library: bytes,
        profile: Profile,
        kernels: Sequence[KernelTime] = (),
        limits: Limits | None = None,
        memory: int | None = None,
    ) -> None:
        self.library = library
        self.profile = profile
        self.kernels = tuple(kernels)
        self.limits = limits or Limits()
        self.memory = memory

    @classmethod
    def load(cls, path: str | Path, profile: Profile, limits: Limits | None = None) -> RemoteModel:
        """Read what ``save`` wrote; whether it is a compiled module shows on the board. UsageError if it cannot be read."""
        try:
            return cls(Path(path).read_bytes(), profile, limits=limits)
        except OSError as error:
            raise UsageError(f"{path} is not a compiled model: {error.strerror}") from error

    def run(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Compute the outputs on a board. BoardError if two tries fail."""
        result: torch.Tensor | tuple[torch.Tensor, ...] = self.run_each([inputs])[0]
        return result

    def run_each(self, inputs: Sequence[tuple[torch.Tensor, ...]]) -> list[Any]:
        """``run`` for several input tuples, in one session."""
        import torch

        arrays = [_arrays(arguments) for arguments in inputs]

        def job(session: Session) -> list[Any]:
            machine = _machine(session, self.library)
            return [_outputs(machine, [session.array(array) for array in arguments]) for arguments in arrays]

        outputs = self._on_a_board(job)
        return [
            torch.from_numpy(output) if not isinstance(output, tuple) else tuple(map(torch.from_numpy, output))
            for output in outputs
        ]

    def save(self, path: str | Path) -> Path:
        """Write the shared library that the board loads."""
        Path(path).write_bytes(self.library)
        return Path(path)

    def reload(self, path: str | Path) -> RemoteModel:
        """Read what ``save`` wrote."""
        return RemoteModel.load(path, self.profile, self.limits)

    def time(self, *inputs: torch.Tensor) -> Latency:
        """Measure one inference on a board: warmed up, 20 samples of about 10 ms. BoardError if two tries fail."""
        return time_in_turn([self], inputs)[0]

    def tail(self, *inputs: torch.Tensor) -> dict[str, float]:
        """None: over the network a single inference is not told from the call."""
        return {}

    def _on_a_board(self, job: Callable[[Session], Any]) -> Any:
        return on_a_board(rpc_of(self.profile), job, self.limits, self.profile.cores)


def time_in_turn(models: Sequence[RemoteModel], inputs: tuple[torch.Tensor, ...], repeats: int = 20) -> list[Latency]:
    """Measure one inference of each of several models on one board, sample after sample in turn. BoardError if two tries fail."""
    arrays = _arrays(inputs)

    def job(session: Session) -> list[_Timed]:
        arguments = [session.array(array) for array in arrays]
        runs = []
        for model in models:
            machine = _machine(session, model.library)
            warm = machine.time_evaluator("main", session.device, number=2, repeat=3)(*arguments)
            number = int(min(max(_MODULE_SECONDS / max(min(warm.results), 1e-7), 1), 100_000))
            runs.append((machine, number))
        turns = 1 if len(models) == 1 else repeats  # each turn is a call over the network
        samples: list[list[float]] = [[] for _ in models]
        for _ in range(turns):
            for (machine, number), taken in zip(runs, samples, strict=True):
                timed = machine.time_evaluator("main", session.device, number=number, repeat=repeats // turns)
                taken += map(float, timed(*arguments).results)
        facts = read_board(session)
        return [_Timed(tuple(taken), session.address, facts.clock_hz, facts.full_clock_hz) for taken in samples]

    first = models[0]
    latencies = []
    for model, timed in zip(models, first._on_a_board(job), strict=True):
        middle, spread = median_and_spread(list(timed.samples))
        device = _describe(model.profile, timed)
        profile = model.profile
        latencies.append(
            Latency(
                middle, spread, "measured", profile.name, device, timed.samples, model.kernels,
                memory=model.memory, watts=profile.watts,
            )
        )  # fmt: skip
    return latencies


class RpcDevice:
    """Compiles here, checks and times on the boards of one profile's key. UsageError if none can be reached.

    ``profile`` is what the boards can run: what they lack is withdrawn, and ``notes`` says so.
    """

    def __init__(self, profile: Profile, store: KernelStore | None = None, limits: Limits | None = None) -> None:
        rpc = rpc_of(profile)
        boards_of(rpc)
        self.limits = limits or Limits()
        facts = on_a_board(rpc, lambda session: read_board(session, profile), self.limits)
        self.profile, self.notes = fit_to_board(profile, facts)
        self.store = KernelStore.open(self.profile) if store is None else store  # an empty one is falsy
        self.tuner = Tuner(self.profile, self.store, RpcTimer(self.profile, self.limits))
        self.model = latency_model(self.profile, self.tuner)

    def compile(self, model: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]]) -> RemoteModel:
        """Build a module for the shapes of the first inputs and compare what the board computes with torch on all of them.

        MismatchError names the first layer that differs; BoardError, ExportError.
        """
        compiled = self._build(model, inputs[0])
        answers = iter(compiled.run_each(inputs))
        check_compiled(model, lambda *_: next(answers), inputs, lambda m: self._build(m, inputs[0]).run)
        return compiled

    def time(self, compiled: Compiled, example_inputs: tuple[torch.Tensor, ...]) -> Latency:
        """Measure a module; a noisy measurement is taken twice and the quieter one kept."""
        return quieter(lambda: [compiled.time(*example_inputs)])[0]

    def time_in_turn(self, modules: Sequence[Compiled], example_inputs: tuple[torch.Tensor, ...]) -> list[Latency]:
        """Measure modules in turn on one board, as ``time`` measures one."""
        return time_in_turn([module for module in modules if isinstance(module, RemoteModel)], example_inputs)

    def _build(self, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> RemoteModel:
        import tvm

        from autocomp.compiler.build import schedule

        scheduled = schedule(model, inputs, self.profile, self.tuner)
        library = temporary_library(tvm.compile(scheduled.module, self.tuner.target), self.profile.target)
        return RemoteModel(library, self.profile, scheduled.kernels, self.limits, scheduled.memory)


def board_of(profile: Profile, limits: Limits | None = None) -> RpcDevice | None:
    """The boards that an estimated profile states beside its core model, or None where it states none.

    UsageError, BoardError if it states some and none can be reached.
    """
    return RpcDevice(replace(profile, reach="rpc"), limits=limits) if profile.rpc else None


def on_a_board(rpc: Rpc, job: Callable[[Session], R], limits: Limits, threads: int = 1) -> R:
    """Run a job on a free board, in a child process with a time limit; another try if that board is lost. BoardError."""
    lent = _Lent(rpc, limits.module, limits.wait, threads)
    (outcome,) = attempt_shared([job], lent.use, 1, limits.module + limits.wait)
    if outcome.failure:
        raise BoardError(outcome.failure)
    found: Any = outcome.value
    result: R = found
    return result


def rpc_of(profile: Profile) -> Rpc:
    """Where a profile's boards are lent. UsageError if it does not say."""
    if profile.rpc is None:
        raise UsageError(
            f"profile {profile.name!r} states no board (rpc: {{tracker: host:port, key: ...}}): give it one in its file"
        )
    return profile.rpc


def _machine(session: Session, library: bytes) -> Any:
    from tvm import relax

    return relax.VirtualMachine(session.load(library), session.device)


def _arrays(inputs: Sequence[torch.Tensor]) -> list[np.ndarray]:

    from autocomp.graph.plain import plain_tensor

    return [plain_tensor(tensor).detach().contiguous().numpy() for tensor in inputs]


def _outputs(machine: Any, arguments: list[Any]) -> Any:
    """Run a module once and fetch what it returns; a tuple can only be read field by field over RPC."""
    machine.set_input("main", *arguments)
    machine.invoke_stateful("main")
    result = machine.get_outputs("main")
    return result.numpy() if hasattr(result, "numpy") else tuple(field.numpy() for field in result)


def _describe(profile: Profile, timed: _Timed) -> str:
    threads = f"{profile.cores} thread{'s' if profile.cores > 1 else ''}"
    text = f"{profile.target.get('mcpu', '')} at {timed.address}, {threads}".strip()
    if timed.clock_hz and timed.full_clock_hz and timed.clock_hz < _SLOWED * timed.full_clock_hz:
        text += f", slowed down to {timed.clock_hz / 1e9:.2f} of {timed.full_clock_hz / 1e9:.2f} GHz (heat or power)"
    return text
