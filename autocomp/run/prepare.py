"""The first part of a run: everything there is before the first candidate, from the task to the layer database."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.config.settings import Settings
from autocomp.devices.device import Device
from autocomp.devices.open import open_named
from autocomp.front.goals import check_drops
from autocomp.measurement.measurer import Measurer
from autocomp.measurement.preflight import rehearse
from autocomp.progress import Progress, Stage
from autocomp.records.candidate import Candidate
from autocomp.run.budget import Budget
from autocomp.run.identity import compression_of, identity_of, refuse_another, refuse_other_widths
from autocomp.run.prepare_task import check_training, compressed_layers, prepare_task, said_of_size
from autocomp.run.replay import Choice, choices, only
from autocomp.space.file import load_space
from autocomp.space.space import Space
from autocomp.tasks.task import Task, objective_of

if TYPE_CHECKING:
    import torch
    from optuna.samplers import BaseSampler

    from autocomp.database.calibrate import Statistics
    from autocomp.database.database import LayerDatabase
    from autocomp.graph.graph import Graph
    from autocomp.recovery.channels import Wide

SETTLED = 2.0  # seconds of work after which its rate says something


@dataclass(frozen=True)
class Prepared:
    """A run before its first candidate. ``task`` is as it is compressed; ``graph`` and ``space`` are those of its model.

    ``known`` is what the study of a run that is resumed has recorded, None for a new run; ``identity`` what this one is known by.
    ``inputs`` are what compiled modules are compared with torch on.
    """

    settings: Settings
    folder: Path
    progress: Progress
    budget: Budget
    known: Mapping[str, Any] | None
    identity: Mapping[str, Any]
    task: Task
    graph: Graph
    space: Space
    devices: Mapping[str, Device]
    measurer: Measurer
    statistics: Statistics
    database: LayerDatabase
    sampler: BaseSampler | None = None  # the caller's own, in place of the settings' by name
    replayed: Sequence[Choice] = ()  # candidates of another run, in the place of a search

    @property
    def inputs(self) -> list[tuple[torch.Tensor, ...]]:
        return list(self.measurer.inputs)

    def stitch(self, candidate: Candidate) -> torch.nn.Module:
        """The candidate as a model of its own."""
        return self.measurer.stitch(candidate)

    def stitch_untrained(self, candidate: Candidate) -> torch.nn.Module:
        """The candidate as it was compressed, whatever was learnt since."""
        from autocomp.database.stitch import stitch

        return stitch(self.task.model, self.graph, self.database, candidate)

    def trained(self, candidate: Candidate, weights: str) -> torch.nn.Module:
        """The candidate with what a file of the run folder says it learnt. CorruptError, FileNotFoundError if it does not."""
        from autocomp.database.stitch import stitch
        from autocomp.recovery.stored import restored

        model = stitch(self.task.model, self.graph, self.database, candidate, reestimate=False)
        return restored(model, self.folder / weights)

    def shared_layers(self, candidate: Candidate) -> dict[str, torch.Tensor | None]:
        """The layers whose outputs a candidate shares with the uncompressed model, and which of its channels it kept (None: all)."""
        from autocomp.recovery.losses import shared_layers

        candidate = self.space.normalise(candidate)
        return shared_layers(
            self.graph.without(self.space.left_out(candidate.widths)),
            lambda layer: self.database.rows(layer.name, candidate.widths[layer.out_group or ""]),
        )

    def wide(self, candidate: Candidate) -> Wide:
        """The candidate before its channels are chosen."""
        from autocomp.recovery.channels import Wide, units_of

        candidate = self.space.normalise(candidate)
        model, graph, met = self.task.model, self.graph, set[str]()
        # Branches go at once; the channels of what is left are chosen.
        if ended := self.space.left_out(candidate.widths):
            full = self.space.dense()
            model = self.stitch_untrained(Candidate({**full.widths, **dict.fromkeys(ended, 0)}, full.methods))
            met = {graph.layers[end].out_group or "" for name in ended for end in graph.branches[name].ends}
            graph = graph.without(ended)
        return Wide(model, graph, units_of(graph, candidate.widths, self.space.counts), frozenset(met))

    def keep_for_the_end(self, point: float) -> None:
        """Keep the minutes that the end of the run takes, where writing one point takes so many seconds."""
        self.budget.keep_for_the_end(point, self.measurer.together, self.settings.references)


def prepare(
    settings: Settings,
    task: Task,
    folder: Path,
    known: Mapping[str, Any] | None,
    progress: Progress,
    sampler: BaseSampler | None = None,
    spent: float = 0.0,
) -> Prepared:
    """Prepare a run, ``sampler`` being the caller's own; so many seconds of its minutes are ``spent``.

    What can be refused is refused here: UsageError, ExportError, AutocompError before anything is searched.
    """
    from autocomp.database.stitch import stitch

    budget = Budget(settings.minutes, spent)
    with progress.stage("preparing devices", len(settings.profiles)) as stage:
        devices = {name: _open_device(name, stage) for name in settings.profiles}
    rules = load_space(settings.space)
    identity = {**identity_of(task), "how layers are compressed": compression_of(settings, rules)}
    begun = known if known and "space" in known else None  # else nothing was asked yet
    if begun is not None:
        refuse_another(begun.get("identity", {}), identity, folder)
    given = task.given_model
    profiles = [device.profile for device in devices.values()]
    ready = prepare_task(task, rules, profiles, settings.calibration_samples, progress)
    if replayed := choices(settings, known):
        ready = replace(ready, space=only(ready.space, replayed, settings.replay or ""))
    if begun is not None:
        refuse_other_widths(begun, ready.space, folder)
    task, graph, inputs = ready.task, ready.graph, ready.inputs
    for note in said_of_size(task.model):
        progress.warn(note)
    amount, unit = settings.training
    if amount:
        with progress.stage("trying to train"):
            check_training(task, settings.recipe, amount if unit == "seconds" else math.inf)
        budget.training = amount if unit == "seconds" else 0.0
    measurer = Measurer(task, devices, inputs, lambda candidate: stitch(task.model, graph, database, candidate))
    if not (known and (folder / "layers").exists()):  # else a run got past this before
        measurer.rehearsed = rehearse(task, devices, inputs, progress, given)
        metrics = measurer.rehearsed.metrics
        check_drops(settings.goals, objective_of(task, metrics), metrics, "Task.evaluate returns")
        budget.keep_for_the_end(measurer.rehearsed.seconds, measurer.together, settings.references)
    samples, seed = settings.calibration_samples, settings.seed
    statistics, database = compressed_layers(
        ready, folder / "layers", samples, seed, progress, _Forecast(budget, progress)
    )
    space = ready.space if replayed else ready.space.without(database.dominated(profiles))
    return Prepared(
        settings,
        folder,
        progress,
        budget,
        known,
        identity,
        task,
        graph,
        space,
        devices,
        measurer,
        statistics,
        database,
        sampler,
        replayed,
    )


class _Forecast:
    """Warns once, in time, if the layer database will take the time to search."""

    def __init__(self, budget: Budget, progress: Progress) -> None:
        self.budget, self.progress = budget, progress
        self._warned = False

    def __call__(self, share: float, seconds: float) -> None:
        """A share of the database was made in so many seconds."""
        if seconds < SETTLED or self._warned:
            return
        if said := self.budget.forecast("compressing the layers", seconds / share - seconds):
            self._warned = True
            self.progress.warn(said)


def _open_device(name: str, stage: Stage) -> Device:
    device = open_named(name)
    if device.store.corrupt:
        stage.warn(f"{device.store.corrupt} damaged records of the kernel store {device.store.folder} are tuned again")
        device.store.compact()
    for note in device.notes:
        stage.warn(note)
    stage.advance()
    return device
