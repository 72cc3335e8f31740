"""The study: candidates asked and evaluations told, in an Optuna study that any of Optuna's tools reads and a kill leaves whole.

A trial has its candidate as parameters (``width/…``, ``method/…``), the divergence and the relative seconds on each profile as values, goals as
constraints, and who thought of it and its ``evaluation`` as attributes. It is written as a whole row, not parameter by parameter. Samplers
run on a study in memory, made from the told trials, so that none of them waits for a disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from autocomp.config.addresses import masked
from autocomp.errors import UsageError
from autocomp.front.pareto import Floats, hypervolume_history, pareto_set
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation, Source
from autocomp.study.parameters import Choices as Choices
from autocomp.study.parameters import Levels, Parameters
from autocomp.study.propose import quiet_optuna, walk
from autocomp.study.rows import Row, Rows
from autocomp.study.samplers import OURS, make_sampler
from autocomp.study.solver import Problem
from autocomp.study.storage import Claim, open_storage, storage_errors

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study, StudyDirection
    from optuna.trial import Trial

_CONSTRAINT = "constraints:"  # how Optuna names those of a trial
TRIES = 50  # proposals of a sampler that were all tried before, after which any that was not is taken; chosen by hand, not measured


class Asked(NamedTuple):
    """A trial to run: its number (the handle to tell it by), what to evaluate, and who thought of it."""

    trial: int
    candidate: Candidate
    source: Source


@dataclass(frozen=True)
class Engine:
    """What thinks of candidates: a sampler, or the name of one, and what sharpens the engine's own.

    ``problem`` gives the solver's, as it is fitted at the time; ``normalise`` is ``Space.normalise``. ``constraints`` says of
    an evaluation by how much it misses each goal (0 or less: it meets it). ``offered`` are the levels that are proposed at first, if these are
    not all of the space; ``problem`` is of them.
    """

    sampler: str | BaseSampler = OURS
    seed: int = 0
    problem: Callable[[], Problem] | None = None
    normalise: Callable[[Candidate], Candidate] = lambda candidate: candidate
    constraints: Callable[[Evaluation], Mapping[str, float]] = lambda evaluation: {}
    offered: Choices | None = None


def objectives(evaluation: Evaluation, yardstick: Evaluation) -> tuple[float, ...]:
    """The values to minimise: KL (without one, the additive error), and for each profile predicted seconds over the yardstick's.

    All trials of one study should carry the same tier.
    """
    error = evaluation.error if evaluation.kl is None else evaluation.kl
    ratios = [s / yardstick.predicted[p] for p, s in evaluation.predicted.items() if yardstick.predicted.get(p)]
    return float(error), *(ratios or [math.nan])


def open_search(
    storage_url: str,
    name: str,
    space: Choices,
    engine: Engine | None = None,
    resume: bool = False,
    records: Mapping[str, Any] | None = None,
    profiles: Sequence[str] = ("target",),
) -> Search:
    """Open or create the study ``name`` in an Optuna storage: ``journal:///path``, ``sqlite:///path`` or another RDB URL.

    ``records`` are kept with a study in which nothing was asked yet, as by ``set_attr``.
    UsageError if the storage cannot be opened, the study exists and ``resume`` is not set, or its levels are others.
    """
    import optuna

    levels = space.recorded
    with storage_errors(storage_url, "be opened"):
        storage = open_storage(storage_url)
        exists = name in {study.study_name for study in storage.get_all_studies()}
        if exists and not resume:
            raise UsageError(
                f"{masked(storage_url)} holds a study {name!r} already: continue it with --resume, or choose another --out"
            )
        if not exists:
            with quiet_optuna():
                study = optuna.create_study(storage=storage, study_name=name, directions=_minimised(1 + len(profiles)))
                study.set_metric_names(["divergence", *(f"{profile}: seconds / dense" for profile in profiles)])
        study_id = storage.get_study_id_from_name(name)
        attrs = storage.get_study_user_attrs(study_id)
        if "space" not in attrs:  # also after a kill between these statements
            for key, value in (records or {}).items():
                storage.set_study_user_attr(study_id, key, value)
            storage.set_study_user_attr(study_id, "space", levels)
        elif attrs["space"] != levels:
            changed = sorted(
                key
                for part in levels
                for key in {*levels[part], *attrs["space"][part]}
                if levels[part].get(key) != attrs["space"][part].get(key)
            )
            raise UsageError(
                f"study {name!r} in {masked(storage_url)} is of another search space (it differs in {', '.join(changed)}): "
                "resume with the same model, space and profiles, or choose another --out"
            )
        claim = Claim(storage, study_id, storage_url)
        parameters = Parameters(space)
        return Search(Rows(storage, study_id, storage_url, parameters, claim), parameters, engine or Engine())


class Search:
    """Ask and tell over one stored study; made by ``open_search``.

    Every call that changes something has written it when it returns. What a killed run left unfinished is asked again.
    """

    def __init__(self, rows: Rows, parameters: Parameters, engine: Engine) -> None:
        self.space, self.engine = parameters.space, engine
        self._rows, self._parameters = rows, parameters
        self.offer(engine.offered or self.space)
        self._told: dict[int, Evaluation] = {}
        self._waiting: list[tuple[int, Asked]] = []  # (row id in the storage, trial), in the order they were put in
        self._running: dict[int, tuple[int, Asked]] = {}
        self._seen: set[Candidate] = set()
        self._values: dict[int, tuple[float, ...]] = {}  # objectives as told: updates change no yardstick
        self._numbers: dict[Candidate, int] = {}
        self._sampler = self._make_sampler()
        self._mirror = self._new_mirror()
        self._mirrored: dict[int, Trial] = {}  # by running trial, that of the study in memory
        self._load()

    def offer(self, choices: Choices) -> None:
        """Propose these levels from now on, which are some of the space's; the engine's problem is of them."""
        self._offered = Parameters(choices)
        if self.engine.problem is not None:
            self._columns = choices.columns_of(self.engine.problem())

    @property
    def told(self) -> list[Evaluation]:
        """Every told evaluation, with its updates, by trial number; failed ones included."""
        return [self._told[number] for number in sorted(self._told)]

    @property
    def unreadable(self) -> int:
        """Trials whose records are not as this autocomp writes them; they are left out."""
        return self._rows.unreadable

    def enqueue(self, candidate: Candidate, source: Source) -> bool:
        """Put a candidate in line, before any proposal; False if it was seen already (told, asked or in line)."""
        candidate = self.engine.normalise(candidate)
        self.space.levels(candidate)  # a candidate outside the space is a mistake best found here
        if candidate in self._seen:
            return False
        self._waiting.append(self._create(candidate, source, running=False))
        return True

    def ask(self) -> Asked | None:
        """The next trial: enqueued ones first, then proposals, none twice; None if the space is exhausted."""
        while self._waiting:
            row, asked = self._waiting.pop(0)
            if self._rows.claim(row):
                self._running[asked.trial] = (row, asked)
                return asked
        if (proposed := self._propose()) is None:
            return None
        candidate, source, trial = proposed
        row, asked = self._create(candidate, source, running=True)
        self._running[asked.trial] = (row, asked)
        if trial is not None:
            self._mirrored[asked.trial] = trial
        return asked

    def tell(self, trial: int, evaluation: Evaluation) -> None:
        """Store the evaluation of an asked trial and finish it. KeyError if the trial is not one asked and untold.

        The first trial told with predicted seconds is the yardstick of the other objectives: let that be dense.
        """
        row, asked = self._running[trial]
        evaluation = replace(evaluation, trial=trial, candidate=asked.candidate)
        mirrored = self._mirrored.pop(trial, None)
        attrs = self._constraints(evaluation)
        if mirrored is not None:  # what the sampler keeps with a trial
            attrs |= self._mirror.get_trials(deepcopy=False)[mirrored.number].system_attrs
        self._rows.tell(row, evaluation, attrs)
        self._rows.finish(row, self._finite(evaluation))
        del self._running[trial]
        self._remember(evaluation)
        self._mirror_told(evaluation, attrs, mirrored)

    def update(self, trial: int, evaluation: Evaluation) -> None:
        """Replace the evaluation of a told trial, in one statement. KeyError if it was not told.

        Its objective values stay as they were told, unless it failed since: then no proposal is made from it any more.
        """
        before = self._told[trial]
        evaluation = replace(evaluation, trial=trial, candidate=before.candidate)
        self._rows.update(evaluation)
        self._remember(evaluation)
        if evaluation.state == "failed" and before.state != "failed":
            self._mirror_again()

    def set_attr(self, key: str, value: Any) -> None:
        """Store a record of the whole study; ``value`` is what JSON can hold."""
        self._rows.set_attr(key, value)

    def get_attr(self, key: str, default: Any = None) -> Any:
        """Read what ``set_attr`` stored."""
        return self._rows.get_attr(key, default)

    def values(self) -> Floats:
        """Divergence and relative seconds (the mean over the profiles) of ``told``, shape ``[n, 2]``; NaN for failed trials."""
        pairs = [(error, float(np.mean(costs))) for error, *costs in (self._values[n] for n in sorted(self._values))]
        return np.array(pairs, dtype=np.float64).reshape(-1, 2)

    def front(self) -> list[Evaluation]:
        """Told evaluations that no other dominates in error and predicted seconds, fast to slow."""
        told = self.told
        return [told[k] for k in pareto_set(self.values())]

    def hypervolume(self, error_cap: float | None = None) -> list[float]:
        """Dominated share, in [0, 1], of the box up to (``error_cap``, dense seconds), after each told trial.

        The cap is 1 nat where KL was read and otherwise the largest error of the first told tenth or 10; past it a
        model is of no use, and a front should not be praised for getting there fast.
        """
        points = self.values()
        if error_cap is None:
            first = points[: max(10, len(points) // 10), 0]
            error_cap = 1.0 if any(e.kl is not None for e in self.told) else float(np.nanmax(first, initial=0.0))
        if not len(points) or error_cap <= 0:
            return [0.0] * len(points)
        return hypervolume_history(points / np.array([error_cap, 1.0]), (1.0, 1.0))

    def close(self) -> None:
        """Let go of the study and its storage."""
        self._rows.close()

    def _load(self) -> None:
        """Read the trials; finish what was evaluated but not told, put what was only asked back in line."""
        from optuna.trial import TrialState

        unfinished: list[Row] = []
        for row in self._rows.read():
            if row.evaluation is not None:
                complete = row.state == TrialState.COMPLETE and row.values is not None
                self._remember(row.evaluation, row.values if complete else None)
                self._seen.add(row.candidate)
                if not row.state.is_finished():
                    self._rows.finish(row.id, self._finite(row.evaluation))
                self._mirror_told(row.evaluation, row.system_attrs)
            elif row.state == TrialState.WAITING:
                self._waiting.append((row.id, Asked(row.number, row.candidate, row.source)))
                self._seen.add(row.candidate)
            elif row.state == TrialState.RUNNING:
                unfinished.append(row)
        lost = []
        for row in unfinished:
            if row.candidate not in self._seen:  # else a kill came between the next line and the last one
                lost.append(self._create(row.candidate, row.source, running=False))
            self._rows.finish(row.id, None)
        self._waiting = lost + self._waiting

    def _create(self, candidate: Candidate, source: Source, running: bool) -> tuple[int, Asked]:
        row, number = self._rows.create(candidate, source, running)
        self._seen.add(candidate)
        return row, Asked(number, candidate, source)

    def _remember(self, evaluation: Evaluation, values: tuple[float, ...] | None = None) -> None:
        number = evaluation.trial
        self._told[number] = evaluation
        self._numbers[evaluation.candidate] = number
        if evaluation.state == "failed":
            self._values[number] = (math.nan,) * self._rows.objectives
        elif values is not None:
            self._values[number] = values
        elif number not in self._values:
            self._values[number] = self._objectives(evaluation)

    def _objectives(self, evaluation: Evaluation) -> tuple[float, ...]:
        if evaluation.state == "failed":
            return (math.nan,) * self._rows.objectives
        yardstick = next((self._told[n] for n in sorted(self._told) if self._told[n].predicted), evaluation)
        error, *costs = objectives(evaluation, yardstick)
        if len(costs) != self._rows.objectives - 1:  # a study of version 0.1 on several profiles, which has their mean
            costs = [float(np.mean(costs))] * (self._rows.objectives - 1)
        return error, *costs

    def _finite(self, evaluation: Evaluation) -> tuple[float, ...] | None:
        values = self._objectives(evaluation)
        return values if np.isfinite(values).all() else None

    # --- what proposes: a sampler on a study in memory ---

    def _make_sampler(self) -> BaseSampler:
        given = self.engine.sampler
        if not isinstance(given, str):
            return given
        estimate = self._estimate if self.engine.problem is not None else None
        return make_sampler(given, self.engine.seed, estimate, self._repaired)

    def _new_mirror(self) -> Study:
        import optuna

        with quiet_optuna():
            return optuna.create_study(directions=_minimised(self._rows.objectives), sampler=self._sampler)

    def _propose(self) -> tuple[Candidate, Source, Trial | None] | None:
        """An unseen candidate, from the sampler's seed and what was told only, so a resumed search finds much the same."""
        for candidate, source, trial in self._proposals():
            if candidate not in self._seen:
                return candidate, source, trial
            if trial is not None:
                values = self._values.get(self._numbers.get(candidate, -1))
                self._tell_mirror(trial, values if values is not None and np.isfinite(values).all() else None)
        return None

    def _proposals(self) -> Iterator[tuple[Candidate, Source, Trial | None]]:
        """What the sampler proposes, some times, and then whatever there is."""
        from autocomp.study.sampler import AutocompSampler

        sampler = self._sampler
        if isinstance(sampler, AutocompSampler):
            # as a whole: asking Optuna for each parameter takes longer than to find them all
            yield self._candidate(sampler.proposal(self._mirror, self._offered.distributions)), "mutation", None
        else:
            for _ in range(TRIES):
                with quiet_optuna():
                    trial = self._mirror.ask(self._offered.distributions)
                yield self._candidate(trial.params), "optuna", trial
        rng, offered = np.random.default_rng([self.engine.seed, len(self._seen)]), self._offered.space
        for row in walk(offered.sizes, rng):
            yield self.engine.normalise(offered.candidate(row)), "mutation", None

    def _candidate(self, params: Mapping[str, Any]) -> Candidate:
        return self.engine.normalise(self._parameters.candidate(params))

    def _constraints(self, evaluation: Evaluation) -> dict[str, Any]:
        return {f"{_CONSTRAINT}{key}": value for key, value in self.engine.constraints(evaluation).items()}

    def _mirror_told(self, evaluation: Evaluation, attrs: Mapping[str, Any], trial: Trial | None = None) -> None:
        from optuna.trial import TrialState

        from autocomp.study.trials import HandedOver

        values = self._values[evaluation.trial]
        whole = values if np.isfinite(values).all() else None
        if trial is not None:
            for key, value in attrs.items():
                if key.startswith(_CONSTRAINT):
                    trial.set_constraint(key.removeprefix(_CONSTRAINT), value)
            self._tell_mirror(trial, whole)
        elif whole is not None:
            params, distributions = self._parameters.params(evaluation.candidate), self._parameters.distributions
            self._mirror.add_trial(HandedOver(TrialState.COMPLETE, params, distributions, whole, system_attrs=attrs))

    def _tell_mirror(self, trial: Trial, values: Sequence[float] | None) -> None:
        from optuna.trial import TrialState

        if values is None:
            self._mirror.tell(trial, state=TrialState.FAIL)
        else:
            self._mirror.tell(trial, list(values))

    def _mirror_again(self) -> None:
        """Start the study in memory anew: Optuna cannot take back what it was told."""
        self._sampler, self._mirrored = self._make_sampler(), {}
        self._mirror = self._new_mirror()
        for evaluation in self.told:
            self._mirror_told(evaluation, self._constraints(evaluation))

    def _repaired(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return self._parameters.params(self._candidate(params))

    def _estimate(self, names: Sequence[str], rows: Levels) -> Floats:
        """Additive (error, seconds) of rows of levels of what is offered, ``[n, 2]``."""
        assert self.engine.problem is not None
        every = np.zeros((len(rows), len(self._offered.names)), dtype=np.int64)
        every[:, [self._offered.names.index(name) for name in names]] = rows
        return np.stack(self.engine.problem().costs(every[:, self._columns])[:2], axis=1)


def _minimised(count: int) -> list[StudyDirection]:
    from optuna.study import StudyDirection

    return [StudyDirection.MINIMIZE] * count
