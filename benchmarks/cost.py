"""What a search costs: seconds and peak memory of the layer database and of 1,000 told trials, on models of the usual sizes.

    python benchmarks/cost.py [--model resnet18 ...] [--quick]

Weights are random, which costs as much as trained ones, and inputs resemble data. Each model is searched in a process of its own, with an empty
cache, measurements included. Where a thousand trials would take hours on this machine fewer are told, and the seconds of a trial say the rest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import answered, earlier, publish
from zoo import ZOO
from zoo.inputs import smooth_noise

from autocomp import api
from autocomp.config.settings import load_settings
from autocomp.hardware.profile import load_profile
from autocomp.tasks.task import Task

TRIALS = 1000
# Name in the zoo and options; shown as; calibration samples; trials told. A trial passes all samples through the model.
MODELS: dict[str, tuple[str, dict[str, int], str, int, int]] = {
    "resnet18": ("resnet18", {"image": 32}, "ResNet-18 @32", 256, TRIALS),
    "mobilenet_v2": ("mobilenet_v2", {"image": 96}, "MobileNetV2 @96", 128, 300),
    "vit_tiny": ("vit_tiny", {}, "ViT-Ti/16 @224", 32, 100),
    "conformer_s": ("conformer_s", {}, "Conformer-S, 4 s", 16, 100),
}
GOAL = 300.0  # seconds, ResNet-18 at 32x32: database, 1,000 trials and measurements
COUNTED = ("layer database", "fitting the additive model", "measuring baselines", "solving for seeds", "searching")


def random_task(name: str) -> Task:
    """The zoo's model as a task whose objective is agreement with its own dense answers."""
    zoo, options, _, samples, _ = MODELS[name]
    torch.set_num_threads(1)
    model, example = ZOO[zoo](**options)
    model.eval()
    shapes = [tuple(x.shape[1:]) for x in example]

    def batch(count: int, seed: int) -> tuple[torch.Tensor, ...]:
        return tuple(smooth_noise(count, *shape, seed=seed + k) for k, shape in enumerate(shapes))

    held_out = batch(16, 1000)
    with torch.no_grad():
        truth = first(model(*held_out)).argmax(-1)

    def evaluate(candidate: torch.nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"agreement": float((first(candidate(*held_out)).argmax(-1) == truth).float().mean())}

    return Task(model, example, [batch(samples, 1)], evaluate, name=name)


def first(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def search(name: str, trials: int, measurements: int, folder: Path) -> dict[str, Any]:
    """Search in this process; seconds by stage, and peak memory of it and its workers."""
    import resource

    task = random_task(name)
    given = {"task": name, "out": str(folder), "trials": trials, "measurements": measurements, "references": False}
    given["calibration_samples"] = MODELS[name][3]
    result = api.search(task=task, settings=load_settings(None, given))
    summary = result.run.summary
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "seconds": dict(summary.seconds), "told": summary.told, "measured": summary.measured, "failed": summary.failed,
        "peak_bytes": summary.peak_bytes, "peak_of_a_worker": children, "layers": len(result.run.layers),
    }  # fmt: skip


def in_a_process(name: str, trials: int, measurements: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        arguments = (name, str(trials), str(measurements), f"{temporary}/run")
        found: dict[str, Any] = answered(__file__, "--inside", *arguments, AUTOCOMP_CACHE=f"{temporary}/cache")
        return found


def row(name: str, found: dict[str, Any]) -> list[str]:
    seconds: dict[str, float] = found["seconds"]
    # Measurements lie within the searching stage.
    total = sum(value for stage, value in seconds.items() if stage != "measuring")
    counted = sum(seconds.get(stage, 0.0) for stage in COUNTED)
    trials = seconds.get("searching", 0.0) - seconds.get("measuring", 0.0)
    each = trials / max(1, found["told"] - 8)
    return [
        MODELS[name][2], str(found["layers"]), f"{seconds.get('layer database', 0.0):.0f}", f"{found['told']}", f"{each:.3f}",
        f"{each * TRIALS:.0f}", f"{found['measured']}", f"{seconds.get('measuring', 0.0) + seconds.get('measuring baselines', 0.0):.0f}",
        f"{counted:.0f}", f"<= {GOAL:.0f}" if name == "resnet18" else "-", f"{total:.0f}", f"{found['peak_bytes'] / 1e9:.2f} GB",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--measurements", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few trials, nothing written")
    parser.add_argument("--inside", nargs=4, metavar=("MODEL", "TRIALS", "MEASURE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        name, trials, measurements, folder = options.inside
        print(json.dumps(search(name, int(trials), int(measurements), Path(folder))))
        return
    data = {} if options.quick else earlier("cost", "models")
    for name in options.model:
        trials, measurements = (12, 1) if options.quick else (MODELS[name][4], options.measurements)
        data[name] = in_a_process(name, trials, measurements)
    headings = [
        "model", ">layers", ">database (s)", ">told", ">a trial (s)", ">1,000 trials (s)", ">measured", ">measuring (s)",
        ">database, told trials, measuring (s)", ">goal (s)", ">whole search (s)", ">peak memory",
    ]  # fmt: skip
    notes = ["Calibration samples: " + ", ".join(f"{m[2]} {m[3]}" for m in MODELS.values()) + "."]
    rows = [row(name, found) for name, found in data.items()]
    publish("cost", headings, rows, {"models": data}, load_profile("x86-host"), notes, not options.quick, "models")


if __name__ == "__main__":
    main()
