"""Candidates as Optuna's parameters: ``width/GROUP`` and ``method/LAYER``, for every group and layer that has a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from autocomp.records.candidate import Candidate, Method

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from autocomp.study.solver import Problem

Levels = npt.NDArray[np.int64]


class Choices(NamedTuple):
    """The levels of a search: descending widths by group, methods by layer; the first of each is dense."""

    widths: Mapping[str, tuple[int, ...]]
    methods: Mapping[str, tuple[Method, ...]]

    @property
    def options(self) -> list[tuple[Any, ...]]:
        return [*self.widths.values(), *self.methods.values()]

    @property
    def sizes(self) -> Levels:
        return np.array([len(levels) for levels in self.options], dtype=np.int64)

    @property
    def recorded(self) -> dict[str, dict[str, Any]]:
        """The levels as a study records them."""
        return {
            "widths": {group: list(widths) for group, widths in self.widths.items()},
            "methods": {layer: [str(method) for method in methods] for layer, methods in self.methods.items()},
        }

    def columns_of(self, problem: Problem) -> list[int]:
        """For every column of the solver's problem the column here. ValueError where the two differ in levels."""
        pairs: list[tuple[str, object, object]] = []
        pairs += [(g, w, tuple(self.widths.get(g, ()))) for g, w in zip(problem.groups, problem.widths, strict=True)]
        pairs += [(f.layer, f.methods, tuple(self.methods.get(f.layer, ()))) for f in problem.factors]
        for name, ours, theirs in pairs:
            if ours != theirs:
                raise ValueError(f"the solver's problem has levels {ours} for {name!r}, the search space {theirs}")
        groups = {group: k for k, group in enumerate(self.widths)}
        methods = {layer: len(groups) + k for k, layer in enumerate(self.methods)}
        return [*(groups[g] for g in problem.groups), *(methods[f.layer] for f in problem.factors)]

    def levels(self, candidate: Candidate) -> list[int]:
        """A candidate as numbers of levels, widths first. ValueError if it lies outside the space."""
        try:
            found = [widths.index(candidate.widths[group]) for group, widths in self.widths.items()]
            return found + [m.index(candidate.methods[layer]) for layer, m in self.methods.items()]
        except (KeyError, ValueError) as error:
            raise ValueError(f"candidate {candidate.id} lies outside the search space: {error}") from error

    def candidate(self, levels: Sequence[int] | Levels) -> Candidate:
        """The candidate of one row of levels."""
        chosen = [int(level) for level in levels]
        widths = {g: w[k] for (g, w), k in zip(self.widths.items(), chosen, strict=False)}
        rest = chosen[len(widths) :]
        return Candidate(widths, {m: o[k] for (m, o), k in zip(self.methods.items(), rest, strict=True)})


class Parameters:
    """The parameters of a space: their names, distributions, and how candidates are written in them."""

    def __init__(self, space: Choices) -> None:
        self.space = space
        widths = {f"width/{group}": levels for group, levels in space.widths.items()}
        methods = {f"method/{layer}": tuple(map(str, levels)) for layer, levels in space.methods.items()}
        self.names = [*widths, *methods]
        values: list[tuple[Any, ...]] = [*widths.values(), *methods.values()]
        self.values = values
        self.distributions: dict[str, BaseDistribution] = {
            name: distribution(levels) for name, levels in zip(self.names, values, strict=True) if len(levels) > 1
        }

    def params(self, candidate: Candidate) -> dict[str, Any]:
        """A candidate's parameters. ValueError if it lies outside the space."""
        chosen = self.space.levels(candidate)
        every = zip(self.names, self.values, chosen, strict=True)
        return {name: levels[k] for name, levels, k in every if len(levels) > 1}

    def candidate(self, params: Mapping[str, Any]) -> Candidate:
        """The candidate of some parameters; dense where one is missing. ValueError for a value that is no level."""
        every = zip(self.names, self.values, strict=True)
        return self.space.candidate([levels.index(params[n]) if n in params else 0 for n, levels in every])


def distribution(levels: Sequence[Any]) -> BaseDistribution:
    """Numbers at even steps as a range, which samplers know to be ordered; anything else as categories."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if all(isinstance(level, int) for level in levels):
        steps = set(np.abs(np.diff(levels)).tolist())
        if len(steps) == 1:
            return IntDistribution(min(levels), max(levels), step=int(steps.pop()))
    return CategoricalDistribution(tuple(levels))


def levels_of(given: BaseDistribution) -> tuple[Any, ...] | None:
    """The levels of a distribution in the order of a `Space` (numbers descending); None where there are endless ones."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(given, CategoricalDistribution):
        return tuple(given.choices)
    if isinstance(given, IntDistribution) and not given.log:
        return tuple(range(given.high, given.low - 1, -given.step))
    return None
