"""The samplers that a search can be run with, by name: the engine's own, and Optuna's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autocomp.errors import UsageError
from autocomp.study.propose import quiet_optuna

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from autocomp.front.pareto import Floats
    from autocomp.study.parameters import Levels
    from autocomp.study.sampler import Params

OURS = "autocomp"
GIVEN = "given"  # one that the caller made


def make_sampler(
    name: str,
    seed: int,
    estimate: Callable[[Sequence[str], Levels], Floats] | None = None,
    repair: Callable[[Params], Params] | None = None,
) -> BaseSampler:
    """A sampler by its name. UsageError if it needs a package that is not there."""
    import optuna

    from autocomp.study.sampler import AutocompSampler

    made: dict[str, Callable[[], BaseSampler]] = {
        OURS: lambda: AutocompSampler(seed, estimate, repair),
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True),
        "nsgaii": lambda: optuna.samplers.NSGAIISampler(seed=seed),
        "nsgaiii": lambda: optuna.samplers.NSGAIIISampler(seed=seed),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    try:
        with quiet_optuna():
            return made[name]()
    except ImportError as error:
        raise UsageError(f"--sampler {name} needs a package that is not installed: {error}") from error
