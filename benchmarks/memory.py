"""How much memory calibration and the layer database take on a large model: they must fit in 6 GB.

    python benchmarks/memory.py [--model vit_base] [--samples 64] [--depth 12] [--blocks 1]

Weights are random, which costs as much as trained ones. All layers are calibrated; of the database, the layers of the last ``--blocks``
blocks are built at every width, as memory does not grow with the number of layers. ``--depth`` takes fewer blocks than the model has, and writes
nothing. Memory is the peak of the process and of its largest worker, added up.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from typing import Any

import torch
from common import earlier, publish
from zoo.inputs import settle, smooth_noise
from zoo.sequence import _Conformer
from zoo.vision import _ViT

from autocomp.database.calibrate import collect_from
from autocomp.database.database import File, LayerDatabase
from autocomp.graph.analyse import analyse
from autocomp.hardware.profile import load_profile
from autocomp.space.build import build_space

LIMIT = 6.0  # GB


def vit_base(samples: int, depth: int | None) -> tuple[torch.nn.Module, torch.Tensor]:
    """ViT-B/16 at 224: 86.6 M parameters (Dosovitskiy et al. 2021, arXiv:2010.11929)."""
    return settle(_ViT(224, 16, 768, 12, depth or 12, False)), smooth_noise(samples, 3, 224, 224)


def conformer_medium(samples: int, depth: int | None) -> tuple[torch.nn.Module, torch.Tensor]:
    """Conformer-M's encoder: 16 blocks, d 256, 4 heads (Gulati et al. 2020, arXiv:2005.08100, table 1), on 4 s of frames."""
    return settle(_Conformer(80, 400, 256, 4, depth or 16, 31, 128), smooth_noise(2, 400, 80)), smooth_noise(
        samples, 400, 80
    )


def peak() -> float:
    """GB of memory that this process and its workers, each by itself, have taken at most: their sum."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own + children) / 2**20


def measure(name: str, samples: int, depth: int | None, blocks: int) -> dict[str, Any]:
    """Read, calibrate, and build the last blocks' part of the database: seconds, and the peak of memory after each."""
    model, data = globals()[name](samples, depth)
    found: dict[str, Any] = {"samples": samples, "blocks": blocks, "seconds": [], "peaks": []}

    def note(start: float) -> None:
        found["seconds"].append(time.perf_counter() - start)
        found["peaks"].append(peak())

    start = time.perf_counter()
    graph = analyse(model, (data[:1],))
    note(start)
    start = time.perf_counter()
    statistics = collect_from(model, [(data,)], graph, samples)
    note(start)
    space = build_space(graph, "default", load_profile("x86-64-v3"))
    with tempfile.TemporaryDirectory() as folder:
        database = LayerDatabase(folder, model, graph, space, statistics)
        names = [layer for layer in graph.layers if layer.startswith("blocks.")]
        numbers = sorted({int(layer.split(".")[1]) for layer in names})
        last = numbers[max(0, len(numbers) - blocks) :]
        chosen = [layer for layer in names if int(layer.split(".")[1]) in last]
        start = time.perf_counter()
        for layer in chosen:
            for width in database.widths_in(layer):
                database.compute(File(layer, width))
        note(start)
    return found | {
        "layers": len(graph.layers),
        "compressed": len(chosen),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def row(name: str, found: dict[str, Any]) -> list[str]:
    cells = [f"{s:.0f} s, {p:.2f} GB" for s, p in zip(found["seconds"], found["peaks"], strict=True)]
    return [name, f"{found['parameters'] / 1e6:.1f} M", *cells, f"{max(found['peaks']):.2f} GB", f"<= {LIMIT:g} GB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["vit_base", "conformer_medium"], default="vit_base")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--blocks", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = measure(options.model, options.samples, options.depth, options.blocks)
    whole = options.depth is None
    data = {**(earlier("memory", "models") if whole else {}), options.model: found}
    headings = ["model", ">parameters", ">reading", ">calibrating", ">a block's layers", ">peak memory", ">goal"]
    notes = [
        f"{name}: {one['layers']} layers, calibrated on {one['samples']} samples; {one['compressed']} layers of its last "
        f"{one['blocks']} block(s) compressed at every width, in one process."
        for name, one in data.items()
    ]
    rows = [row(name, one) for name, one in data.items()]
    publish("memory", headings, rows, {"models": data}, load_profile("x86-host"), notes, whole, "models")


if __name__ == "__main__":
    main()
