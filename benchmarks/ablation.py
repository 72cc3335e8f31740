"""What each step of compression is worth: candidates stitched with one step left out, or in another order.

    python benchmarks/ablation.py [--task digits ...] [--random 12] [--quick]

Candidates: pruning at 75 and 50 %, half rank, 8 bits, 4-bit weights, their combinations, and random draws. Every variant stitches the same
candidates from a layer database of its own. Shown are the mean KL from the dense model over candidates that the step concerns, over that of the
full recipe (1: no difference), and the mean objective. Nothing is retrained.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from common import earlier, publish
from prepared import TASKS, Prepared, draw, prepare

from autocomp.accuracy.proxy import kl
from autocomp.compress.rounding import Feedback
from autocomp.database import entry as entries
from autocomp.database.database import LayerDatabase
from autocomp.database.store import Inputs, store
from autocomp.hardware.profile import load_profile
from autocomp.records.candidate import Candidate, Method

SPACE = {"keep": [1.0, 0.75, 0.5, 0.25], "ranks": [0.5, 0.25], "precisions": ["fp32", "w8a8", "w4"]}


@contextmanager
def no_update() -> Iterator[None]:
    """Weights that stay are left as they are when inputs go."""

    def cut(weight: torch.Tensor, covariance: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return weight[:, columns]

    with patch.object(entries, "least_squares", cut):
        yield


@contextmanager
def no_gptq() -> Iterator[None]:
    """Weights are rounded to nearest: no column makes up for another."""

    def settle(self: Feedback, position: int, values: torch.Tensor) -> None:
        self.open[position] = values

    with patch.object(Feedback, "settle", settle):
        yield


@contextmanager
def no_whitening() -> Iterator[None]:
    """Low rank by the plain singular values of the weights: inputs and outputs count alike."""
    whitened = entries.Whitened

    def plain(weight: torch.Tensor, covariance: torch.Tensor, fisher: torch.Tensor, *rest: Any) -> Any:
        scale = covariance.diagonal().mean()
        return whitened(
            weight, scale * torch.eye(len(covariance), dtype=covariance.dtype), torch.ones_like(fisher), *rest
        )

    with patch.object(entries, "Whitened", plain):
        yield


@contextmanager
def quantised_first() -> Iterator[None]:
    """Weights are rounded while all inputs are there, with the Hessian of these; then inputs go. Rounded weights take no update."""
    original = entries._Compression.entry

    def entry(self: Any, method: Method) -> Any:
        if not self.pruned or method.precision == "fp32" or method.ranks or self.layer.conv_groups > 1:
            return original(self, method)
        kept, before, columns, channels = self.pruned, self.small, self.columns, self.channels
        everything = torch.arange(self.weight.shape[1])
        self.pruned, self.columns, self.channels = False, everything, torch.arange(self.layer.in_channels)
        forget(self)
        inputs: Inputs = self.inputs
        rounded = store(self.weight, method.precision, inputs, self.fisher, self.layer.kind == "linear").effective
        self.pruned, self.columns, self.channels = kept, columns, channels
        self.small = rounded[:, columns]
        forget(self)
        try:
            return original(self, method)
        finally:
            self.small = before
            forget(self)

    def forget(self: Any) -> None:
        """What was worked out for other columns or weights."""
        for name in ("inputs", "_blocks", "_pruning_alone"):
            self.__dict__.pop(name, None)

    with patch.object(entries._Compression, "entry", entry):
        yield


VARIANTS = {
    "least-squares update off": (no_update, "pruned"),
    "GPTQ rounding off": (no_gptq, "quantised"),
    "whitening off": (no_whitening, "factorised"),
    "quantise before pruning": (quantised_first, "pruned and quantised"),
}
RESET = "BatchNorm re-estimation off"


def concerns(candidate: Candidate, space: Any, what: str) -> bool:
    """Whether a candidate does what a step is about."""
    pruned = any(width < space.widths[group][0] for group, width in candidate.widths.items())
    quantised = any(method.precision != "fp32" for method in candidate.methods.values())
    factorised = any(method.ranks for method in candidate.methods.values())
    return {
        "pruned": pruned,
        "quantised": quantised,
        "factorised": factorised,
        "pruned and quantised": pruned and quantised,
    }[what]


def candidates_of(prepared: Prepared, random: int) -> list[Candidate]:
    space = prepared.space
    found = [space.uniform(keep, precision) for keep in (1.0, 0.75, 0.5) for precision in ("fp32", "w8a8", "w4")]
    factorised = {name: next((m for m in options if m.ranks), options[0]) for name, options in space.methods.items()}
    found += [space.normalise(Candidate(dict(space.uniform(keep).widths), factorised)) for keep in (1.0, 0.75)]
    unique = {candidate.id: candidate for candidate in [*found, *draw(space, random, seed=3)]}
    unique.pop(space.dense().id, None)
    return list(unique.values())


def scored(prepared: Prepared, candidates: list[Candidate], folder: Path, reset: bool = True) -> dict[str, list[float]]:
    """KL and objective of each candidate, stitched from a database built now."""
    database = LayerDatabase(folder, prepared.task.model, prepared.graph, prepared.space, prepared.statistics)
    own = replace(prepared, database=database)
    divergences, values = [], []
    for candidate in candidates:
        model = own.stitch(candidate, reset)
        divergences.append(kl(model, prepared.statistics))
        values.append(own.metric(model))
    return {"kl": divergences, "metric": values}


def ablation(name: str, random: int, folder: Path) -> dict:
    space = folder / "space.yaml"
    space.write_text(yaml.safe_dump({"format_version": 1, "rules": [{"layers": "*", **SPACE}]}))
    prepared = prepare(name, str(space), folder=folder / "full")
    candidates = candidates_of(prepared, random)
    full = scored(prepared, candidates, folder / "full")
    result: dict[str, Any] = {
        "candidates": len(candidates),
        "dense": prepared.metric(prepared.task.model),
        "variants": {},
    }

    def compare(variant: str, what: str, other: dict[str, list[float]]) -> None:
        chosen = [k for k, candidate in enumerate(candidates) if concerns(candidate, prepared.space, what)]
        ratios = [other["kl"][k] / max(full["kl"][k], 1e-9) for k in chosen]
        result["variants"][variant] = {
            "concerns": what, "candidates": len(chosen), "median_ratio": float(np.median(ratios)),
            "kl": [float(np.mean([side["kl"][k] for k in chosen])) for side in (full, other)],
            "metric": [float(np.mean([side["metric"][k] for k in chosen])) for side in (full, other)],
        }  # fmt: skip

    for variant, (change, what) in VARIANTS.items():
        with change():
            compare(variant, what, scored(prepared, candidates, folder / variant.replace(" ", "-")))
    if any(isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d) for module in prepared.task.model.modules()):
        compare(RESET, "pruned", scored(prepared, candidates, folder / "full", reset=False))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--random", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="a smoke test: one random candidate, nothing written")
    options = parser.parse_args()
    data = {} if options.quick else earlier("ablation", "tasks")
    for name in options.task:
        with tempfile.TemporaryDirectory() as temporary:
            data[name] = ablation(name, 1 if options.quick else options.random, Path(temporary))
    rows = []
    for name, found in data.items():
        for variant, part in found["variants"].items():
            (kl_full, kl_other), (metric_full, metric_other) = part["kl"], part["metric"]
            rows.append(
                [
                    name, variant, f"{part['candidates']} {part['concerns']}", f"{kl_full:.4f}", f"{kl_other:.4f}",
                    f"{part['median_ratio']:.2f}", f"{metric_full:.4f}", f"{metric_other:.4f}",
                ]
            )  # fmt: skip
    headings = [
        "task",
        "variant",
        "candidates",
        ">KL, full",
        ">KL, variant",
        ">median ratio",
        ">metric, full",
        ">metric, variant",
    ]
    dense = ", ".join(f"{name} {found['dense']:.4f}" for name, found in data.items())
    notes = [f"Dense: {dense}. Means over the candidates concerned."]
    publish("ablation", headings, rows, {"tasks": data}, load_profile("x86-host"), notes, not options.quick, "tasks")


if __name__ == "__main__":
    main()
