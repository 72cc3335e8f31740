"""The end of a run: choose the front, read the test split, write and verify the models, measure the references, write the records."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autocomp.accuracy.sensitivity import curves
from autocomp.errors import AutocompError, InfeasibleError
from autocomp.export.files import renew_manifest
from autocomp.front.goals import choose_front, feasible
from autocomp.measurement.boards import remeasured
from autocomp.measurement.measurer import reason_of
from autocomp.records.evaluation import Evaluation, Reference, as_searched, reference_from_json, reference_to_json
from autocomp.records.run import FrontPoint, LayerInfo, Run, Summary, TaskInfo, write_evaluations, write_front
from autocomp.run.folder import CONFIG
from autocomp.run.judged import judged_otherwise
from autocomp.run.pipeline import Pipeline
from autocomp.run.points import timed_in_turn, write_points
from autocomp.run.provenance import goals_text, profile_line, write_provenance
from autocomp.tasks.task import evaluate_task, objective_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autocomp.devices.local import LocalDevice


def finish(pipeline: Pipeline) -> Path:
    """Turn what a pipeline measured into the run folder's files; returns the folder.

    InfeasibleError, after everything is written, if no measured candidate meets the goals.
    """
    folder = pipeline.folder
    if not (folder / CONFIG).exists():
        raise AutocompError(
            f"{folder} is not there any more, or not whole: it was moved or removed while the search ran. What was told is in its study: bring "
            "the folder back and continue with --resume"
        )
    run = _make_run(pipeline)
    shown = {point.evaluation.candidate.id for point in (run.dense, *run.front)}
    for evaluation in pipeline.search.told:  # of points that were on the front when the run was last at its end
        if evaluation.candidate.id not in shown:
            shutil.rmtree(folder / "models" / evaluation.candidate.id, ignore_errors=True)
    write_evaluations(folder, pipeline.search.told)
    write_provenance(folder, pipeline)
    write_front(folder, run)
    goals = pipeline.settings.goals
    dense = run.dense.evaluation
    task = run.task
    if not any(feasible(p.evaluation, dense, goals, task.objective, task.higher_is_better) for p in run.front):
        raise InfeasibleError(
            f"no measured candidate meets the goals ({goals_text(goals)}); the front nearest to them is in {folder / 'report.html'}. "
            "Loosen a goal, widen the search space, or raise --trials and --measure"
        )
    return folder


def _make_run(pipeline: Pipeline) -> Run:
    task = pipeline.task
    objective = objective_of(task, pipeline.dense().metrics)
    dense, points = _verified_front(pipeline, objective)
    dense, points = _timed_again(pipeline, objective, dense, points)
    _check_test_data(pipeline, dense)
    points = [replace(point, test_metrics=_test(pipeline, point.evaluation)) for point in points]
    dense_point = next((p for p in points if p.evaluation.trial == dense.trial), None) or FrontPoint(
        dense, _test(pipeline, dense)
    )
    references = _references(pipeline)
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    return Run(
        task=TaskInfo(
            task.name, task.description, objective, task.higher_is_better, parameters, dense.bytes, task.unit
        ),
        profiles={name: profile_line(device.profile) for name, device in pipeline.devices.items()},
        dense=dense_point,
        front=tuple(points),
        baselines=tuple(e for e in pipeline.search.told if e.state == "measured" and e.source == "uniform"),
        references=tuple(references),
        hypervolume=tuple(pipeline.search.hypervolume()),
        summary=_summary(pipeline, objective),
        layers=tuple(
            LayerInfo(layer.name, layer.kind, layer.out_group, layer.out_channels)
            for layer in pipeline.graph.layers.values()
        ),
        warnings=tuple(_warnings(pipeline, points)),
        sensitivity=tuple(curves(pipeline.costs.tables)),
    )


def _verified_front(pipeline: Pipeline, objective: str) -> tuple[Evaluation, list[FrontPoint]]:
    """Dense, and the front with its files written and read back. A point whose module computes something else is no point.

    What it dominated takes its place. The front is chosen by the times that were taken while searching.
    """
    higher_is_better = pipeline.task.higher_is_better
    measured = [as_searched(e) for e in pipeline.search.told if e.state == "measured"]
    dense = remeasured(pipeline.measurer, [pipeline.dense()], pipeline.search.update, pipeline.progress)[0]
    written: dict[int, FrontPoint] = {}
    while True:
        front = choose_front(measured, objective, higher_is_better)
        if not (new := [e for e in front if e.trial not in written]):
            return dense, [written[e.trial] for e in front]
        others = remeasured(
            pipeline.measurer, [e for e in new if e.trial != dense.trial], pipeline.search.update, pipeline.progress
        )
        for point in write_points(pipeline, [dense, *others] if len(others) < len(new) else others):
            evaluation = point.evaluation
            written[evaluation.trial] = point
            wrong = next((check.note for kind, check in point.verified.items() if check.wrong and _decides(kind)), "")
            if wrong and evaluation.trial != dense.trial:
                pipeline.progress.warn(f"candidate {evaluation.candidate.id} failed: {wrong}")
                pipeline.search.update(evaluation.trial, replace(evaluation, state="failed", failure=wrong))
                measured = [e for e in measured if e.trial != evaluation.trial]
                shutil.rmtree(pipeline.folder / "models" / evaluation.candidate.id, ignore_errors=True)


def _decides(kind: str) -> bool:
    """Whether a point stands and falls with a file: with the module that was timed, not with what another runtime makes of it."""
    return kind.startswith("so")


def _timed_again(
    pipeline: Pipeline, objective: str, dense: Evaluation, points: list[FrontPoint]
) -> tuple[Evaluation, list[FrontPoint]]:
    """Dense and the front with times taken in turn, and without the points that are dominated by these times."""
    dense, *again = timed_in_turn(pipeline, dense, [point.evaluation for point in points])
    found = {e.trial: replace(point, evaluation=e) for point, e in zip(points, again, strict=True)}
    kept = [found[e.trial] for e in choose_front(again, objective, pipeline.task.higher_is_better)]
    for point in found.values():
        place = pipeline.folder / "models" / point.evaluation.candidate.id
        if point in kept:
            renew_manifest(place, point.evaluation)
        else:
            shutil.rmtree(place, ignore_errors=True)
    return dense, kept


def _check_test_data(pipeline: Pipeline, dense: Evaluation) -> None:
    """Where a run goes on, read the test split once more. What was kept of other data counts no longer."""
    if pipeline.task.test is None:
        return

    def kept(evaluation: Evaluation) -> dict[str, float] | None:
        found: dict[str, float] | None = pipeline.search.get_attr(_test_key(pipeline, evaluation))
        return found

    try:
        said = judged_otherwise(
            pipeline.search.told,
            dense,
            kept,
            lambda e: evaluate_task(pipeline.task, pipeline.stitch(e.candidate), split="test"),
        )
    except Exception as error:
        pipeline.progress.warn(f"Task.test failed: {reason_of(error)}; what it said before is shown")
        return
    if said:
        pipeline.progress.warn(
            f"Task.test judges {said} than before: it draws at random, or its data changed; all points are judged again on what it reads now"
        )
        pipeline.search.set_attr("test data", pipeline.search.get_attr("test data", 0) + 1)


def _test_key(pipeline: Pipeline, evaluation: Evaluation) -> str:
    """Under which the study keeps a point's test metrics; those of test data that changed since have another number."""
    return f"test:{pipeline.search.get_attr('test data', 0)}:{evaluation.candidate.id}"


def _test(pipeline: Pipeline, evaluation: Evaluation) -> dict[str, float]:
    """The metrics on the held-out split, read once for each point and then kept in the study; none, and a warning, where that fails."""
    if pipeline.task.test is None:
        return {}
    key = _test_key(pipeline, evaluation)
    stored = pipeline.search.get_attr(key)
    if stored is None:
        try:
            stored = evaluate_task(pipeline.task, pipeline.stitch(evaluation.candidate), split="test")
        except Exception as error:
            pipeline.progress.warn(f"candidate {evaluation.candidate.id} has no test metrics: {reason_of(error)}")
            return {}
        pipeline.search.set_attr(key, stored)
    return dict(stored)


def _references(pipeline: Pipeline) -> list[Reference]:
    """ONNX Runtime on the same model, measured once a run; a reference that fails is a warning, not the end."""
    from autocomp.compiler.build import CompiledModel
    from autocomp.devices.local import LocalDevice
    from autocomp.measurement.references import measure_references

    if not pipeline.settings.references:
        return []
    stored = pipeline.search.get_attr("references")
    if stored is None:
        with pipeline.progress.stage("measuring references"):
            name, device = next(((n, d) for n, d in pipeline.devices.items() if isinstance(d, LocalDevice)), ("", None))
            if device is None:  # ONNX Runtime runs here: beside an estimate or a board it would compare nothing
                return []
            if pipeline.budget.left() < 0:
                pipeline.progress.warn(
                    "the minutes were over, so no reference was measured; --resume with more of them measures them"
                )
                return []
            try:
                compiled = pipeline.measurer.dense_module(name)
                assert isinstance(compiled, CompiledModel)
                found = measure_references(
                    pipeline.task, compiled, pipeline.settings.calibration_samples, pipeline.progress.warn
                )
                found += _classic(pipeline, device)
            except Exception as error:
                pipeline.progress.warn(f"ONNX Runtime could not be measured as a reference: {reason_of(error)}")
                return []
        stored = [reference_to_json(reference) for reference in found]
        pipeline.search.set_attr("references", stored)
    return [reference_from_json(reference) for reference in stored]


def _classic(pipeline: Pipeline, device: LocalDevice) -> list[Reference]:
    """Uniform L1 and global magnitude pruning, compiled and timed as the front is. One that fails is a warning."""
    from autocomp.measurement.classic import classic_models

    found = []
    with tempfile.TemporaryDirectory() as temporary:
        models = classic_models(
            pipeline.task.model, pipeline.graph, pipeline.space, pipeline.statistics, Path(temporary)
        )
        for classic in models:
            if pipeline.budget.left() < 0:
                pipeline.progress.warn(f"the minutes were over, so {classic.name} was not measured")
                continue
            try:
                latency = device.time(device.compile(classic.model, pipeline.inputs), pipeline.inputs[0])
                metrics = evaluate_task(pipeline.task, classic.model)
            except Exception as error:
                pipeline.progress.warn(f"{classic.name} could not be measured: {reason_of(error)}")
                continue
            found.append(Reference(classic.name, metrics, latency, classic.bytes, classic.note, "classic"))
    return found


def _summary(pipeline: Pipeline, objective: str) -> Summary:
    import resource

    told = pipeline.search.told
    measured = [evaluation for evaluation in told if evaluation.state == "measured"]
    sign = -1.0 if pipeline.task.higher_is_better else 1.0
    losses = [sign * evaluation.metrics[objective] for evaluation in measured]
    correlation = {
        "tier 0 (additive error)": _spearman([e.error for e in measured], losses),
        "tier 1 (KL)": _spearman([e.kl if e.kl is not None else np.nan for e in measured], losses),
    }
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # the largest process, with what it shares with others
    peak = max(resource.getrusage(who).ru_maxrss for who in whose) * 1024  # Linux counts kilobytes
    return Summary(
        told=len(told),
        measured=len(measured),
        failed=sum(evaluation.state == "failed" for evaluation in told),
        seconds=pipeline.seconds(),
        spearman={name: value for name, value in correlation.items() if value is not None},
        peak_bytes=peak,
    )


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation; None where there are fewer than three points or one side never varies."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    value = float(spearmanr(a, b).statistic)
    return value if np.isfinite(value) else None


def _warnings(pipeline: Pipeline, points: Sequence[FrontPoint]) -> list[str]:
    from autocomp.hardware.timing import UNSTABLE

    warnings = pipeline.warnings()
    for point in points:
        for kind, check in point.verified.items():
            if not check.ok:
                warnings.append(f"{point.evaluation.candidate.id}: {kind} failed: {check.note}")
            elif check.note:
                warnings.append(f"{point.evaluation.candidate.id}: {kind}: {check.note}")
        for name, latency in point.evaluation.latency.items():
            if latency.noisy or latency.spread > UNSTABLE:
                warnings.append(
                    f"{point.evaluation.candidate.id} on {name} is noisy: its latency varied by {latency.spread:.0%} between repeats, and did "
                    "when it was repeated; other work on the machine disturbs measurements. A steadier point is recommended in its place"
                )
    return list(dict.fromkeys(warnings))
