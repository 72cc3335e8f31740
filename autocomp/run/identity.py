"""What the numbers of a run belong to. A resumed run that had another model or other data would mix two runs in one front."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from autocomp.errors import UsageError

if TYPE_CHECKING:
    import torch

    from autocomp.config.settings import Settings
    from autocomp.hardware.profile import Profile
    from autocomp.space.file import SpaceFile
    from autocomp.space.space import Space
    from autocomp.tasks.task import Task

FIRST = "first widths"  # the study's attribute; runs begun before it was kept have none
_DIGITS = 16


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
