"""How far each accuracy proxy can be trusted: rank correlations over random candidates of every built-in task.

    python benchmarks/fidelity.py [--task digits ...] [--candidates 60] [--distilled 20] [--steps 100] [--space default] [--quick]

Candidates are drawn across the whole range of strengths. Tier 0 is the additive error: raw, and fitted, each candidate by the model fitted to
four fifths of the others. Tier 1 is the KL of the stitched model from the dense one on calibration data, tier 2 the metric on the validation
split. How well the metric agrees with itself between validation and test split is the most any proxy could reach. Distilled candidates have
all layers in floats, as they always had in this table.
"""

from __future__ import annotations

import argparse
import time

from common import earlier, publish
from prepared import TASKS, Prepared, correlations, draw, in_floats, prepare

from autocomp.hardware.profile import load_profile
from autocomp.recovery.lessons import Teaching
from autocomp.recovery.recipe import load_recipe
from autocomp.recovery.schedules import Span
from autocomp.recovery.train import train

RATE = 1e-3  # of learning
GOALS = {"tier 0, fitted, against KL": 0.90, "KL against metric": 0.95}


def fidelity(prepared: Prepared, count: int) -> dict:
    """Correlations of the proxies over ``count`` candidates, and the values behind them."""
    candidates = draw(prepared.space, count)
    start, divergences, validation, test = time.perf_counter(), [], [], []
    for candidate in candidates:
        model, divergence = prepared.score(candidate)
        divergences.append(divergence)
        validation.append(prepared.metric(model))
        test.append(prepared.metric(model, "test"))
    raw = prepared.additive.predict(candidates).tolist()
    fitted = prepared.additive.held_out(candidates, divergences).tolist()
    falling = [-value for value in validation]
    return {
        "candidates": len(candidates),
        "seconds": time.perf_counter() - start,
        "metric_range": [min(validation), max(validation)],
        "correlations": {
            "tier 0, raw, against KL": correlations(raw, divergences),
            "tier 0, fitted, against KL": correlations(fitted, divergences),
            "tier 0, fitted, against metric": correlations(fitted, falling),
            "KL against metric": correlations(divergences, falling),
            "metric against itself on the test split": correlations(validation, test),
        },
        "values": {"raw": raw, "fitted": fitted, "kl": divergences, "validation": validation, "test": test},
    }


def distilled(prepared: Prepared, count: int, steps: int) -> dict:
    """Correlation of KL before distillation with the metric after it, over candidates in floats."""
    start, divergences, before, after = time.perf_counter(), [], [], []
    seen: set[str] = set()
    teaching = Teaching.of(prepared.task)
    teaching.lessons.draw(most=steps)
    for candidate in draw(prepared.space, 4 * count, seed=1):
        candidate = in_floats(candidate, prepared.space)
        if candidate.id in seen or candidate == prepared.space.dense() or len(seen) == count:
            continue
        seen.add(candidate.id)
        model, divergence = prepared.score(candidate)
        divergences.append(divergence)
        before.append(prepared.metric(model))
        done = train(model, teaching, load_recipe("quick"), Span(steps=steps), RATE)
        after.append(prepared.metric(done.model))
    return {
        "candidates": len(after),
        "steps": steps,
        "seconds": time.perf_counter() - start,
        "correlations": {
            "KL against metric (in floats)": correlations(divergences, [-value for value in before]),
            f"KL against metric after {steps} steps": correlations(divergences, [-value for value in after]),
        },
        "values": {"kl": divergences, "before": before, "after": after},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--candidates", type=int, default=60)
    parser.add_argument("--distilled", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--space", default="default")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few candidates, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.candidates, options.distilled, options.steps = 30, 3, 3
    data = {} if options.quick else earlier("fidelity", "tasks")
    for name in options.task:
        prepared = prepare(name, options.space)
        data[name] = {
            "space": options.space,
            "proxies": fidelity(prepared, options.candidates),
            "distilled": distilled(prepared, options.distilled, options.steps),
        }
    rows = []
    for name, found in data.items():
        for part in (found["proxies"], found["distilled"]):
            for what, (spearman, kendall) in part["correlations"].items():
                goal = f">= {GOALS[what]:.2f}" if what in GOALS else "-"
                rows.append([name, what, str(part["candidates"]), f"{spearman:.3f}", f"{kendall:.3f}", goal])
    headings = ["task", "what", ">candidates", ">Spearman", ">Kendall", ">goal (Spearman)"]
    notes = [
        f"{name}: search space `{found['space']}`, metric (validation) from {low:.3f} to {high:.3f}."
        for name, found in data.items()
        for low, high in [found["proxies"]["metric_range"]]
    ]
    publish("fidelity", headings, rows, {"tasks": data}, load_profile("x86-host"), notes, not options.quick, "tasks")


if __name__ == "__main__":
    main()
