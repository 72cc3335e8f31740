"""What a training teaches: one that goes on with other data, another loss or augmentation would compare rounds that cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.errors import UsageError
from autocomp.run.identity import source_of

if TYPE_CHECKING:
    from autocomp.recovery.lessons import Teaching
    from autocomp.study.study import Search
    from autocomp.tasks.task import Task

_LESSONS = "the training data"
LOOKED_AT = 64  # batches at most
# Standard errors, and of the values, by which means of lessons may differ. Chosen by hand, not measured.
SURELY, ROUNDING = 6.0, 1e-4


def refuse_other_lessons(search: Search, key: str, task: Task, teaching: Teaching) -> None:
    """UsageError where the training that keeps what it teaches under ``key`` of a study was begun otherwise."""
    now, before = taught(task, teaching), search.get_attr(key)
    if before is None:
        search.set_attr(key, now)
    elif changed := taught_otherwise(before, now):
        raise UsageError(
            f"this training was begun otherwise: {', '.join(changed)} changed since. Go on with what they were, or train anew, with another "
            "recipe or length: `autocomp recover`"
        )


def taught(task: Task, teaching: Teaching) -> dict[str, Any]:
    """What a task's training teaches: digests of its sources, and what its lessons are like, as far as they are kept in memory.

    Of these there are means over batches: of each input and its square, and of the loss of the uncompressed model's answers. Where they are
    drawn at random, or augmented, with their standard errors.
    """
    import torch

    from autocomp.recovery.lessons import owned
    from autocomp.recovery.losses import labels_loss

    rows = []
    with torch.no_grad():
        for lesson in teaching.lessons.pool[:LOOKED_AT]:
            row = [value for x in lesson.inputs for value in (x.double().mean(), x.double().square().mean())]
            if teaching.loss is not None:
                row.append(labels_loss(teaching.loss, teaching.teacher(*lesson.inputs), owned(lesson.target)))
            rows.append([float(value) for value in row])
    found = np.array(rows, dtype=np.float64).reshape(len(rows), -1)
    random = len(rows) > 1 and not teaching.lessons.still
    errors = found.std(axis=0, ddof=1) / math.sqrt(len(rows)) if random else np.zeros(found.shape[1])
    return {
        "sources": {
            "the source of train": source_of(None if task.train is None else type(task.train).__iter__),
            "the source of loss": source_of(task.loss),
            "the source of augment": source_of(task.augment),
        },
        "means": found.mean(axis=0).tolist() if rows else [],
        "errors": errors.tolist(),
    }


def taught_otherwise(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of a training's sources, and of its lessons, is not what it was."""
    changed = [name for name, digest in now["sources"].items() if before["sources"].get(name) != digest]
    if before["means"] and now["means"]:
        if len(before["means"]) != len(now["means"]):
            return [*changed, _LESSONS]
        old, new = np.array(before["means"]), np.array(now["means"])
        allowed = SURELY * np.hypot(before["errors"], now["errors"]) + ROUNDING * (np.abs(old) + np.abs(new))
        if (np.abs(new - old) > allowed).any():
            changed.append(_LESSONS)
    return changed
