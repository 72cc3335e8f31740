"""Before a search is paid for: what front it may find, what decides it, what is not offered, and what the search will take.

Nothing is compiled and nothing is measured. Layers are compressed once (the layer database), the additive problem is solved for a front, some of
its candidates are stitched to see how far the tables are off, and seconds come from the latency model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.config.settings import Settings
from autocomp.devices.open import open_named
from autocomp.front.goals import Judge
from autocomp.processes.pool import cores
from autocomp.progress import Progress
from autocomp.records.evaluation import Evaluation
from autocomp.records.run import Kept
from autocomp.run.expect import counted, expected_front, expected_point, telling_seconds, thought_of_dense
from autocomp.run.prepare_task import compressed_layers, prepare_task
from autocomp.space.file import load_space
from autocomp.study.costs import Costs
from autocomp.study.deciders import MOST_ROWS, kept
from autocomp.study.solver import Problem
from autocomp.tasks.task import Task

if TYPE_CHECKING:
    from autocomp.records.candidate import Candidate

LOOKED_AT = 6  # of them are stitched
DRAWN = 32  # random candidates that the tables are fitted to


@dataclass(frozen=True)
class PlannedPoint:
    """A point of the predicted front: times faster on each profile and smaller than dense, divergence in nats by the tables, and as read.

    ``read`` is of 64 samples, None where the candidate was not stitched; ``meets`` says whether the goals on latency and size hold.
    """

    speedup: Mapping[str, float]
    smaller: float
    divergence: float
    read: float | None
    meets: bool


@dataclass(frozen=True)
class PlannedLayer:
    """A layer's share of the dense model's predicted seconds, the share that its cheapest option saves, and what that costs in nats."""

    layer: str
    share: float
    saves: float
    divergence: float


@dataclass(frozen=True)
class Plan:
    """What a search is expected to find and to take. ``errors`` are the latency models' relative errors, by profile; None: not fitted yet."""

    task: str
    candidates: int
    points: tuple[PlannedPoint, ...]
    layers: tuple[PlannedLayer, ...]
    kept: tuple[Kept, ...]
    errors: Mapping[str, float | None]
    seconds: Mapping[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"candidates": str(self.candidates)}


def forecast(settings: Settings, task: Task, progress: Progress) -> Plan:
    """Plan a search. UsageError, ExportError as a search raises them at its start."""
    from autocomp.accuracy.proxy import score_early
    from autocomp.database.stitch import stitch

    begun = time.perf_counter()
    devices = {name: open_named(name) for name in settings.profiles}
    profiles = [device.profile for device in devices.values()]
    ready = prepare_task(task, load_space(settings.space), profiles, settings.calibration_samples, progress)
    with tempfile.TemporaryDirectory() as folder:
        samples, seed = settings.calibration_samples, settings.seed
        _, database = compressed_layers(ready, Path(folder), samples, seed, progress)
        prepared = time.perf_counter() - begun
        for device in devices.values():
            device.model.fit_kernels(device.store.records())
        costs = Costs(ready.graph, ready.space, database.tables(ready.space), devices, settled=True)
        start = time.perf_counter()
        with progress.stage("fitting the layer tables", DRAWN) as stage:
            rng = np.random.default_rng(settings.seed)
            drawn = [ready.space.draw(rng) for _ in range(DRAWN)]
            seen = []
            for candidate in drawn:
                seen.append(score_early(ready.task.model, ready.graph, database, candidate))
                stage.advance()
        trial = (time.perf_counter() - start) / DRAWN
        costs.observe(drawn, [value if np.isfinite(value) else -1.0 for value in seen])
        costs.fit([])
        stitched = partial(stitch, ready.task.model, ready.graph, database)
        front = counted(costs, ready.task.model, stitched, expected_front(costs))
        looked_at = [front[k].candidate for k in np.unique(np.linspace(0, len(front) - 1, LOOKED_AT).astype(int))]
        read: dict[Candidate, float] = {}
        with progress.stage("reading candidates", len(looked_at)) as stage:
            for candidate in looked_at:
                if np.isfinite(value := score_early(ready.task.model, ready.graph, database, candidate)):
                    read[candidate] = value
                stage.advance()
    limits = settings.goals.model_copy(update={"max_drop": None, "max_memory": None})  # of which nothing is known yet
    judge = Judge(thought_of_dense(costs, ready.task.model), limits, "")
    points = tuple(_point(judge, evaluation, read.get(evaluation.candidate)) for evaluation in front)
    problem = costs.problem()
    seconds = {
        "until the first trial": prepared,
        "a trial on 64 samples": trial,
        f"{settings.trials} trials on {cores()} cores, about": telling_seconds(settings.trials, trial / cores()),
    }
    errors = {name: device.model.kernel_error for name, device in devices.items()}
    return Plan(
        task.name, ready.space.size, points, _layers(problem), kept(ready.graph, ready.space, problem), errors, seconds,
        tuple(_notes(settings, points, errors)),
    )  # fmt: skip


def _point(judge: Judge, evaluation: Evaluation, read: float | None) -> PlannedPoint:
    point = expected_point(evaluation, judge.dense)
    smaller = judge.dense.bytes / max(1, point.bytes)
    return PlannedPoint(point.speedup, smaller, point.divergence, read, judge.feasible(evaluation))


def _layers(problem: Problem) -> tuple[PlannedLayer, ...]:
    """Layers by what their cheapest option saves; widths of their groups included, all else dense."""
    rows = []
    for factor in problem.factors:
        dense = float(factor.seconds[0, 0, 0])
        best = np.unravel_index(int(np.argmin(factor.seconds)), factor.seconds.shape)
        rows.append(
            PlannedLayer(factor.layer, dense, dense - float(factor.seconds[best]), min(float(factor.error[best]), 1e9))
        )
    return tuple(sorted(rows, key=lambda row: -row.saves)[:MOST_ROWS])


def _notes(settings: Settings, points: Sequence[PlannedPoint], errors: Mapping[str, float | None]) -> list[str]:
    notes = []
    ratios = [point.read / point.divergence for point in points if point.read and point.divergence > 0]
    if ratios:
        notes.append(
            f"divergence as read is {min(ratios):.2g} to {max(ratios):.2g} times what the tables say; a search fits them to what it reads"
        )
    for name, error in errors.items():
        known = (
            f"those of single kernels off by {error:.0%} in the median; what a module takes besides is not in it"
            if error is not None
            else "by peak rates alone, since no kernel is tuned yet"
        )
        notes.append(f"seconds on {name} are estimated, {known}")
    limits = (settings.goals.max_latency, settings.goals.max_energy, settings.goals.max_size)
    if any(limit is not None for limit in limits) and not any(point.meets for point in points):
        notes.append(
            "no point of the predicted front meets the goals on latency, energy and size: expect none to be found"
        )
    if settings.goals.max_memory is not None:
        notes.append("the memory of a module is known once it is compiled: max_memory is not planned for")
    if settings.goals.max_drop is not None:
        notes.append(
            "what a nat costs in the metric is not known before candidates are judged: max_drop is not planned for"
        )
    return notes
