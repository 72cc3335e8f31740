"""What a target must offer a search, and the one place that opens it, however it is reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from autocomp.devices.latency import LatencyModel
from autocomp.hardware.profile import Profile
from autocomp.records.latency import KernelTime, Latency
from autocomp.records.precisions import ARITHMETICS, FLOAT32, FORMATS
from autocomp.tuning.store import KernelStore
from autocomp.tuning.tune import Tuner

if TYPE_CHECKING:
    import torch

_ANOTHER_TRY = 0.05  # a spread above this is measured once more, and the quieter of the two is kept


class Compiled(Protocol):
    """A module of tuned kernels for one profile, checked against torch; ``kernels`` are the calls of one inference.

    ``checked_inputs`` is the most inputs it is worth comparing with torch on: emulation takes as long as thousands of inferences.
    """

    profile: Profile
    kernels: tuple[KernelTime, ...]
    checked_inputs: int

    def run(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Compute the outputs, on the target or by emulating its code."""
        ...

    def save(self, path: str | Path) -> Path:
        """Write the shared library that the target loads."""
        ...

    def reload(self, path: str | Path) -> Compiled:
        """Load what ``save`` wrote, as the target would. UsageError if it is no compiled module."""
        ...

    def time(self, *inputs: torch.Tensor) -> Latency:
        """Seconds of one inference, and how they were obtained."""
        ...

    def tail(self, *inputs: torch.Tensor) -> Mapping[str, float]:
        """Percentiles of the seconds of single inferences, as `Latency.tail`; empty where they cannot be told one by one."""
        ...


class Device(Protocol):
    """A target: its profile, kernel store and tuner, the fitted latency model, and the one way to a module's latency.

    ``profile`` may offer less than the file it was read from, where the target lacks something; ``notes`` says so.
    """

    profile: Profile
    store: KernelStore
    tuner: Tuner
    model: LatencyModel
    notes: tuple[str, ...]

    def compile(self, model: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]]) -> Compiled:
        """Build a module for the shapes of the first inputs and compare it with torch. MismatchError, ExportError."""
        ...

    def time(self, compiled: Compiled, example_inputs: tuple[torch.Tensor, ...]) -> Latency:
        """``compiled.time``, once more where the samples spread too far."""
        ...

    def time_in_turn(self, modules: Sequence[Compiled], example_inputs: tuple[torch.Tensor, ...]) -> list[Latency]:
        """The latencies of several modules, sample after sample of each in turn, so that a drift of the machine meets all alike."""
        ...


def quieter(take: Callable[[], list[Latency]]) -> list[Latency]:
    """Latencies that are measured together; where one is noisy all are taken twice, and the quieter ones kept."""
    taken = take()
    return min((taken, take()), key=_worst) if _worst(taken) > _ANOTHER_TRY else taken


def _worst(latencies: list[Latency]) -> float:
    return max(latency.spread for latency in latencies)


def latency_model(profile: Profile, tuner: Tuner) -> LatencyModel:
    """The tier-0 latency model of a target, at its measured (or estimated) arithmetic peaks."""
    # without byte products among its precisions a target may have no kernel for them at all
    used = {FORMATS[precision].family.arithmetic for precision in profile.precisions} | {FLOAT32}
    peaks = {each.name: tuner.peak(each.template("dense")) if each in used else None for each in ARITHMETICS.values()}
    return LatencyModel(profile, {name: peak or 1.0 for name, peak in peaks.items()})
