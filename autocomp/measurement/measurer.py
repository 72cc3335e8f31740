"""Told candidates → measured ones: compiled, checked and timed on every target, and their metric read."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autocomp.cache import unwritable_reason
from autocomp.devices.device import Compiled, Device, quieter
from autocomp.errors import AutocompError, last_line
from autocomp.hardware.profile import Profile
from autocomp.measurement.preflight import Rehearsed
from autocomp.measurement.side_by_side import side_by_side
from autocomp.processes.pool import cores
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.records.latency import Latency
from autocomp.tasks.reading import Metrics
from autocomp.tasks.task import Task, evaluate_task

if TYPE_CHECKING:
    import torch

    Stitch = Callable[[Candidate], torch.nn.Module]


TOGETHER = 4  # at most, each of which holds a model and its module in memory


class Measurer:
    """Measures candidates of one task on its targets; ``stitch`` makes their models.

    ``together`` is how many are measured side by side: each in a process of its own on a core of its own, but for the timing. TVM's threads
    do not live through a fork, so where a target of this machine has several it is one, measured in this process.
    """

    def __init__(
        self,
        task: Task,
        devices: Mapping[str, Device],
        inputs: Sequence[tuple[torch.Tensor, ...]],
        stitch: Stitch,
    ) -> None:
        self.task, self.devices, self.inputs, self.stitch = task, devices, inputs, stitch
        self.names: tuple[str, ...] | None = None  # of dense's metrics, once they are known: no model may have others
        self.rehearsed: Rehearsed | None = None  # dense, where it was compiled and judged before
        self.dense_seconds: Mapping[
            str, float
        ] = {}  # by profile, as it was first timed: what the times of candidates are brought to
        self._bases: dict[str, Compiled] = {}
        self.dense_metrics: Metrics | None = None  # as last read: what a candidate lost is told sample by sample
        profiles = [device.profile for device in devices.values()]
        self.here, self.together = measured_here(profiles), together(profiles)

    def measure_dense(self, evaluation: Evaluation) -> Evaluation:
        """Measure the uncompressed model in this process. AutocompError if it cannot be compiled, differs from torch, or has no metric."""
        start = time.perf_counter()
        if self.rehearsed is None:
            model = self.stitch(evaluation.candidate)
            compiled, metrics = self._compile(model), evaluate_task(self.task, model)
        else:
            compiled, metrics = dict(self.rehearsed.compiled), self.rehearsed.metrics
        latency = {name: device.time(compiled[name], self.inputs[0]) for name, device in self.devices.items()}
        spent = evaluation.seconds_spent + time.perf_counter() - start
        self.dense_metrics = metrics
        self.dense_seconds = {name: found.seconds for name, found in latency.items()}
        return self._measured(evaluation, latency, metrics, spent)

    def _measured(
        self, evaluation: Evaluation, latency: Mapping[str, Latency], metrics: Metrics, spent: float
    ) -> Evaluation:
        errors, drop_errors = metrics.errors(), metrics.drop_errors(self.dense_metrics)
        return replace(
            evaluation, state="measured", latency=latency, metrics=metrics, seconds_spent=spent, errors=errors,
            drop_errors=drop_errors if evaluation.source != "dense" else {},
        )  # fmt: skip

    def dense_module(self, name: str) -> Compiled:
        """The uncompressed model compiled for a profile; once, where it was not yet."""
        if self.rehearsed is not None:
            return self.rehearsed.compiled[name]
        if name not in self._bases:
            self._bases[name] = self.devices[name].compile(self.task.model, self.inputs)
        return self._bases[name]

    def measure_all(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """Measure up to ``together`` candidates; a failure is recorded with its candidate."""
        for name in self._timed_in_turn():
            self.dense_module(name)  # here, before processes are forked
        if self.here:
            return [self._tried(evaluation) for evaluation in evaluations]
        start = time.perf_counter()
        metrics: list[Metrics | str] = []

        def read_metrics() -> None:  # here, not in the forked processes: what evaluates may not bear that
            metrics.extend(self._metrics(evaluation.candidate) for evaluation in evaluations)

        tuners = {name: device.tuner for name, device in self.devices.items()}
        timed = side_by_side([e.candidate for e in evaluations], self._time, tuners, read_metrics)
        spent = (time.perf_counter() - start) / len(evaluations)
        done = []
        for evaluation, (latency, failure), read in zip(evaluations, timed, metrics, strict=True):
            evaluation = replace(evaluation, seconds_spent=evaluation.seconds_spent + spent)
            if latency is None or isinstance(read, str):
                done.append(replace(evaluation, state="failed", failure=failure or str(read)))
            else:
                done.append(self._measured(evaluation, latency, read, evaluation.seconds_spent))
        return done

    def _tried(self, evaluation: Evaluation) -> Evaluation:
        start = time.perf_counter()
        try:
            latency = self._time(evaluation.candidate, lambda: None)
            metrics = evaluate_task(self.task, self.stitch(evaluation.candidate), names=self.names)
        except Exception as error:
            return replace(evaluation, state="failed", failure=reason_of(error))
        return self._measured(evaluation, latency, metrics, evaluation.seconds_spent + time.perf_counter() - start)

    def _metrics(self, candidate: Candidate) -> Metrics | str:
        try:
            return evaluate_task(self.task, self.stitch(candidate), names=self.names)
        except Exception as error:
            return reason_of(error)

    def _time(self, candidate: Candidate, alone: Callable[[], None]) -> dict[str, Latency]:
        compiled = self._compile(self.stitch(candidate))
        alone()
        in_turn = self._timed_in_turn()
        return {
            name: self._in_turn(name, compiled[name])
            if name in in_turn
            else device.time(compiled[name], self.inputs[0])
            for name, device in self.devices.items()
        }

    def _timed_in_turn(self) -> list[str]:
        """The profiles on which candidates are timed in turn with the uncompressed model: what is timed on this machine."""
        return [
            name
            for name, device in self.devices.items()
            if device.profile.reach == "local" and name in self.dense_seconds
        ]

    def _in_turn(self, name: str, module: Compiled) -> Latency:
        """The latency of a module as it would have been when the uncompressed model was first timed."""
        device, modules = self.devices[name], [self.dense_module(name), module]
        dense, own = quieter(lambda: device.time_in_turn(modules, self.inputs[0]))
        drift = self.dense_seconds[name] / dense.seconds
        samples = tuple(sample * drift for sample in own.samples)
        return replace(own, seconds=own.seconds * drift, samples=samples, drift=drift)

    def _compile(self, model: torch.nn.Module) -> dict[str, Compiled]:
        return {name: device.compile(model, self.inputs) for name, device in self.devices.items()}


def measured_here(profiles: Iterable[Profile]) -> bool:
    """Whether candidates are measured in the searching process: a target of this machine has several threads."""
    return any(profile.reach == "local" and profile.cores > 1 for profile in profiles)


def together(profiles: Iterable[Profile]) -> int:
    """How many candidates are measured side by side on such targets."""
    return 1 if measured_here(profiles) else min(cores(), TOGETHER)


def reason_of(error: Exception) -> str:
    """Why a candidate failed, in one line; the rest goes to the run's log."""
    if isinstance(error, AutocompError):
        return str(error)
    if isinstance(error, OSError) and unwritable_reason(error):
        raise error  # the next one would fail alike
    traceback.print_exc()
    return f"{type(error).__name__}: {last_line(error)}"
