"""What training regains, and by which way of it: the same compressed model trained for as many steps by each, three seeds.

    python benchmarks/recover.py [--task digits ...] [--part teaching masks precision] [--keep 0.125] [--steps 300] [--seeds 3] [--quick]

teaching: the student keeps a share of every group's channels, in 8 bits. It is trained by the labels alone, by the uncompressed model's answers
at one temperature, at one that falls from 4 to 1, at one that follows its entropy, by answers and every layer's outputs, by answers and
attention maps, by weights that short trainings found, and by 20/40/40 prune → quantise → distil.
masks: all channels in floats; 50, 70 and 90 % of single weights masked at once, gradually (cubic), in three stages, and moving (dynamic).
precision: twice the teaching student's channels in floats, trained in fp32 and in bfloat16.

Each training runs in a process of its own; memory is the most that it takes beyond what it began with. Seeds are of the order of the batches.
Metrics are of the test split; a difference within the standard error of the metric (below the table) says nothing. The rate is searched once for
each student, and is the same for all ways.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from common import earlier, publish
from prepared import TASKS, Prepared, prepare
from torch import nn

from autocomp.graph.graph import Layer
from autocomp.hardware.profile import load_profile
from autocomp.recovery.attention import Maps
from autocomp.recovery.lessons import Teaching
from autocomp.recovery.losses import shared_layers
from autocomp.recovery.masks import Masks
from autocomp.recovery.one import reading
from autocomp.recovery.rate import search_rate
from autocomp.recovery.recipe import Recipe, load_recipe
from autocomp.recovery.schedules import Span
from autocomp.recovery.train import train
from autocomp.recovery.weights import search_weights
from autocomp.tasks.task import evaluate_task

SPARSITIES = (0.5, 0.7, 0.9)
BUSY = 1.5  # processes at work on average, past which others were


class Way(NamedTuple):
    """A line of the table; one that does not train has the masks of its recipe's first stage alone."""

    recipe: Recipe
    trains: bool = True


def changed(recipe: Recipe, **phase: Any) -> Recipe:
    return recipe.model_copy(update={"stages": [recipe.stages[0].model_copy(update=phase)]})


def teaching_ways(attends: bool) -> dict[str, Way]:
    """Ways by what the table calls them."""
    base = load_recipe("default")
    trained = {
        "labels alone": changed(base, logits=0.0, labels=1.0),
        "logits, temperature 2": changed(base, labels=0.0, temperature="constant", hot=2.0),
        "logits, temperature 4 to 1": changed(base, labels=0.0),
        "logits, temperature by entropy": changed(base, labels=0.0, temperature="entropy"),
        "logits 4 to 1 and labels (default)": base,
        "logits, labels and layers": load_recipe("layers"),
        **({"logits, labels and attention maps": load_recipe("attention")} if attends else {}),
        "weights found by short trainings": load_recipe("weighed"),
        "prune, quantise, distil (20/40/40)": load_recipe("prune-quantise-distil"),
    }
    return {"none": Way(base, False), **{name: Way(recipe) for name, recipe in trained.items()}}


def mask_ways() -> dict[str, Way]:
    """Schedules of masks, by the share that is masked."""
    base, found = load_recipe("default"), {}
    for share in SPARSITIES:
        shares = {"coarse": (0.3, 0.3, "cubic"), "fine": (0.4, share, "cubic"), "settle": (0.3, share, "once")}
        stages = [
            base.stages[0].model_copy(update={"name": name, "share": part, "sparsity": masked, "masks": masks})
            for name, (part, masked, masks) in shares.items()
        ]
        found |= {
            f"{share:.0%}, not trained": Way(changed(base, sparsity=share), False),
            f"{share:.0%} at once": Way(changed(base, sparsity=share, masks="once")),
            f"{share:.0%} gradually": Way(changed(base, sparsity=share, masks="cubic")),
            f"{share:.0%} in three stages": Way(base.model_copy(update={"stages": stages})),
            f"{share:.0%} moving": Way(changed(base, sparsity=share, masks="dynamic")),
        }
    return found


def precision_ways() -> dict[str, Way]:
    base = load_recipe("default")
    kinds = {"fp32": "off", "bfloat16": "bf16"}  # torch computes fp16 on processors 40 times slower
    return {name: Way(base.model_copy(update={"autocast": kind})) for name, kind in kinds.items()}


def trained(
    prepared: Prepared,
    student: nn.Module,
    teaching: Teaching,
    shared: Any,
    rate: float,
    steps: int,
    way: Way,
    seed: int,
) -> tuple[float, float, float, float]:
    """Metric on the test split, seconds, GB and the share of weights that are not zero, after one training."""
    before, begun, model = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), student
    teaching.lessons.seed = seed
    if not way.trains and (share := way.recipe.stages[0].sparsity):
        Masks(model).set(share, True)
    if way.trains:
        found = search_weights(student, teaching, way.recipe, rate, shared, partial(reading, prepared.task))
        recipe = way.recipe.weighed(found.taken if found is not None else {})
        model = train(student, teaching, recipe, Span(steps=steps), rate, shared).model
    seconds = time.perf_counter() - begun
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    weights = [p for p in model.state_dict().values() if p.dim() > 1]
    left = sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)
    return prepared.metric(model, "test"), seconds, memory, left


def parts(prepared: Prepared, keep: float) -> Iterator[tuple[str, Any, dict[str, Way]]]:
    """Each part's name, its student's candidate, and the ways."""
    space = prepared.space
    with torch.no_grad(), Maps() as maps:
        prepared.task.model(*prepared.task.example_inputs)
    yield "teaching", space.normalise(space.uniform(keep, "w8a8")), teaching_ways(bool(maps.found))
    yield "masks", space.dense(), mask_ways()
    yield "precision", space.normalise(space.uniform(2 * keep, "fp32")), precision_ways()


def measured(prepared: Prepared, wanted: list[str], keep: float, steps: int, seeds: int) -> dict[str, Any]:
    """What each way of each part came to, by seed."""
    dense = evaluate_task(prepared.task, prepared.task.model, "test")
    name, found = next(iter(dense)), {}
    for part, candidate, ways in parts(prepared, keep):
        if part not in wanted:
            continue
        student = prepared.stitch(candidate)
        teaching = Teaching.of(prepared.task)
        teaching.lessons.draw(most=max(steps, 1))
        rates = search_rate(student, teaching, load_recipe("default"))
        shared = shared_layers(prepared.graph, partial(rows_of, prepared, candidate))
        results = {}
        for name_of_way, way in ways.items():
            work = partial(trained, prepared, student, teaching, shared, rates.taken, steps, way)
            rows = [_alone(work, seed) for seed in range(seeds if way.trains else 1)]
            results[name_of_way] = dict(
                zip(("metric", "seconds", "memory", "weights"), map(list, zip(*rows, strict=True)), strict=True)
            )
            print(
                f"{part}, {name_of_way}: {np.mean(results[name_of_way]['metric']):.4f} in {np.mean(results[name_of_way]['seconds']):.1f} s",
                flush=True,
            )
        found[part] = {
            "steps": steps, "rate": rates.taken, "keep": keep, "load": os.getloadavg()[0], "ways": results,
        }  # fmt: skip
    return {"dense": dense[name], "error": dense.errors().get(name), **found}


def rows_of(prepared: Prepared, candidate: Any, layer: Layer) -> torch.Tensor | None:
    """The output channels of a layer that a candidate keeps."""
    return prepared.database.rows(layer.name, candidate.widths[layer.out_group or ""])


def _alone(work: Any, seed: int) -> Any:
    """What ``work`` returns, in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(work(seed)))
    process.start()
    there.close()
    answer = here.recv()
    process.join()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--part", nargs="+", default=["teaching", "masks", "precision"])
    parser.add_argument("--keep", type=float, default=0.125)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--space", default="trained")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few steps, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds = 8, 1
    torch.set_num_threads(1)
    data = {} if options.quick else earlier("recover", "tasks")
    for task in options.task:
        data[task] = {
            **data.get(task, {}),
            **measured(prepare(task, options.space), options.part, options.keep, options.steps, options.seeds),
        }
        rows, notes = table(data)
        headings = ["task", "part", "way", ">metric, test", ">lost against dense", ">weights left", ">seconds", ">GB"]
        publish("recover", headings, rows, {"tasks": data}, load_profile("x86-host"), notes, not options.quick, "tasks")


def table(data: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    rows, notes = [], []
    for task, found in data.items():
        for part in ("teaching", "masks", "precision"):
            for way, values in found.get(part, {}).get("ways", {}).items():
                spread = f" ± {np.std(values['metric'], ddof=1):.4f}" if len(values["metric"]) > 1 else ""
                mean = float(np.mean(values["metric"]))
                rows.append(
                    [
                        task, part, way, f"{mean:.4f}{spread}", f"{found['dense'] - mean:+.4f}", f"{np.mean(values['weights']):.0%}",
                        f"{np.mean(values['seconds']):.1f}", f"{np.mean(values['memory']):.2f}",
                    ]
                )  # fmt: skip
            if part in found:
                about = found[part]
                busy = (
                    f" Beside other work (load {about['load']:.1f}): its seconds are no measure."
                    if about["load"] > BUSY
                    else ""
                )
                notes.append(
                    f"{task}, {part}: {about['steps']} steps at {about['rate']:.1e}, keep {about['keep']:g}.{busy}"
                )
        error = "" if found["error"] is None else f", standard error of one reading {found['error']:.4f}"
        notes.append(f"{task}: dense {found['dense']:.4f}{error}; ± is the spread over seeds.")
    return rows, notes


if __name__ == "__main__":
    main()
