"""What a search of a task would choose from, and what it would not offer, without searching."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from autocomp.config.settings import Settings
from autocomp.errors import ExportError, UsageError
from autocomp.hardware.profile import Profile
from autocomp.processes import interrupt
from autocomp.processes.chatter import caught
from autocomp.progress import Progress
from autocomp.run.prepare_task import said_of_size
from autocomp.run.start import check_names
from autocomp.tasks.task import Task, load_task

CHECK_SECONDS = 900.0  # that it may take


def checked(settings: Settings, progress: Progress | None = None) -> dict[str, Any]:
    """What `autocomp.check` returns; errors as there."""
    from autocomp.graph.analyse import analyse
    from autocomp.space.build import build_space
    from autocomp.tasks.guess import describe
    from autocomp.tasks.untouched import in_float32

    if settings.task is None:
        raise UsageError("no task: name one, such as `autocomp check digits`")
    profiles, rules = check_names(settings)
    try:
        with interrupt.remembered(), interrupt.limited(CHECK_SECONDS):
            task = load_task(settings.task, progress)
            with in_float32(), caught(None, progress.console if progress else None):
                graph = analyse(task.model, task.example_inputs)
                refuse_unsupported(task, profiles[0])
                space = build_space(graph, rules, profiles)
                outputs = describe(task.model.eval(), task.calibration, task.batch_axes, task.outputs)
    except interrupt.OutOfTime as error:
        raise UsageError(
            f"task {settings.task!r} was {error}: does its function, or its model's forward, ever return?"
        ) from error
    return {
        "task": task.name,
        "converted": [*task.converted, *said_of_size(task.model)],
        "profiles": list(settings.profiles),
        "candidates": space.size,
        "outputs": [
            {"output": o.name, "shape": list(o.shape), "samples": o.samples, "compared": str(o), "why": o.why}
            for o in outputs
        ],
        "groups": [
            {
                "group": name,
                "width": group.width,
                "approximate": group.approximate,
                "offered": list(space.widths[name]),
                "finer": [width for width in space.every_width[name] if width not in space.widths[name]],
                "layers": list(dict.fromkeys((*group.producers, *group.consumers))),
            }
            for name, group in graph.groups.items()
        ],
        "layers": [
            {
                "layer": name,
                "kind": layer.kind,
                "macs": layer.total_macs,
                "methods": [str(method) for method in space.methods[name]],
            }
            for name, layer in graph.layers.items()
        ],
        "branches": [
            {"group": name, "offered": 0 in space.widths[name], "layers": [*branch.ends, *branch.layers]}
            for name, branch in graph.branches.items()
        ],
        "refused": [{"subject": r.subject, "option": r.option, "reason": r.reason} for r in space.refused],
    }


def refuse_unsupported(task: Task, profile: Profile) -> None:
    """ExportError naming every operation of the task's model that would not be compiled."""
    from autocomp.compiler.importer import export_program, unsupported

    task.model.eval()
    faults = unsupported(export_program(task.model, task.example_inputs), profile)
    if faults and task.given_model is not None:
        with suppress(ExportError):  # as it was given, it says of each operation which module and line it is of
            faults = unsupported(export_program(task.given_model, task.example_inputs), profile) or faults
    if faults:
        raise ExportError("\n".join(faults))
