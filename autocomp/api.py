"""The public functions: search, measure, compile, check, report."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.config.settings import Settings, load_settings
from autocomp.errors import ModelWarning, UsageError, cut, shown
from autocomp.hardware.profile import Profile, load_profile
from autocomp.processes.chatter import caught
from autocomp.processes.one import alone, at_work, is_at_work
from autocomp.progress import Progress
from autocomp.records.evaluation import Sensitivity
from autocomp.records.latency import Latency
from autocomp.recovery.recipe import load_recipe
from autocomp.run.folder import probe
from autocomp.run.replay import with_replay
from autocomp.run.result import Point as Point
from autocomp.run.result import SearchResult as SearchResult
from autocomp.run.start import check_names, length_of, searched, trained_run
from autocomp.run.verdict import SLOWER
from autocomp.study.samplers import GIVEN
from autocomp.tasks import BUILT_IN
from autocomp.tasks.task import Task, checked_batch, load_task

if TYPE_CHECKING:
    import torch
    from optuna.samplers import BaseSampler

    from autocomp.devices.device import Compiled
    from autocomp.fusion.fuse import Fused
    from autocomp.recovery.one import Recovered
    from autocomp.run.automatic import Resolved
    from autocomp.run.forecast import Plan
    from autocomp.run.verdict import Gated


def search(
    task: Task | str | None = None,
    profiles: Sequence[str] | None = None,
    trials: int | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    *,
    settings: Settings | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    sampler: BaseSampler | str | None = None,
    **options: Any,
) -> SearchResult:
    """Search the compressions of a task's model, measure the promising ones, and write the run folder.

    ``task`` is a `Task` or a name (``digits``, ``package.module:function``); ``profiles`` are names or YAML files of targets, ``trials`` the
    candidates told to the study, ``out`` the run folder, ``options`` the other keys of the settings (``space``, ``measurements``, ``minutes``,
    ``goals``, … as `Settings` has them: seconds, bytes, units of the metric). In the place of all of these, ``settings`` gives them resolved;
    a `Task` may stand beside it. ``sampler`` proposes candidates: a name (``tpe``, ``nsgaii``, …) or any sampler of Optuna's. With
    ``replay``, the folder of a finished run, nothing is searched: its front (or the ``points`` of these ids) is made again for this task's
    weights, and trained as there. One search at a time in a process.

    With ``auto=True`` what of ``space``, ``calibration_samples``, ``trials``, ``measurements`` (counts) and ``recover`` (a duration) is not
    stated is chosen by the model, its targets, the goals and ``minutes``, and said: see `resolve`.

    Raises:
        UsageError: Bad input; said before anything is lost.
        InfeasibleError: Nothing measured meets the goals; front and report are written.
        Interrupted: Ctrl-C or a signal; the same call with ``resume=True`` goes on.
        ExportError: The model cannot be exported, or uses an operation that is not compiled.

    Examples:
        >>> import autocomp
        >>> result = autocomp.search("digits", trials=300, out="runs/digits", max_drop=0.01)  # doctest: +SKIP
        >>> result.best(max_drop=0.01).latency["x86-host"].seconds  # doctest: +SKIP

        What is wrong is said before a model is trained or a folder made:

        >>> autocomp.search("digits", trials=0)
        Traceback (most recent call last):
        autocomp.errors.UsageError: trials: must be greater than or equal to 1, got 0
    """
    progress = progress or Progress()
    given = None if sampler is None or isinstance(sampler, str) else sampler
    if sampler is not None:
        options["sampler"] = sampler if isinstance(sampler, str) else GIVEN
    if settings is None:
        settings = _settings(task, profiles, trials, out, seed, options)
    else:
        _refuse_both(task, {"profiles": profiles, "trials": trials, "out": out, "seed": seed, **options})
    if settings.sampler == GIVEN and given is None:
        raise UsageError(
            "sampler: the run was made with a sampler of the caller's own: give it again, autocomp.search(sampler=…)"
        )
    if is_at_work():
        raise UsageError(
            "a search from within autocomp's work, such as from Task.evaluate, is none: search one after the other"
        )
    with alone(settings.evaluate_timeout):
        return searched(settings, task, resume, progress, given)


def recover(
    what: torch.nn.Module | Point | SearchResult | str | Path,
    task: Task | str | None = None,
    recipe: str | Path = "default",
    minutes: float | None = None,
    *,
    length: str | None = None,
    points: Sequence[str] = (),
    progress: Progress | None = None,
) -> Recovered | SearchResult:
    """Train what was compressed, against the uncompressed model of its task, and keep what is better on validation.

    ``what`` is a compressed model or a `Point`: a `Recovered` is returned, with the ``model`` and how it went. Or it is a run, by its folder or
    its `SearchResult`: its front as it was before any training, or the ``points`` of these ids, are trained, their files written again and
    verified, front and report renewed, and the `SearchResult` returned. ``task`` is a `Task` or a name; of a run it is needed where no name
    leads to it. ``recipe`` is a name or a YAML file; ``minutes`` (10 unless given) is how long, or ``length``, such as ``500steps`` or
    ``5epochs`` of each.

    Raises:
        UsageError: The task has no data or loss to train with, nothing can be trained, the time is too short, or there is no such point.
        Interrupted: Ctrl-C or a signal; the same call goes on where it was.

    Examples:
        >>> import autocomp
        >>> point = autocomp.SearchResult("runs/digits").best()  # doctest: +SKIP
        >>> done = autocomp.recover(point, "digits", minutes=3)  # doctest: +SKIP
        >>> done.before, done.after  # doctest: +SKIP
        >>> autocomp.recover("runs/nothing")
        Traceback (most recent call last):
        autocomp.errors.UsageError: there is no run in runs/nothing to train (no config.yaml): ...
    """
    from autocomp.recovery.one import recovered
    from autocomp.recovery.schedules import Span
    from autocomp.tasks.training import one_thread
    from autocomp.tasks.untouched import in_float32

    progress, amount = progress or Progress(), length_of(minutes, length)
    read = load_recipe(recipe)
    if isinstance(what, SearchResult | str | Path):
        folder = what.folder if isinstance(what, SearchResult) else Path(what)
        with alone(_limit_of(folder)):
            return trained_run(folder.absolute(), task, str(recipe), amount, points, progress)
    if points:
        raise UsageError("points are of a run: give its folder, or the point alone")
    if task is None:
        raise UsageError("a model is trained with the data of its task: autocomp.recover(model, task=…)")
    found = task if isinstance(task, Task) else load_task(task, progress)
    with alone(), one_thread(), in_float32(), caught(None, progress.console), progress.stage("training"):
        model = what.load() if isinstance(what, Point) else what
        if amount[1] == "epochs":
            return recovered(model, found, read, Span(steps=None), epochs=int(amount[0]))
        return recovered(model, found, read, Span.of(*amount))


def fuse(
    tasks: Sequence[Task | str],
    out: str | Path | None = None,
    smaller: float | str = "1.6x",
    minutes: float | None = None,
    recipe: str | Path = "default",
    *,
    length: str | None = None,
    train: bool = True,
    same_inputs: bool = False,
    progress: Progress | None = None,
) -> Fused:
    """Make one model of related ones: of one architecture, each with its own task. What it holds once, all of them use.

    Channels are brought into one order first. Each layer that has the same shape in all models then is every model's own, one for all, one for
    all with a small product of each model's own, or a basis for all with factors of each: what costs the least divergence in all such that
    the models together take ``smaller`` times less room. Then it is trained to answer as the models did, for ``minutes`` (10 unless given) or a
    ``length`` such as ``500steps``, by a ``recipe``; ``train=False`` leaves that out.

    ``tasks`` are `Task` objects or names. With ``same_inputs`` the model takes one set of inputs and all models answer about it: layers at its
    beginning that all share are run once. It is then trained without labels, since nobody knows those of all. With ``out`` the model is written
    into that folder, whose name is a task from then on: ``autocomp.search(task="runs/fused")`` compresses it. That takes names.

    Raises:
        UsageError: The models are not of one architecture or not judged alike, the folder is not empty, or the training cannot be as asked.

    Examples:
        >>> import autocomp
        >>> done = autocomp.fuse(["digits", "my_tasks:rotated"], "runs/fused")  # doctest: +SKIP
        >>> done.metrics["apart"]["accuracy"], done.metrics["fused"]["accuracy"]  # doctest: +SKIP
        >>> autocomp.fuse(["digits"])
        Traceback (most recent call last):
        autocomp.errors.UsageError: two tasks at least are fused, got 1
    """
    from autocomp.config.quantities import parse_factor
    from autocomp.fusion.fuse import fuse as fused_of
    from autocomp.fusion.stored import write_fused
    from autocomp.recovery.schedules import Span
    from autocomp.tasks.training import one_thread
    from autocomp.tasks.untouched import in_float32

    if len(tasks) < 2:
        raise UsageError(f"two tasks at least are fused, got {len(tasks)}")
    progress, (amount, unit) = progress or Progress(), length_of(minutes, length)
    try:
        factor = parse_factor(smaller if isinstance(smaller, str) else f"{smaller}x")
    except ValueError as error:
        raise UsageError(f"smaller: {error}") from None
    read = load_recipe(recipe)
    if unit == "epochs":
        raise UsageError(f"length: a fused model is trained for minutes or steps, got {shown(length)}")
    if out is not None and (nameless := [task.name for task in tasks if isinstance(task, Task)]):
        raise UsageError(
            f"out: a folder is a task by the names of those that were fused; {nameless[0]!r} was given as an object. Give names, or no folder"
        )
    folder = None if out is None else Path(out).expanduser().absolute()
    if out is not None and os.sep not in str(out) and (":" in str(out) or str(out) in BUILT_IN):
        raise UsageError(f"out: {shown(str(out))} is the name of another task: give a path, such as runs/fused")
    if folder is not None:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UsageError(f"out: {cut(str(folder))} is there already: name another folder, or take that away")
        probe(folder)
    span = Span.of(amount, unit) if train else None
    with alone(), one_thread(), in_float32(), caught(None, progress.console):
        loaded = [task if isinstance(task, Task) else load_task(task, progress) for task in tasks]
        fused = fused_of(loaded, factor, read, span, progress, same_inputs)
        if folder is not None:
            write_fused(fused, [str(task) for task in tasks], folder)
    return fused


def rebuild_report(run: str | Path) -> Path:
    """Write ``report.html`` again from the records of a run folder, and return its path; neither torch nor TVM is needed.

    Raises:
        UsageError: The folder holds no finished run, or one that a newer autocomp wrote.
        CorruptError: A record does not read back as it was written.

    Examples:
        >>> rebuild_report("runs/nothing")
        Traceback (most recent call last):
        autocomp.errors.UsageError: runs/nothing holds no front.json: it is no run folder, or ...
    """
    from autocomp.report.build import build_report

    return build_report(Path(run))


def gate(
    run: str | Path,
    point: str | None = None,
    baseline: str | Path | None = None,
    slower: float = SLOWER,
    *,
    task: Task | None = None,
    progress: Progress | None = None,
) -> Gated:
    """Check a delivered point of a run folder again on this machine: size, metric, outputs of each file, latency beside dense.

    ``point`` is an id; by default the point that meets the run's goals best. Its speed-up may be ``slower`` by a share than the run's, or
    than that in ``baseline``, the JSON of an earlier gate. ``task`` is needed where no name leads to it. ``.verdict`` is the worst of
    ``.checks``. UsageError if run, point or baseline cannot be read; whatever else fails is a verdict, ``CANNOT RUN``.
    """
    from autocomp.run.verdict import judged_again
    from autocomp.tasks.training import one_thread
    from autocomp.tasks.untouched import in_float32

    if not 0 <= slower < 1:
        raise UsageError(f"slower must be a share of the speed-up, from 0 to below 1; got {shown(slower)}")
    limit = _limit_of(Path(run))
    with alone(limit), one_thread(), in_float32(), caught(None, progress.console if progress else None):
        return judged_again(run, point, baseline, slower, task, progress)


def measure(
    model: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    profile: str | Profile = "x86-host",
) -> Latency:
    """Compile a model with tuned kernels, compare it with torch, and measure one inference on a profile.

    ``example_inputs`` is what the model is called with, a tuple of tensors; the time is for their shapes. ``profile`` is a name, the path of a
    YAML file, or a `Profile`. Of what is returned, ``.seconds`` is the median, ``.spread`` its relative interquartile range, ``.how`` how it
    was obtained, ``.kernels`` each kernel's own time. The first call tunes kernels, seconds for each new one; they are kept in the cache.
    Warns (ModelWarning) of a model whose outputs depend on no input.

    Raises:
        ExportError: The model cannot be compiled; also where it is random, or keeps a state.
        MismatchError: It computes something else than torch: on the example inputs, on others like them, or on a second call.
        UsageError: The profile or the inputs cannot be used.
        BoardError: The profile's board did not answer.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> latency = measure(model, (torch.zeros(1, 16),))  # doctest: +SKIP
        >>> latency.how, len(latency.kernels)  # doctest: +SKIP
        ('measured', 2)
    """
    device, compiled = _compiled(model, example_inputs, profile)
    with at_work(), caught(None):
        latency: Latency = device.time(compiled, example_inputs)
    return latency


def compile(
    model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], profile: str | Profile = "x86-host"
) -> Compiled:
    """Compile a model for a profile, compared with torch: ``.run(*tensors)`` computes, ``.save(path)`` writes a shared library.

    ``example_inputs``, ``profile``, warnings and errors are those of `measure`. The module takes tensors of the shapes given, and of these
    alone.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> compiled = compile(model, (torch.zeros(1, 16),))  # doctest: +SKIP
        >>> compiled.run(torch.zeros(1, 16)).shape  # doctest: +SKIP
        torch.Size([1, 4])
    """
    result: Compiled = _compiled(model, example_inputs, profile)[1]
    return result


def check(settings: Settings, progress: Progress | None = None) -> dict[str, Any]:
    """Say what a search would do: outputs compared, layers, groups, the choices offered, and what is not offered and why.

    Nothing is measured. The keys of what is returned are those of ``autocomp check --json``: ``task``, ``converted``, ``profiles``,
    ``candidates`` (how many there are), ``outputs``, ``groups`` (``width`` in channels, ``finer`` widths that are offered later), ``layers``
    (``macs``: multiply-accumulates of one inference at the example's shapes), ``branches`` that may be left out whole (those ``offered``),
    ``refused``.

    Raises:
        UsageError: The settings name no task, or one that cannot be used; or its function does not return within 15 minutes.
        ExportError: The model cannot be exported, or uses an operation that is not compiled.

    Examples:
        >>> from autocomp.config.settings import load_settings
        >>> found = check(load_settings(overrides={"task": "digits"}))  # doctest: +SKIP
        >>> [layer["layer"] for layer in found["layers"]]  # doctest: +SKIP
    """
    from autocomp.run.checked import checked

    with alone():
        return checked(settings, progress)


def resolve(settings: Settings, task: Task | None = None, progress: Progress | None = None) -> Resolved:
    """Say with which settings a search would be made, and of what; with ``auto`` what they leave open is chosen. Nothing is compiled.

    ``.settings`` are the settings with nothing left to choose: given to `search`, that is what is done. ``.settings.auto`` says of each that
    was chosen why. ``.searched`` has ``task``, ``layers``, ``parameters`` (groups and layers with a choice) and ``candidates`` (how many there
    are, a text). The model is read once, and 64 samples of its calibration data pass through it; the seconds of that (none in a deterministic
    search) decide where ``minutes`` are given, or the model is slow. ``task`` takes the place of the one that the settings name.

    Raises:
        UsageError, ExportError: As `search` raises them at its start.

    Examples:
        >>> from autocomp.config.settings import load_settings
        >>> found = resolve(load_settings(overrides={"task": "digits", "auto": True, "minutes": 10.0}))  # doctest: +SKIP
        >>> found.settings.trials, found.settings.auto["trials"]  # doctest: +SKIP
    """
    from autocomp.run.automatic import resolve as chosen

    if settings.task is None and task is None:
        raise UsageError("no task: name one, such as `autocomp search digits --dry-run`")
    check_names(settings)
    progress = progress or Progress()
    task = task or load_task(settings.task or "", progress)
    with alone():
        return chosen(settings, task, progress)


def plan(settings: Settings, progress: Progress | None = None) -> Plan:
    """Say what a search is expected to find and to take, before it is paid for; nothing is compiled or measured.

    ``.points`` is the predicted front (times faster and smaller, divergence in nats by the layer tables, for some as read), ``.layers`` what
    decides it, ``.kept`` what is not offered and how much of the time that leaves untouched, ``.errors`` how far the latency models are off.

    Raises:
        UsageError, ExportError: As `search` raises them at its start.
    """
    from autocomp.run.forecast import forecast
    from autocomp.tasks.training import one_thread
    from autocomp.tasks.untouched import in_float32

    if settings.task is None:
        raise UsageError("no task: name one, such as `autocomp plan digits`")
    check_names(settings)
    progress = progress or Progress()
    task = load_task(settings.task, progress)
    settings = resolve(settings, task, progress).settings if settings.auto is True else settings
    with alone(), one_thread(), in_float32(), caught(None, progress.console):
        return forecast(settings, task, progress)


def sensitivity(
    settings: Settings, out: Path | None = None, progress: Progress | None = None, masked: bool = False
) -> tuple[str, list[Sensitivity]]:
    """Return a task's name and what each option of each of its layers and groups costs alone; nothing is compiled or measured.

    Each row is a `Sensitivity`: the error in nats a sample, the share of the bytes that is kept. With ``masked``, also what masks of single
    weights (unstructured, N:M) would cost and save; no candidate has any. The curves are also drawn into an HTML page at ``out``, if one is
    given.

    Raises:
        UsageError: As `search`; or the page cannot be written.

    Examples:
        >>> from autocomp.config.settings import load_settings
        >>> name, rows = sensitivity(load_settings(overrides={"task": "digits"}))  # doctest: +SKIP
        >>> min(rows, key=lambda row: row.error).subject  # doctest: +SKIP
    """

    from autocomp.accuracy.sensitivity import curves, masks
    from autocomp.cache import write_atomically
    from autocomp.report.build import render_sensitivity
    from autocomp.run.prepare_task import compressed_layers, prepare_task
    from autocomp.tasks.training import one_thread
    from autocomp.tasks.untouched import in_float32

    if settings.task is None:
        raise UsageError("no task: name one, such as `autocomp sensitivity digits`")
    profiles, rules = check_names(settings)
    progress = progress or Progress()
    task = load_task(settings.task, progress)
    with (
        alone(),
        one_thread(),
        in_float32(),
        tempfile.TemporaryDirectory() as folder,
        caught(None, progress.console),
    ):
        prepared = prepare_task(task, rules, profiles, settings.calibration_samples, progress)
        task, graph = prepared.task, prepared.graph
        samples, seed = settings.calibration_samples, settings.seed
        statistics, database = compressed_layers(prepared, Path(folder), samples, seed, progress)
        rows = curves(database.tables())
        if masked:
            with progress.stage("masks of single weights", len(graph.layers)) as stage:
                for found in masks(task.model, graph, statistics):
                    rows += found
                    stage.advance()
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, render_sensitivity(task.name, rows).encode())
        except OSError as error:
            raise UsageError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    return task.name, rows


def _limit_of(run: Path) -> float | None:
    """The limit on the task's functions that a run was made with; None where there is none, or no run."""
    from autocomp.config.settings import read_settings
    from autocomp.run.folder import CONFIG

    return read_settings(run / CONFIG).evaluate_timeout if (run / CONFIG).exists() else None


def _refuse_both(task: Task | str | None, others: Mapping[str, Any]) -> None:
    """UsageError where something is given beside ``settings``, which would have to overrule it; a Task is no setting."""
    given = [name for name, value in others.items() if value is not None]
    if given := (["task"] if isinstance(task, str) else []) + given:
        raise UsageError(f"{given[0]} is given beside settings: put it into them, or give no settings")


def _settings(
    task: Task | str | None,
    profiles: Sequence[str] | None,
    trials: int | None,
    out: str | Path | None,
    seed: int | None,
    options: Mapping[str, Any],
) -> Settings:
    name = task.name if isinstance(task, Task) else task
    given: dict[str, Any] = {
        "task": name,
        "profiles": list(profiles) if profiles is not None else None,
        "trials": trials,
        "out": str(out) if out is not None else None,
        "seed": seed,
        **options,
    }
    return load_settings(None, *with_replay(given))


def _compiled(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], profile: str | Profile) -> Any:
    """The device and the module, compared with torch on the example, on inputs made up beside it, and on a second call."""
    from autocomp.compiler.handover import checked_inputs, describe_outputs
    from autocomp.devices.open import open_device
    from autocomp.graph.plain import evaluating, plain
    from autocomp.tasks.untouched import in_float32

    found = profile if isinstance(profile, Profile) else load_profile(profile)
    model, given, _ = plain(model, checked_batch(example_inputs, "example_inputs"), "the model", "example_inputs")
    with at_work(), caught(None), in_float32(), evaluating(model):
        device = open_device(found)
        inputs = checked_inputs(model, given)
        said = describe_outputs(model, inputs)
        compiled = device.compile(model, inputs)
    if said:
        warnings.warn(said, ModelWarning, stacklevel=3)
    return device, compiled
