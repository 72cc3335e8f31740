"""Trials that are handed over to a study whole, at little cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState


class HandedOver(FrozenTrial):
    """A trial that a study in memory may keep as it is: nobody else has it.

    Optuna's own way, ``create_trial`` and a copy, looks at every distribution for what its earlier versions wrote and copies each of them:
    at a hundred parameters that takes longer than all else a trial costs.
    """

    def __init__(
        self,
        state: TrialState,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        values: Sequence[float] | None = None,
        user_attrs: Mapping[str, Any] | None = None,
        system_attrs: Mapping[str, Any] | None = None,
    ) -> None:
        now = datetime.now()
        super().__init__(
            number=-1, trial_id=-1, state=state, value=None, values=values, intermediate_values={},
            datetime_start=None if state == TrialState.WAITING else now, datetime_complete=now if state.is_finished() else None,
            params=dict(params), distributions=dict(distributions), user_attrs=dict(user_attrs or {}), system_attrs=dict(system_attrs or {}),
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> HandedOver:
        return self
