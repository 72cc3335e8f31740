"""A task as it is compressed: its model rewritten so that compressing costs less, its graph, and the space of what may be tried.

Whatever looks at a task before anything is compressed (a search, a study of sensitivity) prepares it here, and so sees the same model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.config.quantities import format_bytes
from autocomp.errors import UsageError
from autocomp.graph.batches import first, like
from autocomp.processes.pool import cores
from autocomp.progress import Progress
from autocomp.space.build import build_space
from autocomp.tasks.task import Task

if TYPE_CHECKING:
    import torch

    from autocomp.database.calibrate import Statistics
    from autocomp.database.database import LayerDatabase
    from autocomp.graph.graph import Graph
    from autocomp.space.file import SpaceFile
    from autocomp.space.space import Space, Target

CHECKED_SAMPLES = 4  # inputs on which a compiled module is compared with torch
ALIKE = 1.01  # times what a model holds that its layers may take without a word; chosen by hand


@dataclass(frozen=True)
class PreparedTask:
    """``task`` with its model rewritten, which computes what it did; ``graph`` and ``space`` are those of that model."""

    task: Task
    graph: Graph
    space: Space

    @property
    def inputs(self) -> list[tuple[torch.Tensor, ...]]:
        """What compiled modules are compared with torch on."""
        return checked_inputs(self.task)


def prepare_task(
    task: Task, rules: SpaceFile, profiles: Sequence[Target], samples: int, progress: Progress | None = None
) -> PreparedTask:
    """Bring a task's model into the form that is compressed: residual streams rotated and channels equalised, where the rules say so,
    and written in the BatchNorm statistics of ``samples`` calibration samples. ExportError, UsageError as `analyse` and `build_space`.
    """
    from autocomp.compress.equalise import equalised
    from autocomp.compress.rotate import rotated
    from autocomp.graph.analyse import analyse

    progress = progress or Progress()
    task.model.eval()
    with progress.stage("reading the model"):
        graph = analyse(task.model, task.example_inputs)
        if rules.rotate:
            task = _rewritten(task, graph, rotated)
            graph = analyse(task.model, task.example_inputs)
        space = build_space(graph, rules, profiles)
    if rules.equalise:
        with progress.stage("equalising channels"):
            task = _rewritten(task, graph, equalised)
    return PreparedTask(_settled(task, samples), graph, space)


def said_of_size(model: torch.nn.Module) -> list[str]:
    """Why a model's layers take more than the model, where they do."""
    from autocomp.graph.fold import dense_bytes, folded_bytes

    held, layers = dense_bytes(model), folded_bytes(model)
    if layers <= ALIKE * held:
        return []
    return [
        f"the model makes some of its weights of others: it holds {format_bytes(held)}, its layers {format_bytes(layers)}. A layer that is "
        "compressed has weights of its own; sizes are held against what the model holds"
    ]


def check_training(task: Task, recipe: str, seconds: float = math.inf) -> None:
    """Try a batch of a task's training data, its loss and a recipe, before anything is searched.

    UsageError says what cannot be used, or that so many seconds are too short.
    """
    from autocomp.recovery.lessons import Teaching
    from autocomp.recovery.one import refuse_too_short
    from autocomp.recovery.recipe import load_recipe
    from autocomp.recovery.schedules import Span
    from autocomp.recovery.train import losses

    read, teaching = load_recipe(recipe), Teaching.of(task)
    teaching.lessons.draw(most=1)
    begun = time.monotonic()
    found = losses(task.model, teaching, read, Span(steps=2), 0.0)
    if seconds < math.inf:
        refuse_too_short(Span(seconds=seconds), (time.monotonic() - begun) / 2, teaching)
    if len(found) < 2 or not math.isfinite(found[-1]):
        raise UsageError(
            "the loss of the uncompressed model on the first batch of training data is not finite: look at Task.loss and Task.train"
        )


def compressed_layers(
    ready: PreparedTask,
    folder: Path,
    samples: int,
    seed: int,
    progress: Progress,
    told: Callable[[float, float], None] = lambda share, seconds: None,
) -> tuple[Statistics, LayerDatabase]:
    """Calibrate a prepared task on so many samples, and compress each of its layers once, into ``folder``; what lies there already is kept."""
    from autocomp.database.calibrate import collect
    from autocomp.database.database import LayerDatabase

    with progress.stage("calibrating"):
        statistics = collect(ready.task, ready.graph, samples, seed)
    database = LayerDatabase(folder, ready.task.model, ready.graph, ready.space, statistics)
    database.build(progress, workers=cores(), told=told)
    return statistics, database


def checked_inputs(task: Task) -> list[tuple[torch.Tensor, ...]]:
    """The example inputs and some calibration samples of the same shapes, on which modules are compared with torch."""
    parts = like(task.example_inputs, task.calibration, task.batch_axes)
    return [task.example_inputs, *islice(parts, CHECKED_SAMPLES)]


def _rewritten(task: Task, graph: Graph, rewrite: Callable[..., tuple[torch.nn.Module, Any]]) -> Task:
    """The task with its model as ``rewrite`` (`equalised`, `rotated`) makes it from the calibration data; the model computes what it did."""
    return replace(
        task, model=rewrite(task.model, graph, task.example_inputs, list(task.calibration), task.batch_axes)[0]
    )


def _settled(task: Task, samples: int) -> Task:
    """The task with its model written in the BatchNorm statistics of the calibration samples; the model computes what it did."""
    from autocomp.compress.batchnorm import settled

    try:
        model = settled(task.model, first(task.calibration, samples, task.batch_axes), task.batch_axes)
    except Exception:  # the model's own code: where it cannot take the calibration data, calibrating says which
        return task
    return task if model is task.model else replace(task, model=model)
