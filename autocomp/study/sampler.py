"""The engine as an Optuna sampler: changes of the front, screened by a model of what was told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autocomp.front.pareto import Floats
from autocomp.study.parameters import Levels, levels_of
from autocomp.study.propose import propose, quiet_optuna, walk

if TYPE_CHECKING:
    from optuna.study import Study

Params = Mapping[str, Any]


class AutocompSampler(BaseSampler):
    """A sampler for two objectives or more over choices: the first is an error, the others are costs.

    Changes and crossings of the front's trials are ordered by what each would add to the front if a model fitted to what was told were
    right. It works on categories and on whole numbers at even steps; what else a study has is sampled by TPE, each by itself.

    ``seed`` makes what is proposed a function of it and of what was told. ``estimate`` gives what is known of (error, cost) before anything is
    tried, shape ``[n, 2]``, for the names of columns and rows of level numbers; numbers count from the largest value, categories as
    they stand. ``repair`` brings parameters into the form in which they would be run, so that no two proposals mean the same.

    >>> import optuna
    >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
    >>> study = optuna.create_study(directions=["minimize", "minimize"], sampler=AutocompSampler(seed=1))
    >>> def cost(trial):
    ...     width = trial.suggest_int("width", 16, 64, step=16)
    ...     return 1 / width, width
    >>> study.optimize(cost, n_trials=4)
    >>> sorted(trial.params["width"] for trial in study.trials)
    [16, 32, 48, 64]
    """

    def __init__(
        self,
        seed: int | None = None,
        estimate: Callable[[Sequence[str], Levels], Floats] | None = None,
        repair: Callable[[Params], Params] | None = None,
    ) -> None:
        self._seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self._estimate, self._repair = estimate, repair or (lambda params: params)
        self._random = RandomSampler(seed=self._seed)
        with quiet_optuna():
            self._tpe = TPESampler(seed=self._seed, multivariate=True, n_startup_trials=0)
        self._space = IntersectionSearchSpace()
        self._told: dict[int, tuple[list[int], tuple[float, float]]] = {}  # by trial: levels, error and cost
        self._shape: tuple[Any, ...] = ()  # names and levels of the space that was read last
        self._done: set[int] = set()  # trials of which nothing new is to come
        self._known: dict[int, tuple[Any, ...]] = {}  # by trial, whatever came of it: its parameters

    def reseed_rng(self) -> None:
        self._random.reseed_rng()
        self._tpe.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if _is_fixed(trial):
            return {}
        every = self._space.calculate(study)
        return {name: given for name, given in every.items() if levels_of(given) is not None}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        if len(study.directions) < 2:
            raise ValueError("AutocompSampler is for two objectives or more: an error, and what it costs")
        return self.proposal(study, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The first trials, and what is no choice."""
        if levels_of(param_distribution) is None:
            return self._tpe.sample_independent(study, trial, param_name, param_distribution)
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def proposal(self, study: Study, search_space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        """Parameters that no trial of the study has, the most promising ones; any, where all were tried."""
        names = list(search_space)
        levels = [levels_of(search_space[name]) or () for name in names]
        self._read(study, names, levels)
        taken = set(self._known.values())
        rng = np.random.default_rng([self._seed, len(self._known)])
        found: dict[str, Any] = {}
        for row in self._rows(names, levels, rng):
            found = dict(self._repair({n: options[k] for n, options, k in zip(names, levels, row, strict=True)}))
            if tuple(found.get(name) for name in names) not in taken:
                break
        return found

    def _rows(
        self, names: Sequence[str], levels: Sequence[tuple[Any, ...]], rng: np.random.Generator
    ) -> Iterator[Sequence[int] | Levels]:
        """Rows of levels, best first; made only as far as they are read."""
        sizes = np.array([len(options) for options in levels], dtype=np.int64)
        if len(self._told) >= 2:
            rows = np.array([row for row, _ in self._told.values()], dtype=np.int64)
            values = np.array([pair for _, pair in self._told.values()])
            estimate = None if self._estimate is None else functools.partial(self._estimate, names)
            yield from propose(rows, values, sizes, rng, estimate)
        yield from walk(sizes, rng)

    def _read(self, study: Study, names: Sequence[str], levels: Sequence[tuple[Any, ...]]) -> None:
        """Take in what is new in the study."""
        shape = (tuple(names), tuple(levels))
        if shape != self._shape:  # what was read of another space says nothing of this one
            self._shape = shape
            self._told, self._known, self._done = {}, {}, set()
        signs = [1.0 if direction == StudyDirection.MINIMIZE else -1.0 for direction in study.directions]
        for trial in study.get_trials(deepcopy=False):
            if trial.number in self._done or not all(name in trial.params for name in names):
                continue
            self._known[trial.number] = tuple(trial.params[name] for name in names)
            if trial.state.is_finished():
                self._done.add(trial.number)
            if trial.state == TrialState.COMPLETE and np.isfinite(trial.values).all():
                error, *costs = (sign * value for sign, value in zip(signs, trial.values, strict=True))
                row = [options.index(trial.params[name]) for name, options in zip(names, levels, strict=True)]
                self._told[trial.number] = (row, (float(error), float(np.mean(costs))))


def _is_fixed(trial: FrozenTrial) -> bool:
    """Whether a trial's parameters were given when it was enqueued."""
    return "fixed_params" in trial.system_attrs
