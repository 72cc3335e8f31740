"""A built-in task with everything a search makes before its first trial, for benchmarks that need no compiler."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from autocomp.accuracy.additive import AdditiveModel, additive_model
from autocomp.accuracy.proxy import stitch_and_score
from autocomp.database.calibrate import Statistics
from autocomp.database.database import LayerDatabase
from autocomp.database.stitch import stitch
from autocomp.devices.open import open_device
from autocomp.graph.graph import Graph
from autocomp.hardware.profile import load_profile
from autocomp.progress import Progress
from autocomp.records.candidate import Candidate
from autocomp.run.prepare_task import compressed_layers, prepare_task
from autocomp.space.file import SpaceFile, load_space
from autocomp.space.space import Space
from autocomp.study.costs import Costs
from autocomp.tasks.task import Task, evaluate_task, load_task

TASKS = ("digits", "digits-mobile", "tokens")


@dataclass(frozen=True)
class Prepared:
    """A task's model, what may be done to it, and the pieces candidates are stitched from."""

    task: Task
    graph: Graph
    space: Space
    statistics: Statistics
    database: LayerDatabase
    additive: AdditiveModel

    def score(self, candidate: Candidate) -> tuple[torch.nn.Module, float]:
        """The stitched candidate and its KL on the calibration samples."""
        return stitch_and_score(self.task.model, self.graph, self.database, candidate)

    def stitch(self, candidate: Candidate, reestimate: bool = True) -> torch.nn.Module:
        return stitch(self.task.model, self.graph, self.database, candidate, reestimate)

    def metric(self, model: torch.nn.Module, split: str = "validation") -> float:
        """The objective, larger being better."""
        value = next(iter(evaluate_task(self.task, model, split).values()))
        return value if self.task.higher_is_better else -value


def prepare(
    task: str | Task, space: str | SpaceFile = "default", samples: int = 256, folder: Path | None = None
) -> Prepared:
    """Load a task (training its model unless it is cached) and build its layer database, in a temporary folder unless given."""
    torch.set_num_threads(1)
    rules = space if isinstance(space, SpaceFile) else load_space(space)
    ready = prepare_task(load_task(task) if isinstance(task, str) else task, rules, [load_profile("x86-host")], samples)
    folder = folder or Path(tempfile.mkdtemp(prefix="autocomp-benchmark-"))
    statistics, database = compressed_layers(ready, folder, samples, 0, Progress())
    return Prepared(ready.task, ready.graph, ready.space, statistics, database, additive_model(database.tables()))


def costs_of(prepared: Prepared) -> Costs:
    """What its candidates cost by its tables, and by a latency model of the kernels that the cache has measured, which stays as it is."""
    device = open_device(load_profile("x86-host"))
    device.model.fit_kernels(device.store.records())
    tables = prepared.database.tables()
    return Costs(prepared.graph, prepared.space, tables, {device.profile.name: device}, settled=True)


def in_floats(candidate: Candidate, space: Space) -> Candidate:
    """The same widths and ranks with nothing quantised: what can be trained further."""
    methods = {name: replace(method, precision="fp32") for name, method in candidate.methods.items()}
    kept = {
        name: method if method in space.methods[name] else space.methods[name][0] for name, method in methods.items()
    }
    return space.normalise(Candidate(dict(candidate.widths), kept))


def correlations(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Spearman's and Kendall's rank correlation."""
    return float(spearmanr(a, b).statistic), float(kendalltau(a, b).statistic)


def draw(space: Space, count: int, seed: int = 0) -> list[Candidate]:
    """Different random candidates across the whole range of strengths."""
    rng = np.random.default_rng(seed)
    found: dict[str, Candidate] = {}
    for _ in range(50 * count):
        if len(found) == count:
            break
        candidate = space.draw(rng)
        found.setdefault(candidate.id, candidate)
    return list(found.values())
