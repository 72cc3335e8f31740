"""What a search costs: seconds and peak memory of the layer database and of 1,000 told trials, on models of the usual sizes.

    python benchmarks/cost.py [--model resnet18 ...] [--quick]

Weights are random, which costs as much as trained ones, and inputs resemble data. Each model is searched in a process of its own, with an empty
cache, so that it tunes its kernels too, measurements included. Two are torchvision's models and one is transformers' (`pip install
'autocomp[corpus]'`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import answered, earlier, publish
from zoo import ZOO
from zoo.inputs import settle, smooth_noise

from autocomp import api
from autocomp.config.settings import load_settings
from autocomp.hardware.profile import load_profile
from autocomp.tasks.task import Task

# the corpus, whose packages some of the models are from
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

TRIALS = 1000
COUNTED = ("layer database", "fitting the additive model", "measuring baselines", "solving for seeds", "searching")


class Case(NamedTuple):
    """A search: how its model is shown and made, calibration samples (a trial passes all of them through the model), what is told and measured.

    ``goal``: seconds of the whole search, or, where ``counted`` is set, of database, trials and measurements.
    """

    shown: str
    make: Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]
    samples: int
    trials: int = 300
    measurements: int = 24
    goal: float | None = None
    counted: bool = False


def of_zoo(name: str, **options: int) -> Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]:
    return lambda: ZOO[name](**options)


def of_torchvision(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    from corpus.packages import torchvision

    model = torchvision().models.get_model(name)
    return settle(model, smooth_noise(8, 3, 224, 224)), (smooth_noise(1, 3, 224, 224),)


def bert_small() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """The sizes of Turc et al. 2019 (arXiv:1908.08962): 4 layers, 512 wide, 8 heads; 128 tokens."""
    from corpus.packages import transformers

    library = transformers()
    config = library.BertConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048, num_labels=4
    )
    return library.BertForSequenceClassification(config), (torch.zeros(1, 128, dtype=torch.int64),)


CASES = {
    "resnet18": Case("ResNet-18 @32", of_zoo("resnet18", image=32), 256, TRIALS, 24, 150.0, counted=True),
    "mobilenet_v2": Case("MobileNetV2 @96", of_zoo("mobilenet_v2", image=96), 128, 300, 11, 200.0),
    "vit_tiny": Case("ViT-Ti/16 @224", of_zoo("vit_tiny"), 32, 100),
    "conformer_s": Case("Conformer-S, 4 s", of_zoo("conformer_s"), 16, 100, 9),
    "torchvision_resnet18": Case("torchvision ResNet-18 @224", partial(of_torchvision, "resnet18"), 64, goal=900.0),
    "torchvision_mobilenet_v2": Case(
        "torchvision MobileNetV2 @224", partial(of_torchvision, "mobilenet_v2"), 64, goal=900.0
    ),
    "bert_small": Case("transformers BERT-small, 128 tokens", bert_small, 64, goal=300.0),
}


def random_task(name: str) -> Task:
    """A model as a task whose objective is agreement with its own dense answers."""
    case = CASES[name]
    torch.set_num_threads(1)
    model, example = case.make()
    model.eval()

    def batch(count: int, seed: int) -> tuple[torch.Tensor, ...]:
        return tuple(_like(x, count, seed + k) for k, x in enumerate(example))

    held_out = batch(16, 1000)
    with torch.no_grad():
        truth = first(model(*held_out)).argmax(-1)

    def evaluate(candidate: torch.nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"agreement": float((first(candidate(*held_out)).argmax(-1) == truth).float().mean())}

    return Task(model, example, [batch(case.samples, 1)], evaluate, name=name)


def _like(example: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    if example.is_floating_point():
        return smooth_noise(count, *example.shape[1:], seed=seed)
    return torch.randint(0, 1000, (count, *example.shape[1:]), generator=torch.Generator().manual_seed(seed))


def first(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def search(name: str, trials: int, measurements: int, folder: Path) -> dict[str, Any]:
    """Search in this process; seconds by stage, and peak memory of it and its workers."""
    import resource

    task = random_task(name)
    given = {"task": name, "out": str(folder), "trials": trials, "measurements": measurements, "references": False}
    given["calibration_samples"] = CASES[name].samples
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
    case = CASES[name]
    seconds: dict[str, float] = found["seconds"]
    # Measurements lie within the searching stage.
    total = sum(value for stage, value in seconds.items() if stage != "measuring")
    counted = sum(seconds.get(stage, 0.0) for stage in COUNTED)
    trials = seconds.get("searching", 0.0) - seconds.get("measuring", 0.0)
    each = trials / max(1, found["told"] - 8)
    what = "of the three" if case.counted else "whole"
    return [
        case.shown, str(found["layers"]), f"{seconds.get('layer database', 0.0):.0f}", f"{found['told']}", f"{each:.3f}",
        f"{found['measured']}", f"{seconds.get('measuring', 0.0) + seconds.get('measuring baselines', 0.0):.0f}", f"{counted:.0f}",
        f"{total:.0f}", "-" if case.goal is None else f"<= {case.goal:.0f} {what}", f"{found['peak_bytes'] / 1e9:.2f} GB",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="a smoke test: few trials, nothing written")
    parser.add_argument("--inside", nargs=4, metavar=("MODEL", "TRIALS", "MEASURE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        name, trials, measurements, folder = options.inside
        print(json.dumps(search(name, int(trials), int(measurements), Path(folder))))
        return
    data = {} if options.quick else {name: found for name, found in earlier("cost", "models").items() if name in CASES}
    for name in options.model:
        case = CASES[name]
        data[name] = in_a_process(name, *((12, 1) if options.quick else (case.trials, case.measurements)))
        published(data, not options.quick)  # each as it is done: all of them take long


def published(data: dict[str, Any], write: bool) -> None:
    headings = [
        "model", ">layers", ">database (s)", ">told", ">a trial (s)", ">measured", ">measuring (s)",
        ">database, trials, measuring (s)", ">whole search (s)", ">goal (s)", ">peak memory",
    ]  # fmt: skip
    notes = ["Calibration samples: " + ", ".join(f"{case.shown} {case.samples}" for case in CASES.values()) + "."]
    rows = [row(name, found) for name, found in data.items()]
    publish("cost", headings, rows, {"models": data}, load_profile("x86-host"), notes, write, "models")


if __name__ == "__main__":
    main()
