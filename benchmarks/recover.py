"""What training regains, and by which way of teaching: the same compressed model trained for as many steps by each, three seeds.

    python benchmarks/recover.py [--task digits ...] [--keep 0.125] [--steps 300] [--seeds 3] [--space trained] [--quick]

The student keeps a share of every group's channels, in 8 bits. Ways: none (as compressed), labels alone, the uncompressed model's answers at
one temperature, at one that falls from 4 to 1, at one that follows its entropy, answers and every layer's outputs, 20/40/40 prune → quantise →
distil, and the cosine one in bfloat16. Seeds are of the order of the batches. Metrics are of the test split; a difference within the standard
error of the metric (below the table) says nothing. The rate is searched once for a task and is the same for all ways.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from common import earlier, publish
from prepared import TASKS, Prepared, prepare

from autocomp.hardware.profile import load_profile
from autocomp.recovery.lessons import Teaching
from autocomp.recovery.rate import search_rate
from autocomp.recovery.recipe import Recipe, load_recipe
from autocomp.recovery.schedules import Span
from autocomp.recovery.train import train
from autocomp.tasks.task import evaluate_task


def ways() -> dict[str, Recipe]:
    """Recipes by what the table calls them."""
    base = load_recipe("default")

    def changed(recipe: Recipe = base, **phase: Any) -> Recipe:
        return recipe.model_copy(update={"stages": [recipe.stages[0].model_copy(update=phase)]})

    return {
        "labels alone": changed(logits=0.0, labels=1.0),
        "logits, temperature 2": changed(labels=0.0, temperature="constant", hot=2.0),
        "logits, temperature 4 to 1": changed(labels=0.0),
        "logits, temperature by entropy": changed(labels=0.0, temperature="entropy"),
        "logits 4 to 1 and labels (default)": base,
        "logits, labels and layers": load_recipe("layers"),
        "prune, quantise, distil (20/40/40)": load_recipe("prune-quantise-distil"),
        "default, float layers in bfloat16": base.model_copy(update={"autocast": "bf16"}),
    }


def shared(prepared: Prepared, candidate: Any) -> dict[str, torch.Tensor | None]:
    """The layers that student and teacher share, by the channels that were kept."""
    return {
        name: None if layer.out_group is None else prepared.database.rows(name, candidate.widths[layer.out_group])
        for name, layer in list(prepared.graph.layers.items())[:-1]
    }


def measured(prepared: Prepared, keep: float, steps: int, seeds: int) -> dict[str, Any]:
    """Metric on the test split and seconds of each way and seed."""
    candidate = prepared.space.normalise(prepared.space.uniform(keep, "w8a8"))
    student = prepared.stitch(candidate)
    teaching = Teaching.of(prepared.task)
    teaching.lessons.draw(most=max(steps, 1))
    rates = search_rate(student, teaching, load_recipe("default"))
    dense = evaluate_task(prepared.task, prepared.task.model, "test")
    name = next(iter(dense))
    found: dict[str, Any] = {"none": {"metric": [prepared.metric(student, "test")], "seconds": [0.0]}}
    for way, recipe in ways().items():
        values, seconds = [], []
        for seed in range(seeds):
            teaching.lessons.seed = seed
            begun = time.perf_counter()
            layers = shared(prepared, candidate) if any(stage.features for stage in recipe.stages) else None
            done = train(student, teaching, recipe, Span(steps=steps), rates.taken, layers)
            seconds.append(time.perf_counter() - begun)
            values.append(prepared.metric(done.model, "test"))
        found[way] = {"metric": values, "seconds": seconds}
        print(f"{way}: {np.mean(values):.4f} in {np.mean(seconds):.1f} s", flush=True)
    return {
        "keep": keep, "steps": steps, "rate": rates.taken, "dense": dense[name], "error": dense.errors().get(name),
        "parameters": sum(tensor.numel() for tensor in student.state_dict().values()), "ways": found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--keep", type=float, default=0.125)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--space", default="trained")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few steps, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds = 8, 1
    data = {} if options.quick else earlier("recover", "tasks")
    for task in options.task:
        data[task] = measured(prepare(task, options.space), options.keep, options.steps, options.seeds)
    rows, notes = [], []
    for task, found in data.items():
        for way, values in found["ways"].items():
            spread = f" ± {np.std(values['metric']):.4f}" if len(values["metric"]) > 1 else ""
            lost = found["dense"] - np.mean(values["metric"])
            rows.append(
                [
                    task,
                    way,
                    f"{np.mean(values['metric']):.4f}{spread}",
                    f"{lost:+.4f}",
                    f"{np.mean(values['seconds']):.0f}",
                ]
            )
        error = "" if found["error"] is None else f", standard error of one reading {found['error']:.4f}"
        student = f"{found['keep']:g} of the channels in 8 bits, {found['steps']} steps at {found['rate']:.1e}"
        notes.append(f"{task}: {student}; dense {found['dense']:.4f}{error}.")
    headings = ["task", "taught by", ">metric, test", ">lost against dense", ">seconds"]
    publish("recover", headings, rows, {"tasks": data}, load_profile("x86-host"), notes, not options.quick, "tasks")


if __name__ == "__main__":
    main()
