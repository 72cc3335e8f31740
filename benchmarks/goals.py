"""What goals are worth as a steer: the best feasible latency of a search with goals against the same search without, at equal budget.

    python benchmarks/goals.py [--task digits ...] [--trials 300] [--measurements 24] [--seeds 1] [--quick]

Both tell and measure as many candidates. Which measured candidate is the fastest that loses at most a point of the objective (validation split)
is decided afterwards, alike for both: so the search without goals is judged by what it was not told. What is compared is the ratio to dense.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from common import earlier, publish
from prepared import TASKS

import autocomp
from autocomp.config.settings import Goals
from autocomp.front.goals import Judge
from autocomp.hardware.profile import load_profile
from autocomp.records.run import speedup
from autocomp.records.table import read_evaluations

DROP = 0.01


def best(out: Path) -> float:
    """The speed-up of the fastest measured candidate that loses at most a point; 1 where none is faster."""
    run = autocomp.SearchResult(out).run
    dense = run.dense.evaluation
    judge = Judge(dense, Goals(max_drop=DROP), run.task.objective, run.task.higher_is_better)
    measured = [e for e in read_evaluations(out) if e.state == "measured" and not e.noisy and judge.feasible(e)]
    return max((speedup(e, dense, "x86-host") for e in measured), default=1.0)


def searched(task: str, goals: dict[str, float], trials: int, measurements: int, seed: int, folder: Path) -> float:
    out = folder / f"{task}-{seed}-{'with' if goals else 'without'}"
    with suppress(autocomp.InfeasibleError):  # it is measured all the same
        autocomp.search(task, trials=trials, measurements=measurements, seed=seed, out=out, references=False, **goals)
    return best(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--measurements", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.task, options.trials, options.measurements = ["digits"], 30, 3
    found = earlier("goals", "tasks") if not options.quick else {}
    with tempfile.TemporaryDirectory() as folder:
        for task in options.task:
            pairs = [
                [
                    searched(task, goals, options.trials, options.measurements, seed, Path(folder))
                    for goals in ({"max_drop": DROP}, {})
                ]
                for seed in range(options.seeds)
            ]
            found[task] = {"with": [a for a, _ in pairs], "without": [b for _, b in pairs]}
            print(task, found[task], flush=True)
    rows = [
        [
            task,
            " ".join(f"{value:.2f}x" for value in by["with"]),
            " ".join(f"{value:.2f}x" for value in by["without"]),
            f"{np.mean(np.array(by['with']) / np.array(by['without'])):.2f}",
        ]
        for task, by in found.items()
    ]
    notes = [
        f"{options.trials} told, {options.measurements} measured, at most a point lost on the validation split; one column a seed. Measured on "
        "this machine; two runs of one module differ by a few percent."
    ]
    headings = ["task", ">with goals", ">without", ">times faster with"]
    publish("goals", headings, rows, {"tasks": found}, load_profile("x86-host"), notes, not options.quick, "tasks")


if __name__ == "__main__":
    main()
