"""What the numbers of a run belong to. A resumed run that had another model or other data would mix two runs in one front."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.errors import UsageError

if TYPE_CHECKING:
    import torch

    from autocomp.config.settings import Settings
    from autocomp.hardware.profile import Profile
    from autocomp.recovery.lessons import Teaching
    from autocomp.space.file import SpaceFile
    from autocomp.space.space import Space
    from autocomp.tasks.task import Task

FIRST = "first widths"  # the study's attribute; runs begun before it was kept have none
_DIGITS = 16
_LESSONS = "the training data"
LOOKED_AT = 64  # batches at most
SURELY, ROUNDING = (
    6.0,
    1e-4,
)  # standard errors, and of the values, by which means of lessons may differ. Chosen by hand, not measured


def identity_of(task: Task) -> dict[str, str]:
    """Digests of a task's parts, by what a message calls them. Its model must not have been equalised or otherwise changed."""
    from autocomp.graph.program import CanonicalModel

    model = task.model  # of a task changed after it was made, it is not canonical yet
    source = model.code.source if isinstance(model, CanonicalModel) else str(type(model))
    state = task.model.state_dict()
    layers = [
        f"{name} {module}" for name, module in task.model.named_modules() if next(module.children(), None) is None
    ]
    return {
        "the model's weights": _of_tensors((name, state[name]) for name in sorted(state)),
        "the model's graph": _of_text([source, *layers]),
        "the example inputs": _of_tensors(("", tensor) for tensor in task.example_inputs),
        "the calibration data": _of_tensors(("", tensor) for batch in task.calibration for tensor in batch),
        "the objective": _of_text([str(task.objective), str(task.higher_is_better)]),
        "the outputs compared": _of_text([str(task.outputs), str(task.batch_axes)]),
        "the source of evaluate": source_of(task.evaluate),
        "the source of test": source_of(task.test),
    }


def taught(task: Task, teaching: Teaching) -> dict[str, Any]:
    """What a task's training teaches: digests of its sources, and what its lessons are like, as far as they are kept in memory.

    Of these there are means over batches: of each input and its square, and of the loss of the uncompressed model's answers. Where they are
    drawn at random, or augmented, with their standard errors.
    """
    import torch

    from autocomp.recovery.lessons import owned

    rows = []
    with torch.no_grad():
        for lesson in teaching.lessons.pool[:LOOKED_AT]:
            row = [value for x in lesson.inputs for value in (x.double().mean(), x.double().square().mean())]
            if teaching.loss is not None:
                row.append(teaching.loss(teaching.teacher(*lesson.inputs), owned(lesson.target)).double().mean())
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


def compression_of(settings: Settings, rules: SpaceFile) -> str:
    """A digest of all that decides which weights a candidate has, beside the task: what was measured is of these."""
    from autocomp.compress.prune import DAMPING
    from autocomp.database.database import REVISION
    from autocomp.database.orders import STEPS

    written = [rules.equalise, rules.rotate, rules.observer, settings.calibration_samples, settings.seed]
    return _of_text([str(part) for part in (REVISION, DAMPING, STEPS, *written)])


def profiles_identity(profiles: Mapping[str, Profile]) -> dict[str, str]:
    """Digests of what the times of each profile depend on, by what a message calls it; ``profiles`` by the names that the run has for them."""
    return {f"the profile {name}": profile.fingerprint for name, profile in profiles.items()}


def refuse_another(before: Mapping[str, str], now: Mapping[str, str], folder: object) -> None:
    """UsageError naming every part of the task, or of how it is compressed, that is not what it was when the run began."""
    changed = [name for name in now if before.get(name) != now[name]]
    if not before:
        raise UsageError(
            f"the study of the run in {folder} does not say what task it was of: its record is gone. Choose another --out for a new run"
        )
    if changed:
        raise UsageError(
            f"the run in {folder} was begun with another task, or compressed in another way: {', '.join(changed)} changed since, and its "
            "numbers would be mixed with new ones. Resume it with task, search space and autocomp as they were (seed what is drawn at random, "
            "keep the order of the samples), or choose another --out for a new run"
        )


def first_widths(space: Space) -> dict[str, dict[str, list[int]]]:
    """The widths that a run offers from the start, each with the units of every segment that it keeps: these decide which channels stay."""
    return {name: {str(w): list(space.counts[name][w]) for w in widths} for name, widths in space.widths.items()}


def refuse_other_widths(known: Mapping[str, Any], space: Space, folder: object) -> None:
    """UsageError naming the groups whose first widths are not what they were, though all that a run may come to offer are."""
    now = first_widths(space)
    before = known.get(FIRST, now)
    if changed := sorted(name for name in {**before, **now} if before.get(name) != now.get(name)):
        raise UsageError(
            f"the run in {folder} was begun with another search space: the widths of {', '.join(changed)} that it offers first, or the channels "
            "that they keep, changed since, and its numbers would be mixed with new ones. Resume it with the search space as it was, or choose "
            "another --out for a new run"
        )


def source_of(function: Callable[..., Any] | None) -> str:
    """A digest of the code behind a function: its whole file without comments and layout, or its own bytecode where there is no file."""
    if function is None:
        return "none"
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function):
        function = type(function).__call__
    try:
        path = inspect.getsourcefile(function)
        if path is not None:
            with open(path, encoding="utf-8") as file:
                return _of_text([ast.dump(ast.parse(file.read()))])
    except (OSError, TypeError, SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        pass
    code = getattr(function, "__code__", None)
    return _of_text(_of_code(code)) if code is not None else _of_text([repr(type(function))])


def _of_code(code: Any) -> list[str]:
    """Bytecode, names and constants; those of functions inside, too."""
    inner = [part for constant in code.co_consts if inspect.iscode(constant) for part in _of_code(constant)]
    constants = [repr(constant) for constant in code.co_consts if not inspect.iscode(constant)]
    return [code.co_code.hex(), *code.co_names, *constants, *inner]


def _of_text(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode(errors="surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()[:_DIGITS]


def _of_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]
