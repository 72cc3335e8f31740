"""Tables saved from large models, on which a whole search takes seconds: what its layers' options cost, as a search first knows it and as it is.

    python benchmarks/saved_tables.py [--model resnet18 ...]

A search on these models takes minutes to hours, a comparison of samplers a hundred times as long. So what decides it is saved here once, in
``benchmarks/tables/NAME.npz``: for every layer and option its predicted seconds (all kernels that the cache has measured on this machine, the
latency model for the others) and two errors, both the layer database's fitted to the divergences of random candidates that were really stitched
(`accuracy.additive`). What is *known* is fitted to as many as a search fits it to before it asks its solver; the *truth* to others, and twice as
many. A sampler that is told the truth of what it tries has to find out where what is known is wrong.

The truth is additive: layers that make each other worse are on the built-in tasks only, where candidates are stitched. Weights are random, so
the errors are scaled: half of all channels costs 1 nat.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cost import random_task
from prepared import draw

from autocomp.devices.open import open_device
from autocomp.hardware.profile import load_profile
from autocomp.progress import Progress
from autocomp.records.candidate import Candidate, Method
from autocomp.run.explore import FITTED
from autocomp.study.costs import Costs
from autocomp.study.parameters import Choices
from autocomp.study.solver import Factor, Problem, make_problem

TABLES = ("resnet18", "mobilenet_v2", "vit_tiny", "conformer_s")
FOLDER = Path(__file__).parent / "tables"
SAMPLES = 32  # calibration samples at most


class Saved(NamedTuple):
    """A model's search problem twice, over the same levels: as its tables say (``known``), and as it is (``truth``)."""

    known: Problem
    truth: Problem

    @property
    def choices(self) -> Choices:
        problem = self.truth
        widths = dict(zip(problem.groups, problem.widths, strict=True))
        return Choices(widths, {factor.layer: factor.methods for factor in problem.factors})

    def uniform(self, keep: float) -> Candidate:
        """The width nearest to ``keep`` in every group, all else as it was."""
        widths, methods = self.choices
        near = {name: min((w for w in has if w), key=lambda w: abs(w - keep * has[0])) for name, has in widths.items()}
        return Candidate(near, {name: has[0] for name, has in methods.items()})


def load(name: str) -> Saved:
    with np.load(FOLDER / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        widths = {group: tuple(options) for group, options in meta["widths"].items()}
        factors: dict[str, list[Factor]] = {"known": [], "truth": []}
        for k, layer in enumerate(meta["layers"]):
            sides = {side: tuple(layer[side]) for side in ("widths_in", "widths_out")}
            methods = tuple(map(Method.parse, layer["methods"]))
            tables = {kind: file[f"{k}.{kind}"].astype(np.float64) for kind in ("known", "truth", "seconds", "bytes")}
            for kind, found in factors.items():
                found.append(
                    Factor(layer["layer"], layer["in_group"], layer["out_group"], **sides, methods=methods,
                           error=tables[kind], seconds=tables["seconds"], bytes=tables["bytes"])
                )  # fmt: skip
    return Saved(*(make_problem(factors[kind], widths, meta["seconds"], meta["bytes"]) for kind in ("known", "truth")))


def save(name: str, known: Problem, truth: Problem) -> Path:
    """Write both problems, errors scaled so that half of all channels costs 1 nat by the truth, seconds so that dense takes 1."""
    saved = Saved(known, truth)
    dense, half = truth.cost(saved.uniform(1.0)), truth.cost(saved.uniform(0.5))
    meta = {
        "widths": saved.choices.widths,
        "layers": [
            {
                "layer": factor.layer, "in_group": factor.in_group, "out_group": factor.out_group, "widths_in": factor.widths_in,
                "widths_out": factor.widths_out, "methods": [str(method) for method in factor.methods],
            }
            for factor in truth.factors
        ],
        "seconds": 1.0 - (dense.seconds - truth.fixed_seconds) / dense.seconds,
        "bytes": truth.fixed_bytes,
    }  # fmt: skip
    arrays: dict[str, np.ndarray] = {}
    for k, (before, after) in enumerate(zip(known.factors, truth.factors, strict=True)):
        arrays |= {
            f"{k}.known": (before.error / half.error).astype(np.float32),
            f"{k}.truth": (after.error / half.error).astype(np.float32),
            f"{k}.seconds": (after.seconds / dense.seconds).astype(np.float32),
            f"{k}.bytes": after.bytes.astype(np.float64),
        }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, meta=json.dumps(meta), **arrays)
    return path


def made(name: str) -> Path:
    """Build a model's layer database, stitch and score random candidates, and save what comes of it."""
    from autocomp.accuracy.proxy import stitch_and_score
    from autocomp.run.prepare_task import compressed_layers, prepare_task
    from autocomp.space.file import load_space

    profile = load_profile("x86-host")
    ready = prepare_task(random_task(name), load_space("default"), [profile], SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        _, database = compressed_layers(ready, Path(folder), SAMPLES, 0, Progress())
        device = open_device(profile)
        device.model.fit_kernels(device.store.records())
        costs = Costs(ready.graph, ready.space, database.tables(), {profile.name: device}, settled=True)

        def fitted(count: int, seed: int) -> Problem:
            drawn = draw(ready.space, count, seed)
            costs.observe(drawn, [stitch_and_score(ready.task.model, ready.graph, database, one)[1] for one in drawn])
            costs.fit([])
            return costs.problem()

        return save(name, fitted(FITTED, 0), fitted(2 * FITTED, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(TABLES), default=list(TABLES))
    for name in parser.parse_args().model:
        path = made(name)
        print(f"{path}: {len(load(name).choices.options)} parameters, {path.stat().st_size >> 10} KiB", flush=True)


if __name__ == "__main__":
    main()
