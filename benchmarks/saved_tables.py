"""Tables saved from large models, on which a whole search takes seconds: what its layers' options cost, as a search first knows it and as it is.

    python benchmarks/saved_tables.py [--model resnet18 ...]

A search on these models takes minutes to hours, a comparison of samplers a hundred times as long. So what decides it is saved here once, in
``benchmarks/tables/NAME.npz``: for every layer and option its predicted seconds (all kernels that the cache has measured on this machine, the
latency model for the others), the layer database's error, and the divergences of random candidates that were really stitched, as many as a
search fits that error to before it asks its solver. The *truth* is the same error fitted (`accuracy.additive`) to other candidates, and twice as
many: what a search thinks at first is wrong as far as two such fits differ, and it learns from what it is told.

The truth is additive: layers that make each other worse are on the built-in tasks only, where candidates are stitched. Weights are random, so
the errors are scaled: half of all channels costs 1 nat.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cost import random_task
from prepared import costs_of, draw, prepare

from autocomp.accuracy.additive import AdditiveModel
from autocomp.database.database import LayerTable
from autocomp.records.candidate import Candidate, Method
from autocomp.run.explore import FITTED
from autocomp.study.parameters import Choices
from autocomp.study.solver import Factor, Problem, make_problem

TABLES = ("resnet18", "mobilenet_v2", "vit_tiny", "conformer_s")
FOLDER = Path(__file__).parent / "tables"
SAMPLES = 32  # calibration samples at most


class Saved(NamedTuple):
    """A model's layer tables and what is known of random candidates, as a search has them, and its search problem as it is (``truth``)."""

    tables: list[LayerTable]
    drawn: list[Candidate]
    divergences: list[float]
    truth: Problem

    @property
    def choices(self) -> Choices:
        return choices_of(self.truth)

    def problem(self, model: AdditiveModel) -> Problem:
        """The truth with the errors of a model fitted to these tables."""
        factors = [
            replace(factor, error=table.error)
            for factor, table in zip(self.truth.factors, model.fitted_tables(), strict=True)
        ]
        return make_problem(factors, self.choices.widths, self.truth.fixed_seconds, self.truth.fixed_bytes)


def choices_of(problem: Problem) -> Choices:
    widths = dict(zip(problem.groups, problem.widths, strict=True))
    return Choices(widths, {factor.layer: factor.methods for factor in problem.factors})


def uniform(choices: Choices, keep: float) -> Candidate:
    """The width nearest to ``keep`` in every group, all else as it was."""
    widths = {
        name: min((w for w in options if w), key=lambda w: abs(w - keep * options[0]))
        for name, options in choices.widths.items()
    }
    return Candidate(widths, {name: options[0] for name, options in choices.methods.items()})


def load(name: str) -> Saved:
    with np.load(FOLDER / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        arrays = {key: file[key].astype(np.float64) for key in file.files if key != "meta"}
    tables, factors = [], []
    for k, layer in enumerate(meta["layers"]):
        said = {side: tuple(layer[side]) for side in ("widths_in", "widths_out")}
        said |= {"methods": tuple(map(Method.parse, layer["methods"])), "bytes": arrays[f"{k}.bytes"]}
        said |= {name: layer[name] for name in ("layer", "in_group", "out_group")}
        tables.append(LayerTable(**said, error=arrays[f"{k}.error"]))
        factors.append(Factor(**said, error=arrays[f"{k}.truth"], seconds=arrays[f"{k}.seconds"]))
    widths = {group: tuple(options) for group, options in meta["widths"].items()}
    truth = make_problem(factors, widths, meta["seconds"], meta["bytes"])
    drawn = [choices_of(truth).candidate(row.astype(int)) for row in arrays["drawn"]]
    return Saved(tables, drawn, arrays["divergences"].tolist(), truth)


def save(
    name: str, tables: Sequence[LayerTable], drawn: Sequence[Candidate], read: Sequence[float], truth: Problem
) -> Path:
    """Write all of it, errors scaled so that half of all channels costs 1 nat by the truth, seconds so that dense takes 1."""
    choices = choices_of(truth)
    dense, half = (truth.cost(uniform(choices, keep)) for keep in (1.0, 0.5))
    meta = {
        "widths": choices.widths,
        "layers": [
            {
                "layer": factor.layer, "in_group": factor.in_group, "out_group": factor.out_group, "widths_in": factor.widths_in,
                "widths_out": factor.widths_out, "methods": [str(method) for method in factor.methods],
            }
            for factor in truth.factors
        ],
        "seconds": truth.fixed_seconds / dense.seconds,
        "bytes": truth.fixed_bytes,
    }  # fmt: skip
    arrays: dict[str, Any] = {
        "drawn": np.array([choices.levels(candidate) for candidate in drawn], dtype=np.int16),
        "divergences": np.array(read) / half.error,
    }
    for k, (table, factor) in enumerate(zip(tables, truth.factors, strict=True)):
        arrays |= {
            f"{k}.error": (table.error / half.error).astype(np.float32),
            f"{k}.truth": (factor.error / half.error).astype(np.float32),
            f"{k}.seconds": (factor.seconds / dense.seconds).astype(np.float32),
            f"{k}.bytes": factor.bytes.astype(np.float32),
        }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, meta=json.dumps(meta), **arrays)
    return path


def made(name: str) -> Path:
    """Build a model's layer database, stitch and score random candidates, and save what comes of it."""
    ready = prepare(random_task(name), samples=SAMPLES)
    costs = costs_of(ready)

    def read(drawn: Sequence[Candidate]) -> list[float]:
        return [ready.score(candidate)[1] for candidate in drawn]

    others = draw(ready.space, 2 * FITTED, seed=1)
    costs.observe(others, read(others))
    costs.fit([])
    drawn = draw(ready.space, FITTED)
    return save(name, ready.database.tables(), drawn, read(drawn), costs.problem())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(TABLES), default=list(TABLES))
    for name in parser.parse_args().model:
        path = made(name)
        print(f"{path}: {len(load(name).choices.options)} parameters, {path.stat().st_size >> 10} KiB", flush=True)


if __name__ == "__main__":
    main()
