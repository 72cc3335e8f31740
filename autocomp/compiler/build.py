"""A torch model → a compiled module of tuned kernels, checked against torch before anything else is said of it."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.compiler.expressions import calls
from autocomp.compiler.importer import export_program, import_program, unsupported
from autocomp.compiler.layout import to_channels_last
from autocomp.compiler.lower import lower
from autocomp.compiler.memory import planned_bytes
from autocomp.errors import ExportError, UsageError, last_line
from autocomp.hardware.link import link_shared
from autocomp.hardware.profile import Profile
from autocomp.hardware.timing import median_and_spread, quiet_core
from autocomp.processes.quiet import quiet_stderr
from autocomp.records.latency import KernelTime, Latency
from autocomp.tuning import forms
from autocomp.tuning.tune import Tuner

if TYPE_CHECKING:
    import torch


FEWEST = 100  # single inferences of which a 99th percentile says something


class CompiledModel:
    """A module of tuned kernels for one profile, run through TVM's virtual machine.

    ``kernels`` lists each kernel call of one inference with the seconds it took alone when it was tuned, ``memory`` the bytes one needs; of what
    was read from a file neither is known.
    """

    checked_inputs = 16

    def __init__(
        self, executable: Any, profile: Profile, kernels: Sequence[KernelTime] = (), memory: int | None = None
    ) -> None:
        import tvm
        from tvm import relax

        self.profile = profile
        self.kernels = tuple(kernels)
        self.memory = memory
        self._executable = executable
        self._device = tvm.cpu()
        self._machine = relax.VirtualMachine(executable, self._device)
        self._main = self._machine["main"]
        self._one_at_a_time = threading.Lock()  # the machine keeps what it computes in buffers of its own

    @classmethod
    def load(cls, path: str | Path, profile: Profile) -> CompiledModel:
        """Load what ``save`` wrote, as it is now. UsageError if the file is no compiled module."""
        import tvm

        try:
            # a copy: of a name that it has loaded already, the system returns what that name was then, though the file is another by now
            with tempfile.TemporaryDirectory() as place, quiet_stderr():
                copy = shutil.copyfile(path, Path(place) / "model.so")
                return cls(tvm.runtime.load_module(str(copy)), profile)
        except Exception as error:
            raise UsageError(f"{path} is not a compiled model: {str(error).splitlines()[-1]}") from error

    def run(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Compute the outputs for inputs of the shapes and types the module was compiled for; UsageError for others.

        Calls from several threads are made one after the other.
        """
        import torch

        from autocomp.graph.plain import check_tensor

        for index, tensor in enumerate(inputs):
            if not isinstance(tensor, torch.Tensor):
                raise UsageError(f"inputs[{index}] must be a tensor, got a value of type {type(tensor).__name__}")
            check_tensor(tensor, f"inputs[{index}]")
        try:
            with self._one_at_a_time:
                result = self._main(*self._arguments(inputs))
        except Exception as error:
            given = ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in inputs) or "none"
            raise UsageError(
                f"the compiled module does not take these inputs ({given}): {last_line(error)}. It takes those it was compiled for"
            ) from error
        if hasattr(result, "numpy"):
            return torch.from_numpy(result.numpy())
        return tuple(torch.from_numpy(field.numpy()) for field in result)

    def save(self, path: str | Path) -> Path:
        """Write a shared library that ``load`` (or TVM's C++ runtime) reads. AutocompError where there is no linker."""
        path = Path(path)
        with quiet_stderr():
            self._executable.export_library(str(path), fcompile=link_shared)
        return path

    def reload(self, path: str | Path) -> CompiledModel:
        """Load what ``save`` wrote."""
        return CompiledModel.load(path, self.profile)

    def prepare(self, *inputs: torch.Tensor) -> Any:
        """A call without arguments that runs the module once on these inputs, for timing side by side."""
        arguments = self._arguments(inputs)
        return lambda: self._main(*arguments)

    def time(self, *inputs: torch.Tensor, repeats: int = 20, seconds: float = 0.01) -> Latency:
        """Measure one inference: pinned, warmed up, ``repeats`` samples that each average over about ``seconds``."""
        return time_in_turn([self], *inputs, repeats=repeats, seconds=seconds)[0]

    def tail(self, *inputs: torch.Tensor, seconds: float = 2.0, most: int = 1000) -> dict[str, float]:
        """Percentiles of the seconds of single inferences, one by one; none where fewer than 100 of them fit into ``seconds``."""
        arguments = self._arguments(inputs)
        with quiet_core(self.profile.cores):
            count = int(min(most, seconds / max(min(self.sample(arguments, number=1, repeat=5)), 1e-9)))
            if count < FEWEST:
                return {}
            taken = np.array(self.sample(arguments, number=1, repeat=count))
        return {f"p{q}": float(np.percentile(taken, q)) for q in (50, 95, 99)}

    def sample(self, arguments: Sequence[Any], number: int, repeat: int) -> list[float]:
        """Seconds of one inference, ``repeat`` averages of ``number`` runs each."""
        with self._one_at_a_time:
            result = self._machine.time_evaluator("main", self._device, number=number, repeat=repeat)(*arguments)
        return [float(value) for value in result.results]

    def _arguments(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        import tvm

        from autocomp.graph.plain import plain_tensor

        return [
            tvm.runtime.tensor(plain_tensor(tensor).detach().resolve_neg().contiguous().numpy()) for tensor in inputs
        ]


def time_in_turn(
    models: Sequence[CompiledModel], *inputs: torch.Tensor, repeats: int = 20, seconds: float = 0.01
) -> list[Latency]:
    """Measure one inference of each of several models of one profile on this machine, sample after sample in turn."""
    arguments = models[0]._arguments(inputs)
    found: list[list[float]] = [[] for _ in models]
    with quiet_core(models[0].profile.cores):
        warm = [min(model.sample(arguments, number=2, repeat=3)) for model in models]
        numbers = [int(min(max(seconds / max(one, 1e-7), 1), 100_000)) for one in warm]
        turns = 1 if len(models) == 1 else repeats  # nobody to take turns with: all samples at once
        for _ in range(turns):
            for model, number, taken in zip(models, numbers, found, strict=True):
                taken += model.sample(arguments, number, repeats // turns)
    latencies = []
    for model, taken in zip(models, found, strict=True):
        middle, spread = median_and_spread(taken)
        profile, samples = model.profile, tuple(taken)
        latencies.append(
            Latency(
                middle, spread, "measured", profile.name, describe_device(profile), samples, model.kernels,
                memory=model.memory, watts=profile.watts,
            )
        )  # fmt: skip
    return latencies


def describe_device(profile: Profile) -> str:
    """One line that says what a time was taken on."""
    names = [name for name in (profile.device, str(profile.target.get("mcpu", ""))) if name]
    return f"{' '.join(names)}, {profile.cores} thread{'s' if profile.cores > 1 else ''}"


@dataclass(frozen=True)
class Scheduled:
    """A Relax module whose functions are scheduled, not yet machine code; ``kernels`` are the calls of one inference, in order, ``memory`` the
    bytes that it needs."""

    module: Any
    kernels: tuple[KernelTime, ...]
    memory: int


def schedule(
    model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], profile: Profile, tuner: Tuner
) -> Scheduled:
    """Lower a model in evaluation mode for fixed input shapes, each kernel tuned or taken from the store.

    BatchNorm is folded first, and weights that no kernel of the profile reads are decoded to float32.
    ExportError if the model cannot be exported; the caller compares with torch.
    """
    import tvm

    from autocomp.graph.canonical import canonical
    from autocomp.graph.fold import fold_batchnorm
    from autocomp.graph.program import CanonicalModel
    from autocomp.layers.decode import decoded

    given = model
    if not isinstance(model, CanonicalModel):
        model = canonical(model, example_inputs)
    program = export_program(decoded(fold_batchnorm(model), profile.precisions).eval(), example_inputs)
    try:
        imported = import_program(program, profile)
    except ExportError as error:  # the model as it was given knows its modules and lines
        faults = unsupported(export_program(given.eval(), example_inputs), profile)
        raise ExportError("\n".join(faults) or str(error)) from error
    mod = lower(to_channels_last(imported, profile.lanes), profile, tuner.target, partial(forms.choose, tuner))
    calls = _kernel_calls(mod)
    scheduled, records = dict(mod.functions.items()), {}
    kernels = [name for name, function in scheduled.items() if isinstance(function, tvm.tirx.PrimFunc)]
    for name, tuned in zip(kernels, tuner.tune_all([scheduled[name] for name in kernels]), strict=True):
        scheduled[name] = tuned.function
        records[name.name_hint] = tuned.record
    mod = tvm.IRModule(scheduled, attrs=mod.attrs, global_infos=mod.global_infos)
    times = [
        KernelTime(
            name, records[name].key, records[name].operator, records[name].seconds, records[name].flops,
            tuner.timer.how, _peak_fraction(records[name], tuner),
        )
        for name in calls if name in records
    ]  # fmt: skip
    return Scheduled(mod, tuple(times), planned_bytes(mod))


def build(
    model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], profile: Profile, tuner: Tuner
) -> CompiledModel:
    """Compile a model for this machine, as ``schedule`` lowers it."""
    import tvm

    scheduled = schedule(model, example_inputs, profile, tuner)
    return CompiledModel(tvm.compile(scheduled.module, tuner.target), profile, scheduled.kernels, scheduled.memory)


def _peak_fraction(record: Any, tuner: Tuner) -> float | None:
    peak = tuner.peak(record.operator)
    return record.flops / record.seconds / peak if peak and record.flops else None


def _kernel_calls(mod: Any) -> list[str]:
    """Names of the fused functions that one inference calls, in order, repeated as often as they are called."""
    names: list[str] = []
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            if calls(binding.value, "relax.call_tir"):
                names.append(binding.value.args[0].name_hint)
    return names
