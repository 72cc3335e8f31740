"""The study: candidates asked and evaluations told, kept in an Optuna storage that a kill at any moment leaves whole.

A trial row holds its candidate and who thought of it (``asked``) and, once told, its ``evaluation``, as user
attributes. The levels are not Optuna parameters: each of those costs three statements, 12 ms a trial, which is all of
the budget. The sampler therefore runs on a study in memory, made from the told trials.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from autocomp.errors import UsageError
from autocomp.front.pareto import Floats, hypervolume_history, pareto_set
from autocomp.records.candidate import Candidate, Method
from autocomp.records.evaluation import Evaluation, Source, evaluation_from_json, evaluation_to_json, sound
from autocomp.study.propose import Levels, Tpe, propose, quiet_optuna
from autocomp.study.solver import Problem
from autocomp.study.storage import Claim, masked, open_storage, storage_errors

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

# One proposal in ten is TPE's: in the simulation that `propose.py` describes no worse than none, and it looks where the model would not. That
# it is ten was chosen by hand, not measured.
TPE_EVERY = 10
# Candidates of a space that is walked through whole, so that none is missed; and rows drawn at random in a larger one before it counts as
# exhausted. Both chosen by hand, not measured.
SMALL, DRAWN = 20_000, 1000
_UPDATE = "evaluation:"  # study attribute by trial number: Optuna lets no finished trial's own attributes change


class Asked(NamedTuple):
    """A trial to run: its number (the handle to tell it by), what to evaluate, and who thought of it."""

    trial: int
    candidate: Candidate
    source: Source


class Space(NamedTuple):
    """The levels of a search: descending widths by group, methods by layer; the first of each is dense."""

    widths: Mapping[str, tuple[int, ...]]
    methods: Mapping[str, tuple[Method, ...]]


def objectives(evaluation: Evaluation, yardstick: Evaluation) -> tuple[float, float]:
    """The two values to minimise: KL (without one, the additive error), and seconds relative to the yardstick's.

    Seconds are the predicted ones, averaged over the profiles. All trials of one study should carry the same tier.
    """
    ratios = [s / yardstick.predicted[p] for p, s in evaluation.predicted.items() if yardstick.predicted.get(p)]
    error = evaluation.error if evaluation.kl is None else evaluation.kl
    return float(error), float(np.mean(ratios)) if ratios else float("nan")


def open_search(
    storage_url: str,
    name: str,
    space: Space,
    seed: int = 0,
    resume: bool = False,
    problem: Callable[[], Problem] | None = None,
    normalise: Callable[[Candidate], Candidate] | None = None,
    records: Mapping[str, Any] | None = None,
) -> Search:
    """Open or create the study ``name`` in an Optuna storage (``sqlite:///path`` or another RDB URL).

    ``problem`` (gives the solver's, of the same space, as it is fitted at the time) and ``normalise`` (``Space.normalise``)
    sharpen the proposals. ``records`` are kept with a study in which nothing was asked yet, as by ``set_attr``.
    UsageError if the storage cannot be opened, the study exists and ``resume`` is not set, or its levels are others.
    """
    import optuna

    levels: dict[str, dict[str, Any]] = {
        "widths": {group: list(widths) for group, widths in space.widths.items()},
        "methods": {layer: [str(method) for method in methods] for layer, methods in space.methods.items()},
    }
    with storage_errors(storage_url, "be opened"):
        storage = open_storage(storage_url)
        exists = name in {study.study_name for study in storage.get_all_studies()}
        if exists and not resume:
            raise UsageError(
                f"{masked(storage_url)} holds a study {name!r} already: continue it with --resume, or choose another --out"
            )
        if not exists:
            with quiet_optuna():
                optuna.create_study(storage=storage, study_name=name, directions=["minimize", "minimize"])
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
        return Search(storage, study_id, space, seed, problem, normalise, claim)


class Search:
    """Ask and tell over one stored study; made by ``open_search``.

    Every call that changes something has written it when it returns. What a killed run left unfinished is asked again.
    """

    def __init__(
        self,
        storage: RDBStorage,
        study_id: int,
        space: Space,
        seed: int,
        problem: Callable[[], Problem] | None,
        normalise: Callable[[Candidate], Candidate] | None,
        claim: Claim,
    ) -> None:
        self.space = space
        self.seed = seed
        self._storage, self._study_id, self._held = storage, study_id, claim
        self._problem, self._normalise = problem, normalise or (lambda candidate: candidate)
        self._names = [*(f"width:{g}" for g in space.widths), *(f"method:{m}" for m in space.methods)]
        options = [*space.widths.values(), *space.methods.values()]
        self._sizes = np.array([len(levels) for levels in options], dtype=np.int64)
        self._columns = _problem_columns(problem(), space) if problem is not None else []
        self._told: dict[int, Evaluation] = {}
        self._waiting: list[tuple[int, Asked]] = []  # (row id in the storage, trial), in the order they were put in
        self._running: dict[int, tuple[int, Asked]] = {}
        self._seen: set[Candidate] = set()
        self._levels: dict[int, list[int]] = {}  # by told trial, each worked out once
        self._values: dict[int, tuple[float, float]] = {}  # objectives as told: updates change no yardstick
        self._tpe = Tpe(self._names, self._sizes)
        self.unreadable = 0  # trials whose records are not as this autocomp writes them; they are left out
        self._load()

    @property
    def told(self) -> list[Evaluation]:
        """Every told evaluation, with its updates, by trial number; failed ones included."""
        return [self._told[number] for number in sorted(self._told)]

    def enqueue(self, candidate: Candidate, source: Source) -> bool:
        """Put a candidate in line, before any proposal; False if it was seen already (told, asked or in line)."""
        candidate = self._normalise(candidate)
        self._encode(candidate)  # a candidate outside the space is a mistake best found here
        if candidate in self._seen:
            return False
        self._waiting.append(self._create(candidate, source, running=False))
        return True

    def ask(self) -> Asked | None:
        """The next trial: enqueued ones first, then proposals, none twice; None if the space is exhausted."""
        while self._waiting:
            row, asked = self._waiting.pop(0)
            with self._writing():
                claimed = self._claim(row)
            if claimed:
                self._running[asked.trial] = (row, asked)
                return asked
        proposed = self._propose()
        if proposed is None:
            return None
        row, asked = self._create(*proposed, running=True)
        self._running[asked.trial] = (row, asked)
        return asked

    def tell(self, trial: int, evaluation: Evaluation) -> None:
        """Store the evaluation of an asked trial and finish it. KeyError if the trial is not one asked and untold.

        The first trial told with predicted seconds is the yardstick of the second objective: let that be dense.
        """
        row, asked = self._running[trial]
        evaluation = replace(evaluation, trial=trial, candidate=asked.candidate)
        with self._writing():
            self._storage.set_trial_user_attr(row, "evaluation", evaluation_to_json(evaluation))
            self._finish(row, evaluation)
        del self._running[trial]
        self._remember(evaluation)

    def update(self, trial: int, evaluation: Evaluation) -> None:
        """Replace the evaluation of a told trial, in one statement. KeyError if it was not told.

        Its objective values stay as they were told, unless it failed since: then no proposal is made from it any more.
        """
        evaluation = replace(evaluation, trial=trial, candidate=self._told[trial].candidate)
        self.set_attr(f"{_UPDATE}{trial}", evaluation_to_json(evaluation))
        self._remember(evaluation)

    def set_attr(self, key: str, value: Any) -> None:
        """Store a record of the whole study; ``value`` is what JSON can hold."""
        with self._writing():
            self._storage.set_study_user_attr(self._study_id, key, value)

    def get_attr(self, key: str, default: Any = None) -> Any:
        """Read what ``set_attr`` stored."""
        return self._storage.get_study_user_attrs(self._study_id).get(key, default)

    def values(self) -> Floats:
        """Objective values of ``told``, shape ``[n, 2]``; NaN for failed trials."""
        return np.array([self._values[n] for n in sorted(self._values)], dtype=np.float64).reshape(-1, 2)

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
        """Let go of the study and its storage; SQLite then folds its write-ahead log into the one file."""
        with self._writing():
            self._held.release()
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _load(self) -> None:
        """Read the trials; finish what was evaluated but not told, put what was only asked back in line."""
        from optuna.trial import TrialState

        updates = self._storage.get_study_user_attrs(self._study_id)
        unfinished: list[tuple[FrozenTrial, Candidate, Source]] = []
        rows = sorted(self._storage.get_all_trials(self._study_id, deepcopy=False), key=lambda t: t.number)
        if [row.number for row in rows] != list(range(len(rows))):
            raise UsageError(
                "trials were deleted from the study: those that are left have numbers that new ones would get again. Put the study back as it "
                "was, or choose another --out"
            )
        for row in rows:
            if "asked" not in row.user_attrs:  # made by no search of ours
                continue
            try:
                candidate = Candidate.from_json(row.user_attrs["asked"]["candidate"])
                source = row.user_attrs["asked"]["source"]
                self._encode(candidate)
                stored = updates.get(f"{_UPDATE}{row.number}", row.user_attrs.get("evaluation"))
                evaluation = None if stored is None else sound(evaluation_from_json(stored), row.number, candidate)
            except (KeyError, TypeError, ValueError, AttributeError):
                self.unreadable += 1
                continue
            if evaluation is not None:
                self._remember(evaluation, None if row.state != TrialState.COMPLETE else tuple(row.values))
                self._seen.add(candidate)
                if not row.state.is_finished():
                    self._finish(row._trial_id, evaluation)
            elif row.state == TrialState.WAITING:
                self._waiting.append((row._trial_id, Asked(row.number, candidate, source)))
                self._seen.add(candidate)
            elif row.state == TrialState.RUNNING:
                unfinished.append((row, candidate, source))
        lost = []
        for row, candidate, source in unfinished:
            if candidate not in self._seen:  # else a kill came between the next line and the last one
                lost.append(self._create(candidate, source, running=False))
            self._storage.set_trial_state_values(row._trial_id, TrialState.FAIL)
        self._waiting = lost + self._waiting

    def _create(self, candidate: Candidate, source: Source, running: bool) -> tuple[int, Asked]:
        from optuna.trial import TrialState, create_trial

        state = TrialState.RUNNING if running else TrialState.WAITING
        asked = {"candidate": candidate.to_json(), "source": source}
        template = create_trial(state=state, user_attrs={"asked": asked})  # one attribute: each is a statement
        with self._writing():
            row = self._storage.create_new_trial(self._study_id, template)
            number = self._storage.get_trial_number_from_id(row)
        self._seen.add(candidate)
        return row, Asked(number, candidate, source)

    def _claim(self, row: int) -> bool:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            return self._storage.set_trial_state_values(row, TrialState.RUNNING)
        except UpdateFinishedTrialError:  # another process was faster
            return False

    def _finish(self, row: int, evaluation: Evaluation) -> None:
        from optuna.trial import TrialState

        values = self._objectives(evaluation)
        if np.isfinite(values).all():
            self._storage.set_trial_state_values(row, TrialState.COMPLETE, values)
        else:
            self._storage.set_trial_state_values(row, TrialState.FAIL)

    def _remember(self, evaluation: Evaluation, values: tuple[float, ...] | None = None) -> None:
        number = evaluation.trial
        self._told[number] = evaluation
        if number not in self._levels:
            self._levels[number] = self._encode(evaluation.candidate)
        if evaluation.state == "failed":
            self._values[number] = (float("nan"), float("nan"))
        elif values is not None:
            self._values[number] = (values[0], values[1])
        elif number not in self._values:
            self._values[number] = self._objectives(evaluation)

    def _objectives(self, evaluation: Evaluation) -> tuple[float, float]:
        if evaluation.state == "failed":
            return float("nan"), float("nan")
        yardstick = next((self._told[n] for n in sorted(self._told) if self._told[n].predicted), evaluation)
        return objectives(evaluation, yardstick)

    def _encode(self, candidate: Candidate) -> list[int]:
        try:
            levels = [widths.index(candidate.widths[group]) for group, widths in self.space.widths.items()]
            return levels + [m.index(candidate.methods[layer]) for layer, m in self.space.methods.items()]
        except (KeyError, ValueError) as error:
            raise ValueError(f"candidate {candidate.id} lies outside the search space: {error}") from error

    def _decode(self, levels: Sequence[int] | Levels) -> Candidate:
        chosen = [int(level) for level in levels]
        widths = {g: w[k] for (g, w), k in zip(self.space.widths.items(), chosen, strict=False)}
        rest = chosen[len(widths) :]
        return Candidate(widths, {m: o[k] for (m, o), k in zip(self.space.methods.items(), rest, strict=True)})

    def _propose(self) -> tuple[Candidate, Source] | None:
        """An unseen candidate, from the seed and what was told only, so a resumed search finds much the same."""
        turn = len(self._seen)
        rng = np.random.default_rng([self.seed, turn])
        for row, source in self._proposals(turn, rng):
            candidate = self._normalise(self._decode(row))
            if candidate not in self._seen:
                return candidate, source
        return None

    def _proposals(self, turn: int, rng: np.random.Generator) -> Iterator[tuple[Any, Source]]:
        """Rows of levels, best first; made only as far as they are read."""
        numbers = [n for n in sorted(self._told) if np.isfinite(self._values[n]).all()]
        if len(numbers) >= 2:
            levels = np.array([self._levels[n] for n in numbers], dtype=np.int64)
            values = np.array([self._values[n] for n in numbers])
            if turn % TPE_EVERY == 0:
                yield self._tpe.sample(levels, values, int(rng.integers(2**31))), "optuna"
            for row in propose(levels, values, self._sizes, rng, self._estimate if self._problem else None):
                yield row, "mutation"
        if np.prod(self._sizes, dtype=np.float64) <= SMALL:
            yield from ((row, "mutation") for row in itertools.product(*map(range, self._sizes)))
        else:
            yield from ((rng.integers(self._sizes), "mutation") for _ in range(DRAWN))

    def _estimate(self, rows: Levels) -> Floats:
        """Additive (error, seconds) of rows of levels, ``[n, 2]``."""
        assert self._problem is not None
        return np.stack(self._problem().costs(rows[:, self._columns])[:2], axis=1)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with storage_errors(self._storage.url, "be written"):
            yield
            self._held.sign()


def _problem_columns(problem: Problem, space: Space) -> list[int]:
    """For every column of the problem the column of the space. ValueError where the two differ in levels."""
    pairs: list[tuple[str, object, object]] = []
    pairs += [(g, w, tuple(space.widths.get(g, ()))) for g, w in zip(problem.groups, problem.widths, strict=True)]
    pairs += [(f.layer, f.methods, tuple(space.methods.get(f.layer, ()))) for f in problem.factors]
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise ValueError(f"the solver's problem has levels {ours} for {name!r}, the search space {theirs}")
    methods = {layer: len(space.widths) + k for k, layer in enumerate(space.methods)}
    groups = {group: k for k, group in enumerate(space.widths)}
    return [*(groups[g] for g in problem.groups), *(methods[f.layer] for f in problem.factors)]
