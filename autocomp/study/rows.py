"""The trials of a study as rows of its storage: each written as a whole, so that a kill leaves it whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from autocomp.errors import UsageError
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation, Source, evaluation_from_json, evaluation_to_json, sound
from autocomp.study.parameters import Parameters
from autocomp.study.storage import Claim, close_storage, storage_errors, whatever_is_lost

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, TrialState

T = TypeVar("T")
_UPDATE = "evaluation:"  # study attribute by trial number: Optuna lets no finished trial's own attributes change


class Row(NamedTuple):
    """A trial as it is stored: its id there, its number, and what is known of it."""

    id: int
    number: int
    candidate: Candidate
    source: Source
    state: TrialState
    evaluation: Evaluation | None
    values: tuple[float, ...] | None
    system_attrs: Mapping[str, Any]


class Rows:
    """Reads and writes one study's trials and records. Every call that changes something has written it when it returns."""

    def __init__(self, storage: BaseStorage, study_id: int, url: str, parameters: Parameters, claim: Claim) -> None:
        self._storage, self._study_id, self._url = storage, study_id, url
        self._parameters, self._claim = parameters, claim
        self.objectives = len(storage.get_study_directions(study_id))
        self.unreadable = 0  # rows that are not as this autocomp writes them; they are left out

    def create(self, candidate: Candidate, source: Source, running: bool) -> tuple[int, int]:
        """A new row, running or waiting; its id and number."""
        from optuna.trial import TrialState

        from autocomp.study.trials import HandedOver

        template = HandedOver(
            TrialState.RUNNING if running else TrialState.WAITING,
            self._parameters.params(candidate),
            self._parameters.distributions,
            user_attrs={"source": source, "candidate": candidate.id},
        )
        row = self._write(lambda: self._storage.create_new_trial(self._study_id, template))
        return row, self._write(lambda: self._storage.get_trial_number_from_id(row))

    def claim(self, row: int) -> bool:
        """Begin a waiting row; False if another process did."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            return self._write(lambda: self._storage.set_trial_state_values(row, TrialState.RUNNING))
        except UpdateFinishedTrialError:
            return False

    def tell(self, row: int, evaluation: Evaluation, system_attrs: Mapping[str, Any]) -> None:
        """Store what came of a running row, before it is finished."""

        def write() -> None:
            for key, value in system_attrs.items():
                self._storage.set_trial_system_attr(row, key, value)
            self._storage.set_trial_user_attr(row, "evaluation", evaluation_to_json(evaluation))

        self._write(write)

    def finish(self, row: int, values: Sequence[float] | None) -> None:
        """End a row: with its values, or as failed."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        state = TrialState.FAIL if values is None else TrialState.COMPLETE

        def write() -> None:
            try:
                self._storage.set_trial_state_values(row, state, values)
            except UpdateFinishedTrialError:
                if (
                    self._storage.get_trial(row).state != state
                ):  # else it was written, and the connection lost before that was said
                    raise

        self._write(write)

    def update(self, evaluation: Evaluation) -> None:
        """Store what is known by now of a finished row, in one statement."""
        self.set_attr(f"{_UPDATE}{evaluation.trial}", evaluation_to_json(evaluation))

    def set_attr(self, key: str, value: Any) -> None:
        """Store a record of the whole study; ``value`` is what JSON can hold."""
        self._write(lambda: self._storage.set_study_user_attr(self._study_id, key, value))

    def get_attr(self, key: str, default: Any = None) -> Any:
        """Read what ``set_attr`` stored."""
        return self._storage.get_study_user_attrs(self._study_id).get(key, default)

    def read(self) -> list[Row]:
        """Every row of ours, by number. UsageError if some were deleted."""
        updates = self._storage.get_study_user_attrs(self._study_id)
        trials = sorted(self._storage.get_all_trials(self._study_id, deepcopy=False), key=lambda t: t.number)
        if [trial.number for trial in trials] != list(range(len(trials))):
            raise UsageError(
                "trials were deleted from the study: those that are left have numbers that new ones would get again. Put the study back as it "
                "was, or choose another --out"
            )
        rows = []
        for trial in trials:
            if "source" not in trial.user_attrs and "asked" not in trial.user_attrs:  # made by no search of ours
                continue
            try:
                rows.append(self._row(trial, updates))
            except (KeyError, TypeError, ValueError, AttributeError):
                self.unreadable += 1
        return rows

    def close(self) -> None:
        """Let go of the study and its storage."""
        self._write(self._claim.release)
        close_storage(self._storage)

    def _row(self, trial: FrozenTrial, updates: Mapping[str, Any]) -> Row:
        if "asked" in trial.user_attrs:  # as version 0.1 wrote them: no parameters
            asked = trial.user_attrs["asked"]
            candidate, source = Candidate.from_json(asked["candidate"]), asked["source"]
            self._parameters.params(candidate)  # ValueError outside the space
        else:
            candidate, source = self._parameters.candidate(trial.params), trial.user_attrs["source"]
        stored = updates.get(f"{_UPDATE}{trial.number}", trial.user_attrs.get("evaluation"))
        evaluation = None if stored is None else sound(evaluation_from_json(stored), trial.number, candidate)
        values = None if trial.values is None else tuple(trial.values)
        return Row(
            trial._trial_id, trial.number, candidate, source, trial.state, evaluation, values, trial.system_attrs
        )

    def _write(self, work: Callable[[], T]) -> T:
        """Do what writes, once more where the connection was lost meanwhile, and give a sign of life."""
        with storage_errors(self._url, "be written"):
            value = whatever_is_lost(work)
            whatever_is_lost(self._claim.sign)
        return value
