"""The end of a run: choose the front, read the test split, write and verify the models, measure the references, write the records."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autocomp.accuracy.sensitivity import curves
from autocomp.config.settings import Settings
from autocomp.errors import AutocompError, InfeasibleError
from autocomp.export.files import renew_manifest
from autocomp.front.agreement import spearman
from autocomp.front.goals import Judge, delivered, family
from autocomp.measurement.boards import remeasured
from autocomp.records.evaluation import Evaluation, as_searched, untrained
from autocomp.records.run import FrontPoint, LayerInfo, Run, Summary, TaskInfo, write_front
from autocomp.records.table import write_evaluations
from autocomp.run.expect import expected_of
from autocomp.run.folder import CONFIG, WRITTEN
from autocomp.run.found import Found
from autocomp.run.halving import RECIPES
from autocomp.run.held_out import HeldOut
from autocomp.run.identity import profiles_identity
from autocomp.run.points import read_as_deployed, timed_in_turn, write_points
from autocomp.run.prepare import Prepared
from autocomp.run.provenance import profile_line, write_provenance
from autocomp.run.references import references
from autocomp.run.training import correlations, summary_of
from autocomp.study.deciders import deciders, kept
from autocomp.tasks.task import objective_of

if TYPE_CHECKING:
    from collections.abc import Sequence


def finish(prepared: Prepared, found: Found) -> Run:
    """Turn what was found into the run folder's files, all but the report.

    AutocompError if the folder is not there any more.
    """
    folder = prepared.folder
    if not (folder / CONFIG).exists():
        raise AutocompError(
            f"{folder} is not there any more, or not whole: it was moved or removed while the search ran. What was told is in its study: bring "
            "the folder back and continue with --resume"
        )
    run = _make_run(prepared, found)
    write_evaluations(folder, found.told)
    found.search.set_attr(WRITTEN, written := found.search.get_attr(WRITTEN, 0) + 1)
    write_provenance(prepared, written)
    write_front(folder, run)
    shown = {point.evaluation.candidate.id for point in (run.dense, *run.front)}
    for evaluation in found.told:  # of points that were on the front when the run was last at its end, and until here
        if evaluation.candidate.id not in shown:
            shutil.rmtree(folder / "models" / evaluation.candidate.id, ignore_errors=True)
    return run


def refuse_infeasible(settings: Settings, run: Run, folder: Path) -> None:
    """InfeasibleError if no point of a front meets the goals: which, and by how much."""
    judge = Judge.of(run, settings.goals)
    front = [point.evaluation for point in run.front]
    if not any(judge.feasible(evaluation) for evaluation in front):
        raise InfeasibleError(
            f"no delivered candidate meets the goals ({settings.goals}): {judge.nearest(front)}. The front nearest to them is in "
            f"{folder / 'report.html'}"
        )


def _make_run(prepared: Prepared, found: Found) -> Run:
    from autocomp.graph.fold import dense_parameters

    task = prepared.task
    objective = objective_of(task, found.dense().metrics)
    dense, points = _verified_front(prepared, found)
    dense, points = _timed_again(prepared, found, dense, points)
    points = read_as_deployed(prepared, points)
    held_out = HeldOut(prepared, found, dense)
    dense_point = held_out.read(next((p for p in points if p.evaluation.trial == dense.trial), FrontPoint(dense)))
    points = [dense_point if p.evaluation.trial == dense.trial else held_out.read(p) for p in points]
    problem = found.costs.problem()
    return Run(
        task=TaskInfo(
            task.name,
            task.description,
            objective,
            task.higher_is_better,
            dense_parameters(task.model),
            dense.bytes,
            task.unit,
        ),
        profiles={name: profile_line(device.profile) for name, device in prepared.devices.items()},
        dense=dense_point,
        front=tuple(points),
        baselines=tuple(e for e in found.told if e.state == "measured" and e.source == "uniform"),
        references=tuple(references(prepared, found)),
        hypervolume=tuple(found.search.hypervolume()),
        summary=_summary(prepared, found, objective),
        layers=tuple(
            LayerInfo(layer.name, layer.kind, layer.out_group, layer.out_channels, layer.in_group)
            for layer in prepared.graph.layers.values()
        ),
        warnings=tuple(_warnings(found, points)),
        sensitivity=tuple(curves(found.costs.tables)),
        deciders=deciders(problem, [e.candidate for e in found.told if e.state != "failed"]),
        kept=kept(prepared.graph, prepared.space, problem),
        identity={**prepared.identity, **profiles_identity({name: d.profile for name, d in prepared.devices.items()})},
        recovery=summary_of(found),
        expected=expected_of(found),
        goals=prepared.settings.goals.model_dump(exclude_none=True),
        family=tuple(prepared.settings.family or ()),
        recipes=found.search.get_attr(RECIPES, {}),
    )


def _verified_front(prepared: Prepared, found: Found) -> tuple[Evaluation, list[FrontPoint]]:
    """Dense, and the front with its files written and read back. A point whose module computes something else is no point.

    What it dominated takes its place. The front is chosen by the times that were taken while searching.
    """
    measured = [as_searched(e) for e in found.told if e.state == "measured"]
    dense = remeasured(prepared.measurer, [found.dense()], found.search.update, prepared.progress)[0]
    written: dict[int, FrontPoint] = {}
    while True:
        judge = replace(found.judge(), dense=as_searched(dense))
        front = delivered(measured, judge, prepared.settings.speedups, list(prepared.devices))
        if not (new := [e for e in front if e.trial not in written]):
            return dense, [written[e.trial] for e in front]
        others = remeasured(
            prepared.measurer, [e for e in new if e.trial != dense.trial], found.search.update, prepared.progress
        )
        for point in write_points(prepared, [dense, *others] if len(others) < len(new) else others):
            evaluation = point.evaluation
            written[evaluation.trial] = point
            wrong = next((check.note for kind, check in point.verified.items() if check.wrong and _decides(kind)), "")
            if wrong and evaluation.trial != dense.trial:
                measured = [e for e in measured if e.trial != evaluation.trial]
                if evaluation.recovered is not None:  # it may be right as it was before
                    prepared.progress.warn(f"candidate {evaluation.candidate.id} as it was trained failed: {wrong}")
                    found.search.update(evaluation.trial, untrained(evaluation))
                    measured.append(as_searched(untrained(evaluation)))
                    del written[evaluation.trial]
                else:
                    prepared.progress.warn(f"candidate {evaluation.candidate.id} failed: {wrong}")
                    found.search.update(evaluation.trial, replace(evaluation, state="failed", failure=wrong))
                shutil.rmtree(prepared.folder / "models" / evaluation.candidate.id, ignore_errors=True)


def _decides(kind: str) -> bool:
    """Whether a point stands and falls with a file: with the module that was timed, not with what another runtime makes of it."""
    return kind.startswith("so")


def _timed_again(
    prepared: Prepared, found: Found, dense: Evaluation, points: list[FrontPoint]
) -> tuple[Evaluation, list[FrontPoint]]:
    """Dense and the front with times taken in turn, and without the points that are dominated by these times, by dense too."""
    dense, *again = timed_in_turn(prepared, found, dense, [point.evaluation for point in points])
    by_trial = {e.trial: replace(point, evaluation=e) for point, e in zip(points, again, strict=True)}
    judge = replace(found.judge(), dense=dense)
    measured = again if dense.trial in by_trial else [dense, *again]
    front = delivered(measured, judge, prepared.settings.speedups, list(prepared.devices))
    if any(e.trial == dense.trial for e in front) and dense.trial not in by_trial:
        by_trial[dense.trial] = write_points(prepared, [dense])[0]
    kept = [by_trial[e.trial] for e in front]
    for point in by_trial.values():
        place = prepared.folder / "models" / point.evaluation.candidate.id
        if point in kept:
            renew_manifest(place, point.evaluation)
        else:
            shutil.rmtree(place, ignore_errors=True)
    return dense, kept


def _summary(prepared: Prepared, found: Found, objective: str) -> Summary:
    import resource

    told = found.told
    measured = [evaluation for evaluation in told if evaluation.state == "measured"]
    sign = -1.0 if prepared.task.higher_is_better else 1.0
    losses = [sign * untrained(evaluation).metrics[objective] for evaluation in measured]
    correlation = {
        "tier 0 (additive error)": spearman([e.error for e in measured], losses),
        "tier 1 (KL)": spearman([e.kl if e.kl is not None else np.nan for e in measured], losses),
    }
    correlation |= correlations(summary_of(found), spearman)
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # the largest process, with what it shares with others
    peak = max(resource.getrusage(who).ru_maxrss for who in whose) * 1024  # Linux counts kilobytes
    return Summary(
        told=len(told),
        measured=len(measured),
        failed=sum(evaluation.state == "failed" for evaluation in told),
        seconds=found.seconds(),
        spearman={name: value for name, value in correlation.items() if value is not None},
        peak_bytes=peak,
    )


def _warnings(found: Found, points: Sequence[FrontPoint]) -> list[str]:
    from autocomp.hardware.timing import UNSTABLE

    warnings = found.warnings()
    settings, judge = found.prepared.settings, found.judge()
    members = family(judge, [p.evaluation for p in points], settings.speedups, list(found.prepared.devices))
    if unreached := [name for name, member in members.items() if member is None]:
        warnings.append(f"no delivered candidate is a member of the family for {', '.join(unreached)}")
    steady = any(not point.evaluation.noisy for point in points)
    instead = (
        "A steadier point is recommended in its place" if steady else "No point of the front is steadier: run it again"
    )
    for point in points:
        for profile, read in point.deployed.items():
            if read.differs:
                warnings.append(
                    f"{point.evaluation.candidate.id} on {profile}: {', '.join(f'{m} is {read.metrics[m]:.4g}' for m in read.differs)} by "
                    f"{read.file}, {', '.join(f'{point.evaluation.metrics[m]:.4g}' for m in read.differs)} by torch: more than noise"
                )
        for kind, check in point.verified.items():
            if not check.ok:
                warnings.append(f"{point.evaluation.candidate.id}: {kind} failed: {check.note}")
            elif check.note:
                warnings.append(f"{point.evaluation.candidate.id}: {kind}: {check.note}")
        for name, latency in point.evaluation.latency.items():
            if latency.noisy or latency.spread > UNSTABLE:
                why = f"its latency varied by {latency.spread:.0%} between repeats, and did when it was repeated"
                if latency.spread <= UNSTABLE and latency.tail:
                    why = f"most single inferences took {latency.tail['p50'] / latency.seconds:.0%} of what averages over many did"
                elif latency.spread <= UNSTABLE:
                    why = "it was disturbed while it was timed"
                warnings.append(
                    f"{point.evaluation.candidate.id} on {name} is noisy: {why}; other work on the machine disturbs measurements. {instead}"
                )
    return list(dict.fromkeys([*warnings, *unread(points)]))


def unread(points: Sequence[FrontPoint]) -> list[str]:
    """What is said of points whose metric was not read from what was written: it is torch's alone."""
    why: dict[tuple[str, str], list[str]] = {}
    for point in points:
        for profile, read in point.deployed.items():
            if not read.metrics:
                why.setdefault((profile, read.note), []).append(point.evaluation.candidate.id)
    return [
        f"the metric of {', '.join(ids)} on {profile} is torch's alone: by the file that was written it was {note or 'not read'}"
        for (profile, note), ids in why.items()
    ]
