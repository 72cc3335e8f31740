"""Who thinks of better candidates at equal cost: autocomp's engine, Optuna's samplers, a greedy ladder over per-layer sensitivity.

    python benchmarks/search.py [--task digits resnet18 ...] [--trials 200] [--seeds 5] [--quick]

On the built-in tasks every candidate is stitched and its divergence from the dense model read on the calibration samples, as a search does;
seconds are predicted by the latency model from the kernels in the cache (fill it by a search first), so that no timing disturbs the comparison.
On larger models both are read from tables that `saved_tables.py` made, where a trial costs nothing. Every sampler runs the same loop from the
same uniform baselines; the engine's own seeds, the solver's, count among its trials.

The hypervolume is the share of the box (0.25 nats, dense seconds) that the told trials dominate; "feasible" the least predicted seconds over
dense's at 0.02 nats or less. "At equal seconds" is after as many seconds of the processor, thinking and scoring included, as the engine took
for all its trials. The ladder starts dense and makes the change that saves most seconds for each nat that the tables say. On saved tables the
"bound" is what the solver finds with the truth before it, at as many points as there are trials.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import saved_tables
from common import earlier, mean_and_spread, publish
from cost import CASES
from prepared import TASKS, Prepared, costs_of, draw, prepare
from threadpoolctl import threadpool_limits

from autocomp.accuracy.additive import additive_model
from autocomp.front.pareto import hypervolume
from autocomp.hardware.profile import load_profile
from autocomp.processes.pool import map_in_processes
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation, Source
from autocomp.run.explore import SEEDS_AGAIN, SOLVER_SEEDS, UNIFORM_KEEPS
from autocomp.space.file import SpaceFile
from autocomp.study.samplers import OURS
from autocomp.study.solver import Problem, neighbours, solve_front
from autocomp.study.study import Choices, Engine, Search, open_search

SAMPLERS = (OURS, "tpe", "nsgaii", "nsgaiii", "gp", "random")
GREEDY, BOUND = "greedy ladder", "bound"
PROFILE = "x86-host"
CAP, FEASIBLE = 0.25, 0.02  # nats
MOST = 60.0  # seconds of the processor that a sampler may think: a Gaussian process over a hundred parameters would for an hour
FITTED = 50  # random candidates that the additive model is fitted to before, as in a search
T = TypeVar("T")


class Told(NamedTuple):
    """One trial: divergence, seconds over dense's, and seconds since the run began."""

    divergence: float
    relative: float
    at: float


class Bench(Protocol):
    """What candidates cost: as it is known (``problem``), and as it is found (``evaluated``, with the seconds that this took)."""

    offered: Choices  # to every sampler
    every: Choices  # that the engine's study knows

    def normalise(self, candidate: Candidate) -> Candidate: ...

    def uniform(self, keep: float) -> Candidate: ...

    def problem(self) -> Problem: ...

    def learn(self, told: Sequence[Evaluation]) -> None: ...

    def evaluated(self, candidate: Candidate, trial: int, source: Source) -> tuple[Evaluation, float]: ...


class TaskBench:
    """A built-in task: candidates are stitched and scored."""

    def __init__(self, name: str, space: str | SpaceFile = "default") -> None:
        self.prepared: Prepared = prepare(name, space)
        self.costs, space = costs_of(self.prepared), self.prepared.space
        self.offered = Choices(space.widths, space.methods)
        self.every = Choices(space.every_width, space.every_method)
        self.normalise, self.problem = space.normalise, self.costs.problem
        self._known: dict[Candidate, tuple[float, float]] = {}
        drawn = draw(space, FITTED)
        self.costs.observe(drawn, [self.score(candidate)[0] for candidate in drawn])
        self.costs.fit([])

    def score(self, candidate: Candidate) -> tuple[float, float]:
        """The divergence, and the seconds that reading it took when it was first read."""
        if candidate not in self._known:
            start = time.process_time()
            divergence = self.prepared.score(candidate)[1]
            self._known[candidate] = divergence, time.process_time() - start
        return self._known[candidate]

    def uniform(self, keep: float) -> Candidate:
        return self.prepared.space.uniform(keep)

    def learn(self, told: Sequence[Evaluation]) -> None:
        self.costs.fit(told)

    def evaluated(self, candidate: Candidate, trial: int, source: Source) -> tuple[Evaluation, float]:
        cost = self.problem().cost(candidate)
        divergence, seconds = self.score(candidate)
        predicted = self.costs.predict(candidate)
        return Evaluation(trial, candidate, source, "told", cost.error, cost.bytes, predicted, divergence), seconds


class TableBench:
    """A larger model's saved tables: a candidate is looked up."""

    def __init__(self, name: str) -> None:
        self.saved = saved_tables.load(name)
        self.offered = self.every = self.saved.choices
        self.learn([])

    def uniform(self, keep: float) -> Candidate:
        return saved_tables.uniform(self.offered, keep)

    def learn(self, told: Sequence[Evaluation]) -> None:
        known = [
            *zip(self.saved.drawn, self.saved.divergences, strict=True),
            *((e.candidate, e.kl or 0.0) for e in told),
        ]
        self._thought = self.saved.problem(
            additive_model(self.saved.tables).fitted(*map(list, zip(*known, strict=True)))
        )

    def normalise(self, candidate: Candidate) -> Candidate:
        return candidate

    def problem(self) -> Problem:
        return self._thought

    def evaluated(self, candidate: Candidate, trial: int, source: Source) -> tuple[Evaluation, float]:
        error, seconds, size = self.saved.truth.cost(candidate)
        known = self._thought.cost(candidate).error
        return Evaluation(trial, candidate, source, "told", known, size, {PROFILE: seconds}, error), 0.0

    def bound(self, trials: int) -> list[Told]:
        """What the solver finds where it is given the truth."""
        costs = [self.saved.truth.cost(candidate) for candidate in solve_front(self.saved.truth, trials)]
        return [Told(cost.error, cost.seconds, 0.0) for cost in costs]


def run(bench: Bench, trials: int, job: tuple[str, int]) -> list[Told]:
    """One sampler with one seed: its trials in order."""
    sampler, seed = job
    bench.learn([])  # the process may have run another before
    with threadpool_limits(1):
        return ladder(bench, trials) if sampler == GREEDY else searched(bench, sampler, seed, trials)


def searched(
    bench: Bench, sampler: str, seed: int, trials: int, rounds: Callable[[Search], None] | None = None
) -> list[Told]:
    """The trials of one sampler; ``rounds`` is called where a search measures, after each quarter of them but the last. Unless it is given,
    autocomp's own learns from what was told and asks its solver again, as a search does; another is left to itself."""
    told: list[Told] = []
    thought, scored = 0.0, 0.0  # seconds

    def timed(think: Callable[[], T]) -> T:
        nonlocal thought
        start = time.process_time()
        try:
            return think()
        finally:
            thought += time.process_time() - start

    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(sampler, seed, bench.problem, bench.normalise, offered=bench.offered)
        levels = bench.every if sampler == OURS else bench.offered
        search = open_search(f"journal:///{folder}/study.journal", "run", levels, engine, profiles=[PROFILE])
        search.enqueue(bench.uniform(1.0), "dense")
        for keep in UNIFORM_KEEPS:
            search.enqueue(bench.uniform(keep), "uniform")
        if sampler == OURS:
            for candidate in timed(lambda: solve_front(bench.problem(), SOLVER_SEEDS)):
                search.enqueue(candidate, "solver")
        dense = 0.0
        while len(told) < trials and thought < MOST and (asked := timed(search.ask)) is not None:
            evaluation, scoring = bench.evaluated(asked.candidate, asked.trial, asked.source)
            scored += scoring
            timed(partial(search.tell, asked.trial, evaluation))
            dense = dense or evaluation.predicted[PROFILE]
            told.append(Told(evaluation.kl or 0.0, evaluation.predicted[PROFILE] / dense, thought + scored))
            if len(told) in (trials // 4, trials // 2, 3 * trials // 4):
                if rounds is not None:
                    timed(partial(rounds, search))
                elif sampler == OURS:
                    timed(partial(_again, bench, search))
        search.close()
    return told


def _again(bench: Bench, search: Search) -> None:
    bench.learn(search.told)
    search.offer(bench.offered)
    for candidate in solve_front(bench.problem(), SEEDS_AGAIN):
        search.enqueue(candidate, "solver")


def ladder(bench: Bench, trials: int) -> list[Told]:
    told: list[Told] = []
    dense, spent = 0.0, 0.0
    for candidate in steps(bench.problem(), bench.uniform(1.0), trials):
        evaluation, seconds = bench.evaluated(bench.normalise(candidate), 0, "uniform")
        spent += seconds
        dense = dense or evaluation.predicted[PROFILE]
        told.append(Told(evaluation.kl or 0.0, evaluation.predicted[PROFILE] / dense, spent))
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
    bench: Bench = TaskBench(name) if name in TASKS else TableBench(name)
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
            "told": len(told),
        }
        for measure, value in values.items():
            found.setdefault(sampler, {}).setdefault(measure, []).append(value)
    if isinstance(bench, TableBench):
        told = bench.bound(trials)
        found[BOUND] = {"hypervolume": [volume(told)], "feasible": [feasible(told)]}
    return found


def gain(found: dict[str, dict[str, list[float]]]) -> str:
    """How much more hypervolume than random search the engine gains, over what TPE gains; and its share of the bound."""
    means = {name: float(np.mean(by["hypervolume"])) for name, by in found.items()}
    if not {OURS, "tpe", "random"} <= {*means}:
        return "not compared"
    ours, theirs = (means[name] - means["random"] for name in (OURS, "tpe"))
    said = f"{ours:+.4f} beside {theirs:+.4f}" + (f" ({ours / theirs:.2f} times)" if theirs > 0 else "")
    return said + (f", {means[OURS] / means[BOUND]:.3f} of the bound" if BOUND in means else "")


def _spread(values: list[float] | None) -> str:
    return mean_and_spread(values) if values else ""


def _mean(values: list[float] | None) -> str:
    return f"{np.mean(values):.0f}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TASKS, *saved_tables.TABLES]
    parser.add_argument("--task", nargs="+", choices=names, default=names)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="the engine is always there"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.task, options.trials, options.seeds = ["digits", "vit_tiny"], 25, 1
    found = earlier("search", "tasks") if not options.quick else {}
    for name in options.task:
        found[name] = compared(name, options.trials, options.seeds, [OURS, *(s for s in options.samplers if s != OURS)])
        print(f"{name}: gain over random search, beside TPE's: {gain(found[name])}", flush=True)
        published(found, options.trials, options.seeds, not options.quick)  # each as it is done: all of them take long


def published(found: dict[str, Any], trials: int, seeds: int, write: bool) -> None:
    columns = [
        (_spread, "hypervolume"),
        (_spread, "at equal seconds"),
        (_spread, "feasible"),
        (_mean, "seconds"),
        (_mean, "told"),
    ]
    rows = [
        [
            CASES[task].shown if task in CASES else task,
            sampler,
            *(shown(by.get(measure)) for shown, measure in columns),
        ]
        for task, samplers in found.items()
        for sampler, by in samplers.items()
    ]
    notes = [
        f"{trials} told trials, {seeds} seeds: mean and standard deviation. Divergence is measured on {', '.join(TASKS)} and "
        "read from saved tables on the others, seconds are predicted. Seconds are the processor's; "
        f"a run ends when its sampler has thought for {MOST:g} of them.",
        "The engine's gain of hypervolume over random search, beside TPE's: "
        + ", ".join(f"{task} {gain(by)}" for task, by in found.items())
        + ".",
    ]
    headings = [
        "task",
        "sampler",
        ">hypervolume",
        ">at equal seconds",
        ">feasible seconds / dense",
        ">seconds",
        ">told",
    ]
    publish("search", headings, rows, {"tasks": found}, load_profile(PROFILE), notes, write, "tasks")


if __name__ == "__main__":
    main()
