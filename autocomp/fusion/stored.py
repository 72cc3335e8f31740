"""A fused model in a folder: its weights, what it was made of, and how it did; the folder's name is then a task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autocomp.cache import write_atomically
from autocomp.config.files import read_json
from autocomp.config.versions import current
from autocomp.errors import UsageError
from autocomp.export.files import WEIGHTS, checksum, load_model, write_model
from autocomp.fusion.fuse import Fused
from autocomp.fusion.joint import joint
from autocomp.progress import Progress
from autocomp.tasks.task import FUSION, Task, load_task

FORMAT_VERSION = 1


def write_fused(fused: Fused, tasks: Sequence[str], folder: Path) -> dict[str, Any]:
    """Write a fused model and what is known of it, and return that; ``tasks`` are the names that its tasks are loaded by."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(fused.task.model, fused.task.example_inputs, folder)
    said = {"format_version": FORMAT_VERSION, **described(fused, tasks), "sha256": checksum(folder / WEIGHTS)}
    write_atomically(folder / FUSION, (json.dumps(said, indent=2) + "\n").encode())
    return said


def described(fused: Fused, tasks: Sequence[str]) -> dict[str, Any]:
    """What is known of a fused model, as JSON holds it."""
    training = fused.training
    return {
        "tasks": list(tasks),
        "names": list(fused.names),
        "same_inputs": fused.same_inputs,
        "ways": dict(fused.ways),
        "metrics": {which: dict(metrics) for which, metrics in fused.metrics.items()},
        "errors": {which: metrics.errors() for which, metrics in fused.metrics.items()},
        "bytes": dict(fused.bytes),
        "training": None
        if training is None
        else {
            "recipe": training.recipe, "steps": training.steps, "seconds": training.seconds, "rate": training.rate, "better": training.better,
        },
        "notes": list(fused.notes),
    }  # fmt: skip


def load_fused(folder: str, progress: Progress | None = None) -> Task:
    """The task of a folder that `write_fused` wrote. UsageError if it cannot be read, or is not what was written."""
    place = Path(folder)
    said = read_json(place / FUSION)
    if not isinstance(said, dict):
        raise UsageError(f"{place / FUSION} holds no fused model")
    said = current(said, place / FUSION, FORMAT_VERSION)
    try:
        specs, names, digest = (
            [str(spec) for spec in said["tasks"]],
            [str(name) for name in said["names"]],
            said["sha256"],
        )
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{place / FUSION} is damaged: {type(error).__name__}: {error}. Fuse the models again"
        ) from None
    if not specs or len(specs) != len(names):
        raise UsageError(
            f"{place / FUSION} does not name the tasks that were fused: give autocomp.fuse names, not Task objects"
        )
    model = load_model(place)
    if checksum(place / WEIGHTS) != digest:
        raise UsageError(f"{place / WEIGHTS} is not the file that {FUSION} was written for. Fuse the models again")
    tasks = [load_task(spec, progress) for spec in specs]
    found = joint(tasks, names, model.requires_grad_(True), bool(said.get("same_inputs")))
    return replace(found, name=place.resolve().name)
