"""What could fail at the end of a run is tried at its start, with the uncompressed model: compile, judge, write, read back, report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autocomp.compiler.handover import describe_outputs, describe_writing
from autocomp.devices.device import Compiled, Device
from autocomp.errors import CorruptError, UsageError, last_line
from autocomp.export.files import export_point
from autocomp.progress import Progress, Stage
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.records.latency import Latency
from autocomp.records.run import FrontPoint, Run, Summary, TaskInfo, Verified, write_front
from autocomp.records.table import write_evaluations
from autocomp.tasks.reading import Metrics, otherwise
from autocomp.tasks.task import Task, evaluate_task

if TYPE_CHECKING:
    import torch


SMALLEST = 1e-8  # of a metric that is 0 of one of two models: no reason to refuse them. Chosen by hand, not measured
ROUNDED = (
    0.02  # of a metric: what precisions and single decisions on an edge may make of it. Chosen by hand, not measured
)


@dataclass(frozen=True)
class Rehearsed:
    """The uncompressed model as a front point would be: its modules by profile, its metrics, and the seconds that its files took."""

    compiled: Mapping[str, Compiled]
    metrics: Metrics
    seconds: float


def rehearse(
    task: Task,
    devices: Mapping[str, Device],
    inputs: list[tuple[torch.Tensor, ...]],
    progress: Progress,
    given: torch.nn.Module | None = None,
) -> Rehearsed:
    """Do with the uncompressed model, in a folder that is thrown away, all that is done with a point of the front.

    ``given`` is the model as its user gave it, which the task's own metric is read of once: what is compressed must be that.
    UsageError if it cannot be judged, compiled, linked, or reported on. A file of another kind that cannot be written (ONNX, weights) is a
    warning: the front is worth having without it.
    """
    with progress.stage("trying the whole way", 4) as stage:
        if said := describe_outputs(task.model, inputs):
            stage.warn(said)
        with suppress(Exception):  # of a model on another device, or in another precision
            if given is not None and (said := describe_writing(given, inputs[0])):
                stage.warn(said)
        metrics = evaluate_task(task, task.model)
        if said := otherwise(metrics, evaluate_task(task, task.model)):
            stage.warn(
                f"Task.evaluate judges the same model otherwise when it is asked again ({said}): it draws at random, or writes to its own "
                "data; no difference within that says anything"
            )
        elif given is not None:
            _hold_to(given, task, metrics, stage)
        stage.advance(note="metric")
        start = time.perf_counter()
        compiled = {name: device.compile(task.model, inputs) for name, device in devices.items()}
        stage.advance(note="compiled")
        compiling, start = time.perf_counter() - start, time.perf_counter()
        candidate = Candidate({}, {})
        latency = {name: Latency(1.0, 0.0, "estimated", name) for name in devices}
        evaluation = Evaluation(0, candidate, "dense", "measured", 0.0, 0, metrics=metrics, latency=latency)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "models" / candidate.id
            verified = export_point(evaluation, task.model, compiled, inputs, place)
            _judge(verified, progress)
            stage.advance(note="written")
            _report(Path(folder), task, evaluation, verified)
            stage.advance(note="reported")
    writing = time.perf_counter() - start
    # at the end all kernels are tuned: most of what compiling takes now is not needed then
    return Rehearsed(compiled, metrics, writing + min(compiling, writing))


def _hold_to(given: torch.nn.Module, task: Task, metrics: Metrics, stage: Stage) -> None:
    """Hold the metrics of the canonical form to those of the model as it was given. UsageError where they are of another model.

    Sizes that a `forward` uses in Python (a length, a branch on the batch) are written down as numbers by torch.export.
    """
    try:
        theirs = evaluate_task(task, given, names=tuple(metrics), as_given=True)
    except Exception as error:  # the user's own code, of a model that need bear no copying
        stage.warn(
            f"the model as it was given was not judged, to hold its exported form to it: {type(error).__name__}: {last_line(error)}"
        )
        return
    if not (said := otherwise(theirs, metrics)):
        return
    errors = {**theirs.errors(), **metrics.drop_errors(theirs)}
    far = [
        m
        for m, value in theirs.items()
        if abs(metrics[m] - value) > max(ROUNDED * abs(value), 3 * errors.get(m, 0.0), SMALLEST)
    ]
    text = f"Task.evaluate tells the exported form of the model from the model as it was given: {said}"
    if far:
        raise UsageError(
            f"{text}. What would be compressed is another model: its forward uses what torch.export writes down as a number (a length or image "
            "size, len(x), math.log(x.shape[1]), a branch on the size of the batch), or a hook or precision of a wrapper that was taken off. "
            "Compute it with tensors (x.shape in arithmetic of tensors is fine), or let Task.calibration hold batches of every size that it is "
            "judged at"
        )
    stage.warn(text)


def _judge(verified: Mapping[str, Verified], progress: Progress) -> None:
    for kind, check in verified.items():
        if check.ok:
            continue
        if kind.startswith("so"):
            raise UsageError(f"the compiled model cannot be handed over ({kind}), so no search is begun: {check.note}")
        progress.warn(f"no model of this run will have its {kind} file: {check.note}")


def _report(folder: Path, task: Task, evaluation: Evaluation, verified: Mapping[str, Verified]) -> None:
    from autocomp.report.build import build_report

    dense = FrontPoint(evaluation, {}, verified, {})
    objective = next(iter(evaluation.metrics))
    info = TaskInfo(task.name, task.description, objective, task.higher_is_better, 0, 0, task.unit)
    run = Run(info, dict.fromkeys(evaluation.latency, ""), dense, (dense,), summary=Summary(1, 1, 0))
    try:
        write_front(folder, run)
        write_evaluations(folder, [evaluation])
        build_report(folder)
    except (UsageError, OSError):
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, CorruptError) and error.__cause__ else error
        raise UsageError(f"the report cannot be made here: {type(cause).__name__}: {last_line(cause)}") from error
