"""The end of a run: choose the front, read the test split, write and verify the models, measure the references, write the records."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.accuracy.sensitivity import curves
from autocomp.cache import write_atomically
from autocomp.errors import AutocompError, BoardError, InfeasibleError
from autocomp.export import MANIFEST, WEIGHTS, export_point
from autocomp.pipeline import Pipeline
from autocomp.records import FORMAT_VERSION, Evaluation, Reference, reference_from_json, reference_to_json
from autocomp.remeasure import remeasured
from autocomp.report.data import FrontPoint, LayerInfo, Run, Summary, TaskInfo, write_evaluations, write_front
from autocomp.search.goals import feasible
from autocomp.search.pareto import pareto_set
from autocomp.task import evaluate_task, objective_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autocomp.devices.device import Compiled
    from autocomp.devices.local import LocalDevice

PACKAGES = ("autocomp", "torch", "apache-tvm", "apache-tvm-ffi", "onnxruntime", "optuna", "numpy")


def finish(pipeline: Pipeline) -> Path:
    """Turn what a pipeline measured into the run folder's files; returns the folder.

    InfeasibleError, after everything is written, if no measured candidate meets the goals.
    """
    run = _make_run(pipeline)
    folder = pipeline.folder
    write_evaluations(folder, pipeline.search.told)
    write_provenance(folder, pipeline)
    write_front(folder, run)
    goals = pipeline.settings.goals
    dense = run.dense.evaluation
    task = run.task
    if not any(feasible(p.evaluation, dense, goals, task.objective, task.higher_is_better) for p in run.front):
        raise InfeasibleError(
            f"no measured candidate meets the goals ({_goals_text(goals)}); the front nearest to them is in {folder / 'report.html'}. "
            "Loosen a goal, widen the search space, or raise --trials and --measure"
        )
    return folder


def choose_front(measured: Sequence[Evaluation], objective: str, higher_is_better: bool) -> list[Evaluation]:
    """Measured evaluations that no other dominates in (objective, latency) on at least one profile, fast to slow."""
    sign = -1.0 if higher_is_better else 1.0
    chosen: dict[int, Evaluation] = {}
    profiles = list(measured[0].latency) if measured else []
    for profile in profiles:
        points = np.array([(sign * e.metrics[objective], e.latency[profile].seconds) for e in measured])
        for index in pareto_set(points):
            chosen[measured[index].trial] = measured[index]
    return sorted(chosen.values(), key=lambda e: e.latency[profiles[0]].seconds)


def _make_run(pipeline: Pipeline) -> Run:
    task, told = pipeline.task, pipeline.search.told
    dense = pipeline.dense()
    objective = objective_of(task, dense.metrics)
    measured = [evaluation for evaluation in told if evaluation.state == "measured"]
    front = choose_front(measured, objective, task.higher_is_better)
    dense, *front = remeasured(pipeline, [dense, *front])
    with pipeline.progress.stage("writing and verifying models", len(front)) as stage:
        points = []
        for evaluation in front:
            points.append(_point(pipeline, evaluation))
            stage.advance()
    dense_point = next((p for p in points if p.evaluation.trial == dense.trial), None) or FrontPoint(
        dense, _test(pipeline, dense)
    )
    references = _references(pipeline)
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    return Run(
        task=TaskInfo(task.name, task.description, objective, task.higher_is_better, parameters, dense.bytes),
        profiles={name: _profile_line(device.profile) for name, device in pipeline.devices.items()},
        dense=dense_point,
        front=tuple(points),
        baselines=tuple(evaluation for evaluation in measured if evaluation.source == "uniform"),
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


def _point(pipeline: Pipeline, evaluation: Evaluation) -> FrontPoint:
    """Write, read back and check one front point. What was done before (a resumed run) is done again: weights are cheap."""
    model = pipeline.stitch(evaluation.candidate)
    compiled: dict[str, Compiled | BoardError] = {}
    for name, device in pipeline.devices.items():
        try:
            compiled[name] = device.compile(model, pipeline.inputs)
        except BoardError as error:  # was there while searching: the point stands as measured, its file as failed
            compiled[name] = error
    place = Path("models") / evaluation.candidate.id
    verified = export_point(evaluation, model, compiled, pipeline.inputs, pipeline.folder / place)
    files = {"manifest": MANIFEST, "weights": WEIGHTS, "so": "model.so", "onnx": "model.onnx"}
    present = {kind: str(place / name) for kind, name in files.items() if (pipeline.folder / place / name).exists()}
    return FrontPoint(evaluation, _test(pipeline, evaluation), verified, present)


def _test(pipeline: Pipeline, evaluation: Evaluation) -> dict[str, float]:
    """The metrics on the held-out split, read once for each point and then kept in the study."""
    if pipeline.task.test is None:
        return {}
    key = f"test:{evaluation.candidate.id}"
    stored = pipeline.search.get_attr(key)
    if stored is None:
        stored = evaluate_task(pipeline.task, pipeline.stitch(evaluation.candidate), split="test")
        pipeline.search.set_attr(key, stored)
    return dict(stored)


def _references(pipeline: Pipeline) -> list[Reference]:
    """ONNX Runtime on the same model, measured once a run; a reference that fails is a warning, not the end."""
    from autocomp.devices.local import LocalDevice
    from autocomp.references import measure_references

    if not pipeline.settings.references:
        return []
    stored = pipeline.search.get_attr("references")
    if stored is None:
        with pipeline.progress.stage("measuring references"):
            device = next((d for d in pipeline.devices.values() if isinstance(d, LocalDevice)), None)
            if device is None:  # ONNX Runtime runs here: beside an estimate or a board it would compare nothing
                return []
            try:
                compiled = device.compile(pipeline.task.model, pipeline.inputs)
                found = measure_references(pipeline.task, compiled, pipeline.settings.calibration_samples)
                found += _classic(pipeline, device)
            except (AutocompError, RuntimeError, TypeError, ValueError) as error:
                pipeline.progress.warn(f"ONNX Runtime could not be measured as a reference: {error}")
                return []
        stored = [reference_to_json(reference) for reference in found]
        pipeline.search.set_attr("references", stored)
    return [reference_from_json(reference) for reference in stored]


def _classic(pipeline: Pipeline, device: LocalDevice) -> list[Reference]:
    """Uniform L1 and global magnitude pruning, compiled and timed as the front is. One that fails is a warning."""
    from autocomp.classic import classic_models

    found = []
    with tempfile.TemporaryDirectory() as temporary:
        models = classic_models(
            pipeline.task.model, pipeline.graph, pipeline.space, pipeline.statistics, Path(temporary)
        )
        for classic in models:
            try:
                latency = device.time(device.compile(classic.model, pipeline.inputs), pipeline.inputs[0])
            except (AutocompError, RuntimeError) as error:
                pipeline.progress.warn(f"{classic.name} could not be measured: {error}")
                continue
            metrics = evaluate_task(pipeline.task, classic.model)
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
        seconds=dict(pipeline.progress.seconds),
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
    from autocomp.devices.timing import UNSTABLE

    warnings = list(pipeline.progress.warnings)
    for point in points:
        for kind, check in point.verified.items():
            if not check.ok:
                warnings.append(f"{point.evaluation.candidate.id}: {kind} failed: {check.note}")
        for name, latency in point.evaluation.latency.items():
            if latency.spread > UNSTABLE:
                warnings.append(
                    f"{point.evaluation.candidate.id} on {name}: latency varied by {latency.spread:.0%} between repeats; other work on "
                    "the machine disturbs measurements"
                )
    return list(dict.fromkeys(warnings))


def write_provenance(folder: Path, pipeline: Pipeline) -> Path:
    """Write what the numbers depend on: versions, processor, governor, seed, git, and the fits of the latency models."""
    data = {
        "format_version": FORMAT_VERSION,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": next(
            (d.profile.device for d in pipeline.devices.values() if d.profile.device), platform.machine()
        ),
        "cpus": os.cpu_count(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "load_average": os.getloadavg()[0],
        "seed": pipeline.settings.seed,
        "git": _git(),
        "space_size": str(pipeline.space.size),
        "kernels": {
            name: {
                "stored": len(device.store),
                "tuned_now": device.tuner.tuned,
                "trials_now": device.tuner.trials,
                "kernel_model_error": device.model.kernel_error,
                "module_model_error": device.model.module_error,
                "peak_per_second": device.model.peaks,
            }
            for name, device in pipeline.devices.items()
        },
    }
    path = folder / "provenance.json"
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())
    return path


def _profile_line(profile: Any) -> str:
    from autocomp.compiler.build import describe_device

    return f"{profile.description} ({describe_device(profile)})"


def _goals_text(goals: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in goals.model_dump().items() if value is not None) or "none"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _git() -> str:
    """The commit of the working folder, with ``-dirty`` where it has changes; empty outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
