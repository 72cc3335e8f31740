"""What a search space is worth: four widths a group, finer ones from the start or next to the front, and branches that may be left out whole.

    python benchmarks/spaces.py [--task digits examples.pretrained.crepe:task ...] [--trials 300] [--seeds 3] [--quick]

Every space is searched by autocomp's engine as in `benchmarks/search.py`: divergences are measured, seconds predicted from the kernels in the
cache (fill it by a search first), so that no timing disturbs the comparison. After each quarter of the trials the solver is asked again, as in a
search. "At equal seconds" is after as many seconds, the layer database included, as four widths took for all their trials.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import numpy as np
from common import earlier, mean_and_spread, publish
from prepared import TASKS
from search import CAP, TaskBench, Told, feasible, searched, volume
from threadpoolctl import threadpool_limits

from autocomp.hardware.profile import load_profile
from autocomp.processes.pool import map_in_processes
from autocomp.run.explore import SEEDS_AGAIN
from autocomp.run.finer import affordable, around
from autocomp.space.file import Rule, SpaceFile, load_space
from autocomp.study.samplers import OURS
from autocomp.study.solver import solve_front
from autocomp.study.study import Choices, Search

FINE = Rule(layers="*", keep=[1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125], ranks=[0.75, 0.625, 0.5, 0.375, 0.25])
MEASURES = ("hypervolume", "at equal seconds", "feasible")
FOUR, WITHOUT = Rule(layers="*", keep=[1.0, 0.75, 0.5, 0.25]), Rule(layers="*", depth=False)


def spaces() -> dict[str, SpaceFile]:
    """The default space, and what it is made of."""
    plain = load_space("default")

    def one(*rules: Rule) -> SpaceFile:
        return plain.model_copy(update={"rules": [*plain.rules, *rules], "refine": False})

    return {
        "four widths": one(FOUR, WITHOUT),
        "finer from the start": one(FINE, WITHOUT),
        "four widths, depth": one(FOUR),
        "five widths, depth": one(),
        "default: coarse to fine": plain,
    }


def searched_in_rounds(bench: TaskBench, trials: int, seed: int) -> list[Told]:
    """The engine's trials; finer widths are offered on the way where the space has some."""
    costs, space = bench.costs, bench.prepared.space
    database = bench.prepared.database
    costs.widen(space, database.tables())  # the process may have had another seed
    costs.fit([])

    def rounds(search: Search) -> None:
        front = [e for e in search.front() if (e.kl or 0.0) < CAP]
        if offers := around(costs, Choices(space.every_width, space.every_method), front):
            wider = affordable(database, space, costs.space, offers)
            costs.widen(wider, database.tables(wider))
            costs.fit(search.told)
            search.offer(Choices(wider.widths, wider.methods))
        for candidate in solve_front(costs.problem(), SEEDS_AGAIN):
            search.enqueue(candidate, "solver")

    with threadpool_limits(1):
        return searched(bench, OURS, seed, trials, rounds)


def compared(task: str, trials: int, seeds: int) -> dict[str, dict[str, Any]]:
    """By space: how many candidates there are, and of each measure a value for each seed."""
    told: dict[str, list[list[Told]]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, space in spaces().items():
        start = time.perf_counter()
        bench = TaskBench(task, space)
        before = time.perf_counter() - start
        runs = list(map_in_processes(partial(searched_in_rounds, bench, trials), list(range(seeds)), 2))
        told[name] = [[one._replace(at=one.at + before) for one in trials_of] for trials_of in runs]
        found[name] = {"candidates": float(bench.prepared.space.size)}
    for name, runs in told.items():
        limits = [first[-1].at for first in told["four widths"]]
        within = [[one for one in trials_of if one.at <= limit] for trials_of, limit in zip(runs, limits, strict=True)]
        found[name] |= {
            "hypervolume": [volume(trials_of) for trials_of in runs],
            "at equal seconds": [volume(trials_of) for trials_of in within],
            "feasible": [feasible(trials_of) for trials_of in runs],
            "seconds": [trials_of[-1].at for trials_of in runs],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS), help="built-in tasks, or module:function")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.task, options.trials, options.seeds = ["digits"], 25, 1
    found = earlier("spaces", "tasks") if not options.quick else {}
    for name in options.task:
        found[name] = compared(name, options.trials, options.seeds)
        written(found, options)


def written(found: dict[str, Any], options: argparse.Namespace) -> None:
    """The table, after each task."""
    rows = [
        [task, space, f"{of['candidates']:.1e}", *(mean_and_spread(of[measure]) for measure in MEASURES), f"{np.mean(of['seconds']):.1f}"]
        for task, by_space in found.items()
        for space, of in by_space.items()
    ]  # fmt: skip
    notes = [
        f"{options.trials} told trials, {options.seeds} seeds: mean and standard deviation. Divergence is measured, seconds are predicted. "
        "Two runs at a time on two cores. Finer: eight shares of the channels and five of the ranks."
    ]
    headings = ["task", "space", ">candidates"]
    headings += [">hypervolume", ">at equal seconds", ">feasible seconds / dense", ">seconds"]
    publish("spaces", headings, rows, {"tasks": found}, load_profile("x86-host"), notes, not options.quick, "tasks")


if __name__ == "__main__":
    main()
