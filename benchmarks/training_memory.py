"""How much memory training takes where teacher and student lie in it together: ViT-Ti/16 at 224 must fit in 3 GB.

    python benchmarks/training_memory.py [--recipe default attention layers] [--batch 64] [--steps 2] [--quick]

Weights are random, which costs as much as trained ones; every layer of the student is in 8 bits. Each recipe trains in a process of its own,
whose peak it is: the layer database while it is made, teacher, student, optimiser and activations.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import answered, earlier, publish
from torch.nn import functional
from zoo import ZOO
from zoo.inputs import smooth_noise

from autocomp.database.stitch import stitch
from autocomp.hardware.profile import load_profile
from autocomp.progress import Progress
from autocomp.recovery.lessons import Teaching
from autocomp.recovery.losses import shared_layers
from autocomp.recovery.recipe import load_recipe
from autocomp.recovery.schedules import Span
from autocomp.recovery.train import train
from autocomp.run.prepare_task import compressed_layers, prepare_task
from autocomp.space.file import Rule, SpaceFile
from autocomp.tasks.task import Task

LIMIT = 3.0  # GB
EIGHT_BITS = SpaceFile(format_version=1, rules=[Rule(layers="*", precisions=["w8a8"])])


def measured(recipe: str, batch: int, steps: int) -> dict[str, float]:
    """Train a few steps: the peak of memory before and after (GB)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, example = ZOO["vit_tiny"]()
    pictures = smooth_noise(batch, *example[0].shape[1:])
    task = Task(
        model.eval(), example, [(pictures[:32],)], lambda _: {"agreement": 0.5}, name="vit_tiny",
        train=[((pictures,), torch.arange(batch))], loss=functional.cross_entropy,
    )  # fmt: skip
    ready = prepare_task(task, EIGHT_BITS, [load_profile("x86-host")], 32)
    with tempfile.TemporaryDirectory() as folder:
        _, database = compressed_layers(ready, Path(folder), 32, 0, Progress())
        student = stitch(ready.task.model, ready.graph, database, ready.space.uniform(1.0, "w8a8"))
    del database
    teaching = Teaching.of(ready.task, batch)
    before = peak()
    shared = shared_layers(ready.graph, lambda _: None)
    done = train(student, teaching, load_recipe(recipe), Span(steps=steps), 1e-4, shared)
    assert not done.failure, done.failure
    return {"before": before, "peak": peak()}


def peak() -> float:
    """GB of memory that this process has taken at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["default", "attention", "layers"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is written")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measured(options.recipe[0], options.batch, options.steps)))
        return
    if options.quick:
        options.recipe, options.batch = ["default"], 8
    found: dict[str, Any] = {} if options.quick else earlier("training_memory", "recipes")
    for recipe in options.recipe:
        sizes = ("--batch", str(options.batch), "--steps", str(options.steps))
        found[recipe] = answered(__file__, "--inside", "--recipe", recipe, *sizes)
    rows = [
        [name, f"{one['before']:.2f} GB", f"{one['peak']:.2f} GB", f"<= {LIMIT:g} GB"] for name, one in found.items()
    ]
    notes = [f"ViT-Ti/16 at 224, every layer in 8 bits, {options.batch} pictures a step, one thread."]
    headings = ["recipe", ">peak before training", ">peak", ">goal"]
    publish(
        "training_memory",
        headings,
        rows,
        {"recipes": found},
        load_profile("x86-host"),
        notes,
        not options.quick,
        "recipes",
    )


if __name__ == "__main__":
    main()
