"""Front points → their files, several points side by side; and their times beside dense's, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from autocomp.cache import unwritable_reason
from autocomp.devices.local import LocalDevice
from autocomp.export.files import ONNX, export_point, files_of, library_of
from autocomp.export.onnx import onnx_runner
from autocomp.hardware.timing import steady
from autocomp.measurement.deployed import SECONDS, read_deployed
from autocomp.measurement.measurer import reason_of
from autocomp.measurement.side_by_side import side_by_side
from autocomp.processes.outcome import Outcome
from autocomp.records.evaluation import Evaluation
from autocomp.records.latency import Latency
from autocomp.records.run import Deployed, FrontPoint, Verified

if TYPE_CHECKING:
    import torch

    from autocomp.devices.device import Compiled, Device
    from autocomp.run.found import Found
    from autocomp.run.prepare import Prepared


APART = 0.2  # of the time of one inference: by more, two ways to take it disagree. Chosen by hand, not measured


def write_points(prepared: Prepared, evaluations: Sequence[Evaluation]) -> list[FrontPoint]:
    """Write, read back and check the files of candidates, without their test metrics.

    What was done before (a resumed run) is done again: weights are cheap. A point for which that fails as a whole stands as measured, its
    files as failed.
    """
    together = prepared.measurer.together
    points: list[FrontPoint] = []
    with prepared.progress.stage("writing and verifying models", len(evaluations)) as stage:
        for first in range(0, len(evaluations), together):
            group = evaluations[first : first + together]
            for evaluation, (verified, failure) in zip(group, _written(prepared, group), strict=True):
                if isinstance(verified, OSError):
                    raise verified
                checks = verified if verified is not None else {"so": Verified(False, note=failure)}
                points.append(FrontPoint(evaluation, {}, checks, _files(prepared, evaluation)))
                stage.advance()
    return points


def timed_in_turn(
    prepared: Prepared, found: Found, dense: Evaluation, evaluations: Sequence[Evaluation]
) -> list[Evaluation]:
    """Dense and the evaluations with latencies taken anew from their written libraries, in turn, where a target can be timed.

    Times while searching were taken minutes apart, and a machine's speed drifts. They are kept as ``earlier``. A target that cannot be
    timed now keeps them, with a warning.
    """
    renewed = [dense, *evaluations]
    for name, device in prepared.devices.items():
        if device.profile.reach == "estimate":
            continue
        with prepared.progress.stage("timing the front beside dense"):
            try:
                renewed = _again(prepared, name, device, renewed)
            except Exception as error:
                prepared.progress.warn(f"the front was not timed again on {name}: {reason_of(error)}")
    for evaluation in {e.trial: e for e in renewed if e.earlier}.values():
        found.search.update(evaluation.trial, evaluation)
    return renewed


def read_as_deployed(prepared: Prepared, points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """The points with the metric of what was written for each profile: of the library itself where it can be run here or on its board, of the
    ONNX file where the library would have to be emulated. With ``minutes``, half of what is left of them may be spent on it."""
    seconds = min(SECONDS, prepared.budget.left() / (2 * max(1, len(points)) * len(prepared.devices)))
    if seconds <= 0:
        return list(points)
    runners = {name: _runner(prepared, name) for name in prepared.devices}
    found = []
    with prepared.progress.stage("reading the metric of what was written", len(points)) as stage:
        for point in points:
            place = prepared.folder / "models" / point.evaluation.candidate.id
            model = prepared.stitch(point.evaluation.candidate)
            read = {
                name: _deployed(prepared, point, model, place / file, runner, seconds)
                for name, (file, runner) in runners.items()
                if (place / file).exists()
            }
            found.append(replace(point, deployed=read))
            stage.advance()
    return found


def _runner(prepared: Prepared, name: str) -> tuple[str, Callable[[Path], Callable[..., object]]]:
    """The file that stands for a profile, and what makes it a function of input tensors."""
    if prepared.devices[name].profile.reach == "estimate":
        return ONNX, onnx_runner

    @cache
    def base() -> Compiled:
        return prepared.measurer.dense_module(name)

    return library_of(name, list(prepared.devices)), lambda path: base().reload(path).run


def _deployed(
    prepared: Prepared,
    point: FrontPoint,
    model: torch.nn.Module,
    path: Path,
    runner: Callable[[Path], Callable[..., object]],
    seconds: float,
) -> Deployed:
    try:
        run = runner(path)
    except Exception as error:
        return Deployed(path.name, note=f"not read: {reason_of(error)}")
    return read_deployed(prepared.task, point.evaluation, model, run, path.name, seconds)


def _again(prepared: Prepared, name: str, device: Device, evaluations: list[Evaluation]) -> list[Evaluation]:
    """The evaluations with new latencies on one profile; one without a library, which was reported, keeps what it has."""
    dense = evaluations[0]
    base: Compiled = prepared.measurer.dense_module(name)
    modules: dict[int, Compiled] = {dense.trial: base}
    file = library_of(name, list(prepared.devices))
    for evaluation in evaluations[1:]:
        path = prepared.folder / "models" / evaluation.candidate.id / file
        if evaluation.trial != dense.trial and path.exists():
            modules[evaluation.trial] = base.reload(path)
    taken = steady(lambda: device.time_in_turn(list(modules.values()), prepared.inputs[0]))
    latencies = {
        trial: with_tail(latency, module.tail(*prepared.inputs[0]))
        for (trial, module), latency in zip(modules.items(), taken, strict=True)
    }
    if isinstance(device, LocalDevice):
        joules = zip(latencies, device.energies(list(modules.values()), prepared.inputs[0]), strict=False)
        latencies |= {trial: replace(latencies[trial], joules=e.joules, joules_spread=e.spread) for trial, e in joules}

    def renewed(evaluation: Evaluation) -> Evaluation:
        if evaluation.trial not in latencies:
            return evaluation
        before = evaluation.latency[name]
        # read back from a file, a module does not know its kernels; its profile may be named by a file of the user's
        after = replace(
            latencies[evaluation.trial], kernels=before.kernels, profile=before.profile, memory=before.memory
        )
        earlier = {name: before, **evaluation.earlier}
        return replace(evaluation, latency={**evaluation.latency, name: after}, earlier=earlier)

    return [renewed(evaluation) for evaluation in evaluations]


def with_tail(latency: Latency, tail: Mapping[str, float]) -> Latency:
    """A latency with percentiles of single inferences, which check it: averages over many have in them what took the core meanwhile.

    Where most single inferences were much faster, the averages were disturbed, however alike they are; where they were much slower, they were.
    """
    if not tail:
        return latency
    ratio = tail["p50"] / latency.seconds
    if ratio > 1 + APART:
        return latency
    return replace(latency, tail=tail, noisy=latency.noisy or ratio < 1 - APART)


def _written(prepared: Prepared, evaluations: Sequence[Evaluation]) -> list[Outcome[dict[str, Verified] | OSError]]:
    """What was found of each point's files, or None and why they could not be written; the error of a place that cannot be written to."""
    if prepared.measurer.here:
        found: list[Outcome[dict[str, Verified] | OSError]] = []
        for evaluation in evaluations:
            try:
                found.append(Outcome(_write(prepared, evaluation)))
            except Exception as error:
                found.append(Outcome(None, reason_of(error)))
        return found

    def work(evaluation: Evaluation, _alone: Callable[[], None]) -> dict[str, Verified] | OSError:
        return _write(prepared, evaluation)

    tuners = {name: device.tuner for name, device in prepared.devices.items()}
    return side_by_side(evaluations, work, tuners, lambda: None)


def _write(prepared: Prepared, evaluation: Evaluation) -> dict[str, Verified] | OSError:
    model = prepared.stitch(evaluation.candidate)
    compiled: dict[str, Compiled | Exception] = {}
    for name, device in prepared.devices.items():
        try:
            compiled[name] = device.compile(model, prepared.inputs)
        except Exception as error:  # a board is gone, or worse: the point stands as measured, its file as failed
            compiled[name] = error
    folder = prepared.folder / "models" / evaluation.candidate.id
    try:
        return export_point(evaluation, model, compiled, prepared.inputs, folder)
    except OSError as error:
        # a full disk ends the run: handed over as a value, for of a failure only a line of text crosses processes
        if unwritable_reason(error) is None:
            raise
        return OSError(error.errno, error.strerror, error.filename)


def _files(prepared: Prepared, evaluation: Evaluation) -> dict[str, str]:
    """The files of a point that are there, by kind, as paths in the run folder."""
    place = Path("models") / evaluation.candidate.id
    files = files_of(list(prepared.devices))
    return {kind: str(place / name) for kind, name in files.items() if (prepared.folder / place / name).exists()}
