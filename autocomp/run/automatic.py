"""Settings that are left to autocomp, chosen by the model, its targets, the goals and the minutes, before anything expensive.

Nothing is compiled: the model is read once, and one batch of its calibration data passes through it. What a search takes is reckoned from
these, roughly; `run/budget.py` then shares out the real minutes by what things really take.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autocomp.compress.hessian import WIDE
from autocomp.config.quantities import parse_training
from autocomp.config.settings import AUTOMATIC, TRAINED, Settings
from autocomp.errors import UsageError, shown
from autocomp.graph.batches import count, first
from autocomp.hardware.profile import Profile, load_profile
from autocomp.measurement.measurer import together
from autocomp.processes.chatter import caught
from autocomp.processes.pool import cores
from autocomp.progress import Progress
from autocomp.recovery.recipe import load_recipe
from autocomp.run.budget import BASELINES, TELLING, Budget
from autocomp.run.prepare_task import check_training
from autocomp.space.build import build_space
from autocomp.space.file import load_space
from autocomp.tasks.task import Task

if TYPE_CHECKING:
    from autocomp.graph.graph import Graph

# What is chosen. All of it by hand, not measured.
TRIALS = 300  # the default, and enough for a hundred parameters
A_PARAMETER = 3  # trials for each parameter of the space, where that is more
MOST_TRIALS, MOST_A_PARAMETER = 1000, 10  # however many minutes there are
LEAST_TRIALS = 40
MEASUREMENTS = 24  # the default
A_TARGET, A_MEMBER = 12, 4  # measurements more for each further target, and for each member of a family
LEAST_MEASUREMENTS = 4  # one in each round of the search
OF_TRIALS = 4  # one trial in so many is measured at most
SAMPLES = (256, 128, 64, 32)  # the default first
PASS = 10.0  # seconds of a pass through the calibration data at most; some hundred such passes are made
PASS_SHARE = 0.01  # of the minutes at most, where they are given
TRAINING = 1 / 3  # of what is left of the minutes to search and train
LEAST_TRAINING = 60.0  # seconds, below which searching alone is a better use of them

# What things take, on one core. Those without a source are guesses: chosen by hand, not measured.
LOOKED_AT = 64  # samples of the batch that is timed
# Seconds to build a module with new kernels, and more for each layer: within a third of the models in reports/benchmarks/tuning.json.
BUILD, A_LAYER = 4.0, 0.13
ELSEWHERE = 2.0  # times that on a board, or where it is estimated
REHEARSED = 2  # times a module is built by what is tried at the start, its files included
CALIBRATING = 12  # passes through the data, most of them with gradients
# Seconds to compress a weight, and for each cube of a layer's columns, whose Hessian is factorised: within a factor of 2 of the databases of
# ResNet-18, MobileNetV2 and ViT-Ti in reports/benchmarks/cost.json.
A_WEIGHT, A_CUBE = 3e-6, 4e-10
# Seconds of a trial itself, and passes through the data; some candidates are looked at on 64 samples alone. More trials than there is time for
# cost nothing, since the clock ends them; fewer would leave time unused.
TRIAL, TRIAL_PASSES = 0.05, 1.0
UNIFORM = 8  # baselines


@dataclass(frozen=True)
class Resolved:
    """Settings with nothing left to choose, and what would be searched with them.

    ``searched`` has the ``task``, its ``layers``, and of the space the ``parameters`` (groups and layers with a choice) and how many
    ``candidates`` there are.
    """

    settings: Settings
    searched: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"settings": self.settings.model_dump(), "searched": self.searched}


@dataclass(frozen=True)
class _Seen:
    """What is known of a model: layers and weights, calibration samples, seconds of one of them on one core (None: no clock may decide)."""

    graph: Graph
    weights: int
    samples: int
    forward: float | None
    profiles: Sequence[Profile]

    @property
    def module(self) -> float:
        """Seconds to build and time a module on all targets."""
        once = BUILD + A_LAYER * len(self.graph.layers)
        return once * sum(1.0 if profile.reach == "local" else ELSEWHERE for profile in self.profiles)

    @property
    def compressing(self) -> float:
        """Seconds that the layer database takes, with all cores at work."""
        cubes = sum(layer.columns**3 for layer in self.graph.layers.values() if layer.columns <= WIDE)
        return (A_WEIGHT * self.weights + A_CUBE * cubes) / cores()

    @property
    def measuring(self) -> float:
        """Seconds for each of the candidates that are measured side by side."""
        return self.module / together(self.profiles)


def resolve(settings: Settings, task: Task, progress: Progress) -> Resolved:
    """Choose what settings leave to autocomp. UsageError, ExportError as a search raises them at its start."""
    from autocomp.tasks.training import one_thread
    from autocomp.tasks.untouched import in_float32

    profiles = [load_profile(name) for name in settings.profiles]
    with one_thread(), in_float32(), caught(None, progress.console):
        with progress.stage("looking at the model"):
            seen = _look(task, profiles, timed=settings.auto is True and not settings.deterministic)
        chooser = _Chooser(settings, task, seen)
        chooser.choose()
    space = build_space(seen.graph, load_space(chooser.settings.space), profiles)
    parameters = _parameters(space.widths, space.methods)
    searched = {
        "task": task.name, "layers": len(seen.graph.layers), "parameters": parameters, "candidates": str(space.size),
    }  # fmt: skip
    return Resolved(chooser.settings, searched)


def chosen_lines(settings: Settings) -> list[str]:
    """What was chosen, a line each with its reason, for a terminal."""
    chosen = settings.auto if isinstance(settings.auto, dict) else {}
    if not chosen:
        return ["nothing was left to choose: every setting is stated"]
    lines = [f"  {name:<19}  {getattr(settings, name):<8}  {reason}" for name, reason in chosen.items()]
    return ["chosen automatically:", *lines]


def _look(task: Task, profiles: Sequence[Profile], timed: bool) -> _Seen:
    import torch

    from autocomp.graph.analyse import analyse
    from autocomp.graph.fold import dense_parameters

    graph = analyse(task.model.eval(), task.example_inputs)
    weights = dense_parameters(task.model)
    samples = sum(count(batch, task.batch_axes) for batch in task.calibration)
    forward = None
    if timed:
        batches = first(task.calibration, LOOKED_AT, task.batch_axes)
        try:
            with torch.no_grad():
                task.model(*task.example_inputs)  # what a first call sets up is not timed
                begun = time.perf_counter()
                for batch in batches:
                    task.model(*batch)
                forward = (time.perf_counter() - begun) / min(LOOKED_AT, samples)
        except Exception:  # the model's own code: where it cannot take the calibration data, calibrating says which
            forward = None
    return _Seen(graph, weights, samples, forward, profiles)


class _Chooser:
    """Chooses one setting after the other; each sees those before it."""

    def __init__(self, settings: Settings, task: Task, seen: _Seen) -> None:
        self.settings, self.task, self.seen = settings, task, seen
        self.left, self.chosen = settings.left, dict[str, str]()
        self.seconds = None if settings.minutes is None else settings.minutes * 60

    def choose(self) -> None:
        if self.settings.auto is not True:
            return
        self._take("calibration_samples", *self._samples())
        to_search = self._to_search()
        if "recover" in self.left:
            self._take("recover", *self._recover(to_search))
        amount, unit = parse_training(self.settings.recover)
        if to_search is not None:
            to_search = max(0.0, to_search - (amount if unit == "seconds" else 0.0))
            to_search -= min(BASELINES * to_search, UNIFORM * self.seen.measuring)
        self._take("space", *self._space())
        self._take("trials", *self._trials(to_search))
        self._take("measurements", *self._measurements(to_search))
        reasons = {name: self.chosen[name] for name in AUTOMATIC if name in self.chosen}
        self.settings = self.settings.model_copy(update={"auto": reasons})

    def _take(self, name: str, value: Any, reason: str) -> None:
        if name in self.left:
            self.settings = self.settings.model_copy(update={name: value})
            self.chosen[name] = reason

    def _samples(self) -> tuple[int, str]:
        there, forward = self.seen.samples, self.seen.forward
        most = min(SAMPLES[0], there)
        if forward is None:
            return most, "the default: no clock decides"
        limit = PASS if self.seconds is None else min(PASS, PASS_SHARE * self.seconds)
        fitting = [samples for samples in (most, *(n for n in SAMPLES if n < most)) if samples * forward <= limit]
        taken = fitting[0] if fitting else min(SAMPLES[-1], most)
        said = f"a pass through them takes about {taken * forward:.2g} s"
        if taken < most:
            said += f"; through {most} it would take {most * forward:.2g} s"
        elif there < SAMPLES[0]:
            said = f"all that Task.calibration holds; {said}"
        return taken, said

    def _to_search(self) -> float | None:
        """Seconds that the minutes leave between the first trial and the writing of the models; None without minutes."""
        if self.seconds is None:
            return None
        seen, samples = self.seen, self.settings.calibration_samples
        written = REHEARSED * seen.module
        calibrating = CALIBRATING * samples * (seen.forward or 0.0)
        budget = Budget(self.settings.minutes)
        budget.keep_for_the_end(written, together(seen.profiles), self.settings.references)
        return max(0.0, self.seconds - written - calibrating - seen.compressing - budget.kept)

    def _recover(self, to_search: float | None) -> tuple[str, str]:
        if to_search is None:
            return "0", "no minutes are given to take it from"
        if self.task.train is None:
            return "0", "Task.train is not given"
        load_recipe(self.settings.recipe)  # a name that is wrong is the user's mistake, not a reason to train nothing
        seconds = 10.0 * (TRAINING * to_search // 10)
        if seconds < LEAST_TRAINING:
            return "0", f"a third of the time to search and train is {seconds:.0f} s, less than {LEAST_TRAINING:.0f}"
        try:
            check_training(self.task, self.settings.recipe, seconds)
        except UsageError as error:
            return "0", "".join(c for c in shown(error) if c.isprintable())
        return f"{seconds:.0f}s", f"a third of the {to_search:.0f} s to search and train"

    def _space(self) -> tuple[str, str]:
        goals = self.settings.goals
        if self.settings.training[0]:
            return TRAINED, "candidates are trained afterwards"
        if (
            goals.max_size is not None
            and goals.max_latency is None
            and goals.max_energy is None
            and not self.settings.family
        ):
            return "size", "a goal on the size, none on the latency"
        return "default", "neither training nor a goal on the size alone asks for another"

    def _trials(self, to_search: float | None) -> tuple[int, str]:
        rules, profiles = load_space(self.settings.space), self.seen.profiles
        space = build_space(self.seen.graph, rules, profiles)
        parameters = _parameters(space.widths, space.methods)
        said = f"{parameters} parameters"
        if to_search is None:
            value = max(TRIALS, A_PARAMETER * parameters)
            said += f", {A_PARAMETER} for each" if value > TRIALS else ""
        else:
            most = max(MOST_TRIALS, MOST_A_PARAMETER * parameters)
            affordable = TELLING * to_search / self._trial
            value = max(LEAST_TRIALS, min(most, 10 * int(affordable / 10)))
            said += f"; a trial takes about {self._trial:.2g} s; {TELLING * to_search:.0f} s are there for them"
        if space.size < value:
            return space.size, f"{parameters} parameters: there are no more candidates"
        return value, said

    @property
    def _trial(self) -> float:
        """Seconds of a trial, with all cores at work."""
        passing = TRIAL_PASSES * self.settings.calibration_samples * (self.seen.forward or 0.0)
        return (TRIAL + passing) / cores()

    def _measurements(self, to_search: float | None) -> tuple[int, str]:
        further, members = len(self.seen.profiles) - 1, len(self.settings.family)
        if to_search is None:
            value = MEASUREMENTS + A_TARGET * further + A_MEMBER * members
            said = f"{MEASUREMENTS} for a target"
            said += f", {A_TARGET} for each further one" * bool(further)
            said += f", {A_MEMBER} for each member of the family" * bool(members)
        else:
            there = max((1 - TELLING) * to_search, to_search - self.settings.trials * self._trial)
            value = max(LEAST_MEASUREMENTS, int(there / self.seen.measuring))
            said = (
                f"a module of this size takes about {self.seen.module:.0f} s, {together(self.seen.profiles)} at once; "
                f"{there:.0f} s are there for them"
            )
        most = max(1, self.settings.trials // OF_TRIALS)
        if value > most:
            return most, f"a quarter of the {self.settings.trials} trials"
        return value, said


def _parameters(*choices: Any) -> int:
    """Groups and layers with more than one option."""
    return sum(len(options) > 1 for part in choices for options in part.values())
