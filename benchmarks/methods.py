"""What each way of compressing reaches at equal latency, without any retraining: classic recipes, each of our methods alone, and all together.

    python benchmarks/methods.py [--task digits ...] [--only joint pruning ...] [--trials 120] [--measurements 12] [--quick]

Every method of ours is a search of its own with a search space that offers nothing else; "joint" offers all that the processor computes in.
Classic pruning is by L1 norms with BatchNorm re-estimated, int8 PTQ is ONNX Runtime's (static, QDQ). Ours and the classic models are timed as
compiled modules, ONNX Runtime in the same run as our dense module; speed-ups are over tuned dense fp32 of the same run. At each speed-up stands
the best objective (validation split) of all measured points at least that fast. The hypervolume is the share of the box from dense down to
10 points lost that the points dominate.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from common import earlier, publish
from prepared import TASKS, prepare

from autocomp.config.settings import load_settings
from autocomp.devices.open import open_device
from autocomp.front.pareto import hypervolume
from autocomp.hardware.profile import load_profile
from autocomp.measurement.classic import classic_models
from autocomp.measurement.references import INT8, OURS, measure_references
from autocomp.progress import Progress
from autocomp.run.explore import explore
from autocomp.run.prepare import prepare as prepare_run
from autocomp.run.prepare_task import checked_inputs
from autocomp.tasks.task import evaluate_task, load_task, objective_of
from autocomp.tasks.training import one_thread

KEEPS = [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
SPEEDUPS = (2.0, 3.0, 4.0)
CAP = 0.1  # of the objective: what loses more is of no use to anyone
SPACES = {
    "pruning": {"keep": KEEPS, "ranks": [], "precisions": ["fp32"]},
    "rank": {"keep": [1.0], "ranks": [0.75, 0.5, 0.375, 0.25, 0.125], "precisions": ["fp32"]},
    "w8a8": {"keep": [1.0], "ranks": [], "precisions": ["fp32", "w8a8"]},
    "w8w4": {"keep": [1.0], "ranks": [], "precisions": ["fp32", "w8g128", "w4"]},
    "vq": {"keep": [1.0], "ranks": [], "precisions": ["fp32", "vq4", "vq2", "rvq4", "rvq2"]},
    "joint": {"keep": KEEPS, "ranks": [0.75, 0.5, 0.25], "precisions": ["fp32", "fp16", "w8a8"]},
}
CLASSICS = ("uniform L1", "global magnitude", "ONNX Runtime int8 PTQ")

Points = list[tuple[float, float]]  # (speed-up over tuned dense fp32, objective with larger being better)


def searched(task: str, method: str, trials: int, measurements: int, folder: Path) -> dict:
    """Search one space; every measured candidate as a point, dense first."""
    space = folder / f"{method}.yaml"
    kernels_only = method == "joint"
    space.write_text(
        yaml.safe_dump(
            {"format_version": 1, "kernels_only": kernels_only, "rules": [{"layers": "*", **SPACES[method]}]}
        )
    )
    given = {
        "task": task,
        "space": str(space),
        "out": str(folder / method),
        "trials": trials,
        "measurements": measurements,
    }
    settings = load_settings(None, {**given, "references": False})
    with one_thread():
        prepared = prepare_run(settings, load_task(task), folder / method, None, Progress())
        start = time.perf_counter()
        with explore(prepared) as found:
            dense, told = found.dense(), found.told
    sign = 1 if prepared.task.higher_is_better else -1
    objective = objective_of(prepared.task, dense.metrics)
    measured = [e for e in told if e.state == "measured"]
    whole = sign * dense.metrics[objective]
    return {
        "points": [
            (dense.latency[p].seconds / e.latency[p].seconds, sign * e.metrics[objective])
            for e in measured
            for p in e.latency
        ],
        "dense": whole,
        "seconds": time.perf_counter() - start,
        "smallest_within_a_point": min(e.bytes for e in measured if sign * e.metrics[objective] >= whole - 0.01)
        / dense.bytes,
    }


def classics(task: str, folder: Path, keeps: Sequence[float]) -> dict[str, dict]:
    """Classic pruning at several shares, and ONNX Runtime's int8, as points."""
    space = folder / "classic.yaml"
    space.write_text(yaml.safe_dump({"format_version": 1, "rules": [{"layers": "*", **SPACES["pruning"]}]}))
    prepared = prepare(task, str(space), folder=folder / "classic")
    device = open_device(load_profile("x86-host"))
    inputs = checked_inputs(prepared.task)
    compiled = device.compile(prepared.task.model, inputs)
    dense = device.time(compiled, inputs[0])
    accuracy = prepared.metric(prepared.task.model)
    found: dict[str, Points] = {name: [(1.0, accuracy)] for name in CLASSICS}
    models = classic_models(
        prepared.task.model, prepared.graph, prepared.space, prepared.statistics, folder / "l1", keeps
    )
    for classic in models:
        latency = device.time(device.compile(classic.model, inputs), inputs[0])
        found[classic.name.partition(",")[0]].append((dense.seconds / latency.seconds, prepared.metric(classic.model)))
    references = {r.name: r for r in measure_references(prepared.task, compiled, 256)}  # type: ignore[arg-type]  # it is a CompiledModel on x86-host
    objective = next(iter(evaluate_task(prepared.task, prepared.task.model)))
    sign = 1 if prepared.task.higher_is_better else -1
    ratio = references[OURS].latency.seconds / references[INT8].latency.seconds
    found[CLASSICS[2]].append((ratio, sign * references[INT8].metrics[objective]))
    return {name: {"points": points, "dense": accuracy} for name, points in found.items()}


def at_speed(points: Points, speed: float) -> float | None:
    return max((value for fast, value in points if fast >= speed), default=None)


def volume(found: dict) -> float:
    """Share of the box (dense's time, ``CAP`` lost) that the points dominate."""
    pairs = [(max(0.0, found["dense"] - value) / CAP, 1 / fast) for fast, value in found["points"]]
    return hypervolume(pairs, (1.0, 1.0))


def fastest_within(found: dict, loss: float) -> float:
    return max((fast for fast, value in found["points"] if value >= found["dense"] - loss - 1e-9), default=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=[*SPACES, "classics"], default=[*SPACES, "classics"])
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--measurements", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few trials, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.trials, options.measurements = 12, 2
    data = {} if options.quick else earlier("methods", "tasks")
    for task in options.task:
        found = data.setdefault(task, {})
        with tempfile.TemporaryDirectory() as temporary:
            for method in options.only:
                if method == "classics":
                    found |= classics(task, Path(temporary), (0.5,) if options.quick else KEEPS[1:])
                else:
                    found[method] = searched(task, method, options.trials, options.measurements, Path(temporary))
    rows = []
    for task, found in data.items():
        joint = volume(found["joint"]) if "joint" in found else None
        for name in sorted(found, key=lambda name: volume(found[name])):
            entry = found[name]
            cells = []
            for speed in SPEEDUPS:
                value = at_speed(entry["points"], speed)
                cells.append("-" if value is None else f"{value:.4f} ({100 * (value - entry['dense']):+.1f})")
            share = volume(entry)
            of_joint = f"{share / joint:.2f}" if joint else "-"
            rows.append([task, name, *cells, f"{fastest_within(entry, 0.01):.2f}x", f"{share:.3f}", of_joint])
    headings = [
        "task", "method", *(f">at {speed:.0f}x" for speed in SPEEDUPS), ">within 1 point", ">hypervolume", ">of joint's",
    ]  # fmt: skip
    notes = ["In brackets: change of the objective against dense, in points. A dash: no measured point is that fast."]
    publish("methods", headings, rows, {"tasks": data}, load_profile("x86-host"), notes, not options.quick, "tasks")


if __name__ == "__main__":
    main()
