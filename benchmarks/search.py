"""Who thinks of better candidates at equal cost: autocomp's engine, Optuna's samplers, a greedy ladder over per-layer sensitivity.

    python benchmarks/search.py [--task digits ...] [--trials 200] [--seeds 3] [--quick]

Every candidate is stitched and its divergence from the dense model read on the calibration samples, as a search does; seconds are predicted
by the latency model from the kernels in the cache (fill it by a search first), so that no timing disturbs the comparison. Every sampler runs the
same loop from the same uniform baselines; the engine's own seeds, the solver's, count among its trials.

The hypervolume is the share of the box (0.25 nats, dense seconds) that the told trials dominate; "feasible" the least predicted seconds over
dense's at 0.02 nats or less. "At equal seconds" is after as many seconds, thinking and scoring included, as the engine took for all its trials.
The ladder starts dense and makes the change that saves most seconds for each nat that the tables say.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from common import earlier, mean_and_spread, publish
from prepared import TASKS, Prepared, draw, prepare
from threadpoolctl import threadpool_limits

from autocomp.devices.open import open_device
from autocomp.front.pareto import hypervolume
from autocomp.hardware.profile import load_profile
from autocomp.processes.pool import map_in_processes
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.run.explore import SOLVER_SEEDS, UNIFORM_KEEPS
from autocomp.space.file import SpaceFile
from autocomp.study.costs import Costs
from autocomp.study.samplers import OURS
from autocomp.study.solver import Problem, neighbours, solve_front
from autocomp.study.study import Choices, Engine, Search, open_search

SAMPLERS = (OURS, "tpe", "nsgaii", "nsgaiii", "gp", "random")
GREEDY = "greedy ladder"
CAP, FEASIBLE = 0.25, 0.02  # nats
FITTED = 50  # random candidates that the additive model is fitted to before, as in a search


class Told(NamedTuple):
    """One trial: divergence, seconds over dense's, and seconds since the run began."""

    divergence: float
    relative: float
    at: float


class Bench:
    """A task with what its candidates cost."""

    def __init__(self, name: str, space: str | SpaceFile = "default") -> None:
        self.prepared: Prepared = prepare(name, space)
        device = open_device(load_profile("x86-host"))
        device.model.fit_kernels(device.store.records())
        space, graph = self.prepared.space, self.prepared.graph
        self.costs = Costs(graph, space, self.prepared.database.tables(), {"x86-host": device}, settled=True)
        self._known: dict[Candidate, tuple[float, float]] = {}
        drawn = draw(space, FITTED)
        self.costs.observe(drawn, [self.score(candidate)[0] for candidate in drawn])
        self.costs.fit([])

    def score(self, candidate: Candidate) -> tuple[float, float]:
        """The divergence, and the seconds that reading it took when it was first read."""
        if candidate not in self._known:
            start = time.perf_counter()
            divergence = self.prepared.score(candidate)[1]
            self._known[candidate] = divergence, time.perf_counter() - start
        return self._known[candidate]

    def evaluated(self, candidate: Candidate, trial: int, source: str) -> tuple[Evaluation, float]:
        cost = self.costs.problem().cost(candidate)
        divergence, seconds = self.score(candidate)
        predicted = self.costs.predict(candidate)
        found = Evaluation(trial, candidate, source, "told", cost.error, cost.bytes, predicted, divergence)  # type: ignore[arg-type]
        return found, seconds


def run(bench: Bench, trials: int, job: tuple[str, int]) -> list[Told]:
    """One sampler with one seed: its trials in order."""
    sampler, seed = job
    with threadpool_limits(1):
        return ladder(bench, trials) if sampler == GREEDY else searched(bench, sampler, seed, trials)


def searched(
    bench: Bench, sampler: str, seed: int, trials: int, rounds: Callable[[Search], None] = lambda search: None
) -> list[Told]:
    """The trials of one sampler; ``rounds`` is called where a search measures, after each quarter of them but the last."""
    space, told, spent = bench.prepared.space, [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        offered = Choices(space.widths, space.methods)
        engine = Engine(sampler, seed, bench.costs.problem, space.normalise, offered=offered)
        levels = Choices(space.every_width, space.every_method) if sampler == OURS else offered
        search = open_search(f"journal:///{folder}/study.journal", "run", levels, engine, profiles=["x86-host"])
        search.enqueue(space.dense(), "dense")
        for keep in UNIFORM_KEEPS:
            search.enqueue(space.uniform(keep), "uniform")
        start = time.perf_counter()
        if sampler == OURS:
            for candidate in solve_front(bench.costs.problem(), SOLVER_SEEDS):
                search.enqueue(candidate, "solver")
        spent += time.perf_counter() - start
        dense = bench.costs.predict(space.dense())["x86-host"]
        while len(told) < trials:
            start = time.perf_counter()
            asked = search.ask()
            if asked is None:
                break
            thinking = time.perf_counter() - start
            evaluation, scoring = bench.evaluated(asked.candidate, asked.trial, asked.source)
            start = time.perf_counter()
            search.tell(asked.trial, evaluation)
            spent += thinking + scoring + time.perf_counter() - start
            told.append(Told(evaluation.kl or 0.0, evaluation.predicted["x86-host"] / dense, spent))
            if len(told) in (trials // 4, trials // 2, 3 * trials // 4):
                start = time.perf_counter()
                rounds(search)
                spent += time.perf_counter() - start
        search.close()
    return told


def ladder(bench: Bench, trials: int) -> list[Told]:
    problem, space = bench.costs.problem(), bench.prepared.space
    dense, spent = bench.costs.predict(space.dense())["x86-host"], 0.0
    told = []
    for candidate in steps(problem, space.dense(), trials):
        evaluation, seconds = bench.evaluated(space.normalise(candidate), 0, "uniform")
        spent += seconds
        told.append(Told(evaluation.kl or 0.0, evaluation.predicted["x86-host"] / dense, spent))
    return told


def steps(problem: Problem, candidate: Candidate, count: int) -> Iterator[Candidate]:
    for _ in range(count):
        yield candidate
        now = problem.cost(candidate)
        faster = [(one, problem.cost(one)) for one in neighbours(problem, candidate)]
        faster = [(one, cost) for one, cost in faster if cost.seconds < now.seconds]
        if not faster:
            return
        prices = [(cost.error - now.error) / (now.seconds - cost.seconds) for _, cost in faster]
        candidate = faster[int(np.argmin(prices))][0]


def volume(told: Sequence[Told]) -> float:
    return hypervolume([(one.divergence / CAP, one.relative) for one in told], (1.0, 1.0))


def feasible(told: Sequence[Told]) -> float:
    return min((one.relative for one in told if one.divergence <= FEASIBLE), default=1.0)


def compared(name: str, trials: int, seeds: int, samplers: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """By sampler, and then by measure, a value for each seed."""
    bench = Bench(name)
    jobs = [(sampler, seed) for sampler in samplers for seed in range(seeds)] + [(GREEDY, 0)]
    runs = dict(zip(jobs, map_in_processes(partial(run, bench, trials), jobs, 2), strict=True))
    time_of = {seed: runs[OURS, seed][-1].at for seed in range(seeds)}
    found: dict[str, dict[str, list[float]]] = {}
    for (sampler, seed), told in runs.items():
        within = [one for one in told if one.at <= time_of[seed]]
        values = {
            "hypervolume": volume(told),
            "at equal seconds": volume(within),
            "feasible": feasible(told),
            "seconds": told[-1].at,
        }
        for measure, value in values.items():
            found.setdefault(sampler, {}).setdefault(measure, []).append(value)
    return found


def gain(found: dict[str, dict[str, list[float]]]) -> str:
    """The engine's gain of hypervolume over random search, beside TPE's."""
    means = {name: float(np.mean(found[name]["hypervolume"])) for name in (OURS, "tpe", "random") if name in found}
    if len(means) < 3:
        return "not compared"
    return f"{means[OURS] - means['random']:+.4f} beside {means['tpe'] - means['random']:+.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="the engine is always there"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.task, options.trials, options.seeds = ["digits"], 25, 1
    found = earlier("search", "tasks") if not options.quick else {}
    for name in options.task:
        found[name] = compared(name, options.trials, options.seeds, [OURS, *(s for s in options.samplers if s != OURS)])
        print(f"{name}: gain over random search, beside TPE's: {gain(found[name])}", flush=True)

    measures = ("hypervolume", "at equal seconds", "feasible", "seconds")
    rows = [
        [
            task,
            sampler,
            *(
                mean_and_spread(by[measure]) if measure != "seconds" else f"{np.mean(by[measure]):.1f}"
                for measure in measures
            ),
        ]
        for task, samplers in found.items()
        for sampler, by in samplers.items()
    ]
    notes = [
        f"{options.trials} told trials, {options.seeds} seeds: mean and standard deviation. Divergence is measured, seconds are predicted. "
        "Two runs at a time on two cores.",
        "The engine's gain of hypervolume over random search, beside TPE's: "
        + ", ".join(f"{task} {gain(by)}" for task, by in found.items())
        + ".",
    ]
    headings = ["task", "sampler", ">hypervolume", ">at equal seconds", ">feasible seconds / dense", ">seconds"]
    publish("search", headings, rows, {"tasks": found}, load_profile("x86-host"), notes, not options.quick, "tasks")


if __name__ == "__main__":
    main()
