"""A run from the outside: what is refused before anything is made, the lock on its folder, its three parts in order, its report."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from autocomp.cache import cache_dir, unwritable_reason
from autocomp.config.quantities import LARGEST, parse_training
from autocomp.config.settings import Settings
from autocomp.devices.open import counted
from autocomp.errors import Interrupted, UsageError, shown
from autocomp.hardware.profile import Profile, load_profile
from autocomp.processes import interrupt
from autocomp.processes.chatter import LOG, caught
from autocomp.progress import Progress
from autocomp.recovery.recipe import load_recipe
from autocomp.report.build import build_report
from autocomp.run.folder import LOCK, abandon_run_folder, as_begun, check_run_folder, open_run_folder, probe
from autocomp.run.replay import choices
from autocomp.run.result import SearchResult
from autocomp.space.file import SpaceFile, load_space
from autocomp.tasks.task import Task, load_task, within

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from autocomp.run.found import Found
    from autocomp.run.prepare import Prepared

TEMPORARY_BYTES = 16 << 20  # room for temporary files: a module and an ONNX file of a small model take less


def searched(
    settings: Settings, task: Task | str | None, resume: bool, progress: Progress, sampler: BaseSampler | None
) -> SearchResult:
    """A search from what is refused at once to its report."""
    folder = Path(settings.out).expanduser().absolute()  # a task may change the working folder
    if resume:
        settings = as_begun(settings, folder)
    check_run_folder(settings, resume, folder)
    check_names(settings)
    if not resume:
        choices(settings)
    probe(cache_dir(), "cache", "set AUTOCOMP_CACHE to a folder of yours with room")
    probe(
        Path(tempfile.gettempdir()), "folder for temporary files", "set TMPDIR to a folder with room", TEMPORARY_BYTES
    )
    if settings.storage is not None:
        from autocomp.study.storage import check_storage

        check_storage(settings.storage)
    if not isinstance(task, Task):
        if settings.task is None:
            raise UsageError("no task: give one, such as autocomp.search(task='digits')")
        with interrupt.remembered():
            task = load_task(settings.task, progress)
    for note in task.converted:
        progress.warn(note)
    if settings.evaluate_timeout is not None:
        task = within(task, settings.evaluate_timeout)
    given, begun = task, time.monotonic()
    if settings.auto is True:
        from autocomp.run.automatic import chosen_lines, resolve
        from autocomp.tasks.untouched import in_float32

        with interrupt.remembered(), in_float32():
            settings = resolve(settings, task, progress).settings
        progress.say(chosen_lines(settings))
    spent = time.monotonic() - begun

    def work() -> SearchResult:
        # under the lock: a search that is refused leaves the settings as they are
        known = open_run_folder(settings, resume, folder)
        with caught(folder / LOG, progress.console):
            return _run(settings, given, folder, known, progress, sampler, spent=spent)

    return _locked(folder, work, f"continue with --resume --out {folder}", "choose another --out")


def _locked(folder: Path, work: Callable[[], SearchResult], go_on: str, otherwise: str) -> SearchResult:
    """What ``work`` returns, nothing else being at work in a run's folder; stops and full disks are told with how to ``go_on``, a
    folder that is held with what to do ``otherwise``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with interrupt.remembered(), FileLock(folder / LOCK, timeout=0):
            return work()
    except Timeout as error:
        raise UsageError(f"another search or training is running in {folder}; wait for it, or {otherwise}") from error
    except KeyboardInterrupt as error:
        stopped = Interrupted(f"stopped; every finished trial is kept: {go_on}")
        stopped.exit_code = getattr(error, "exit_code", stopped.exit_code)
        raise stopped from error
    except OSError as error:
        reason = unwritable_reason(error)
        if reason is None:
            raise
        raise UsageError(
            f"{_where(error, folder)} cannot be written: {reason}; what was told is kept: once it can, {go_on}"
        ) from error


def _where(error: OSError, folder: Path) -> str:
    """Which of a run's places could not be written."""
    file = Path(str(error.filename)).absolute() if error.filename else folder
    places = {
        folder: f"the run folder {folder}",
        cache_dir().absolute(): f"the cache {cache_dir()} (AUTOCOMP_CACHE)",
        Path(tempfile.gettempdir()): f"the folder for temporary files {tempfile.gettempdir()} (TMPDIR)",
    }
    return next((text for place, text in places.items() if place in (file, *file.parents)), f"the file {file}")


def trained_run(
    folder: Path,
    task: Task | str | None,
    recipe: str,
    amount: tuple[float, str],
    points: Sequence[str],
    progress: Progress,
) -> SearchResult:
    """A finished run whose points are trained, from what is refused at once to its new report."""
    from autocomp.config.settings import read_settings
    from autocomp.run.folder import CONFIG
    from autocomp.run.training import train_points

    if not (folder / CONFIG).exists():
        raise UsageError(
            f"there is no run in {_near(folder)} to train (no {CONFIG}): name the folder of a finished search"
        )
    settings = read_settings(folder / CONFIG).model_copy(update={"out": str(folder)})
    SearchResult(folder)  # UsageError where the search has not finished
    check_names(settings)
    if not isinstance(task, Task):
        if task is None and settings.task is None:
            raise UsageError(f"the run in {folder} does not name its task: give it")
        task = load_task(task or settings.task or "", progress)
    if settings.evaluate_timeout is not None:
        task = within(task, settings.evaluate_timeout)
    given = task

    def train(prepared: Prepared, found: Found) -> None:
        train_points(prepared, found, points, recipe, amount)

    def work() -> SearchResult:
        known = open_run_folder(settings, True, folder)
        with caught(folder / LOG, progress.console):
            return _run(settings, given, folder, known, progress, None, train)

    return _locked(folder, work, "the same command goes on", "name another run")


def _near(folder: Path) -> str:
    """A folder as people name it, from where they stand."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def check_names(settings: Settings) -> tuple[list[Profile], SpaceFile]:
    """Load the profiles, the search space and the recipe, so that a wrong name is refused before a task is trained or a folder made."""
    if settings.training[0]:
        load_recipe(settings.recipe)
    profiles = [load_profile(name) for name in settings.profiles]
    for name, profile in zip(settings.profiles, profiles, strict=True):
        if settings.goals.energy(name) is not None and profile.watts is None and not counted(profile):
            raise UsageError(
                f"max_energy: the profile {shown(name)} does not state what its board draws, so the energy of an inference is not known: add "
                "power: {idle: …, load: …, cores: …} to a profile file of yours, or, of this machine, let its counters be read (docs/goals.md)"
            )
    return profiles, load_space(settings.space)


def _run(
    settings: Settings,
    task: Task,
    folder: Path,
    known: Mapping[str, Any] | None,
    progress: Progress,
    sampler: BaseSampler | None,
    train: Callable[[Prepared, Found], None] | None = None,
    spent: float = 0.0,
) -> SearchResult:
    """A search; or, with ``train``, no search but that of what was found before. So many seconds of its minutes are ``spent``."""
    from autocomp.run.explore import explore
    from autocomp.run.finish import finish, refuse_infeasible
    from autocomp.run.found import Found
    from autocomp.run.prepare import prepare
    from autocomp.run.training import train_candidates
    from autocomp.tasks.training import one_thread
    from autocomp.tasks.untouched import in_float32, seeded

    # on a busy machine a second thread makes these small layers many times slower
    with one_thread(), in_float32(), seeded(settings.seed):
        try:
            prepared = prepare(settings, task, folder, known, progress, sampler, spent)
        except BaseException as error:
            if known is None and not interrupt.is_stop(error):  # nothing is told yet
                abandon_run_folder(folder)
            raise
        with explore(prepared) if train is None else Found(prepared, searches=False) as found:
            (train or train_candidates)(prepared, found)
            if train is not None:
                found.judge_again(later=True)
            run = finish(prepared, found)
    with progress.stage("writing the report"):
        _report(folder, progress)
    refuse_infeasible(settings, run, folder)
    return SearchResult(folder)


def _report(folder: Path, progress: Progress) -> None:
    """The page of a finished run. What it is made of is written: a page that fails can be made again, and costs nobody the run."""
    try:
        build_report(folder)
    except OSError:
        raise
    except Exception as error:
        traceback.print_exc()  # into the run's log
        progress.warn(
            f"report.html was not written ({type(error).__name__}: {error}): `autocomp report {folder}` tries again"
        )


def length_of(minutes: float | None, length: str | None) -> tuple[float, str]:
    """How long to train: an amount and its unit. UsageError if it is nothing, or stated twice."""
    if minutes is not None and length is not None:
        raise UsageError("minutes and length are both given: give one")
    try:
        amount, unit = (
            (60.0 * (minutes if minutes is not None else 10.0), "seconds") if length is None else parse_training(length)
        )
    except ValueError as error:
        raise UsageError(f"length: {error}") from None
    if not 0 < amount < LARGEST:
        raise UsageError(
            f"how long to train must be more than nothing, got {shown(length if length is not None else minutes)}"
        )
    return amount, unit
