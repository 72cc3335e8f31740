"""How much memory calibration and the layer database take on a large model: they must fit in 6 GB.

    python benchmarks/memory.py [--model vit_base] [--samples 64] [--depth 12] [--blocks 1]

Weights are random, which costs as much as trained ones. All layers are calibrated; of the database, the layers of the last ``--blocks``
blocks are built at every width, as memory does not grow with the number of layers. ``--depth`` takes fewer blocks than the model has.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time

import torch
from zoo.inputs import settle, smooth_noise
from zoo.sequence import _Conformer
from zoo.vision import _ViT

from autocomp.accuracy.calibrate import collect_from
from autocomp.compress.database import LayerDatabase
from autocomp.graph import analyse
from autocomp.hardware import load_profile
from autocomp.space import build_space

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["vit_base", "conformer_medium"], default="vit_base")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--blocks", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, data = globals()[options.model](options.samples, options.depth)
    start = time.perf_counter()
    graph = analyse(model, (data[:1],))
    print(f"{options.model}: {len(graph.layers)} layers read in {time.perf_counter() - start:.0f} s; {peak():.2f} GB")
    start = time.perf_counter()
    statistics = collect_from(model, [(data,)], graph, options.samples)
    print(f"calibrated on {options.samples} samples in {time.perf_counter() - start:.0f} s; {peak():.2f} GB")
    space = build_space(graph, "default", load_profile("x86-64-v3"))
    with tempfile.TemporaryDirectory() as folder:
        database = LayerDatabase(folder, model, graph, space, statistics)
        names = [name for name in graph.layers if name.startswith("blocks.")]
        numbers = sorted({int(name.split(".")[1]) for name in names})
        last = numbers[max(0, len(numbers) - options.blocks) :]
        chosen = [name for name in names if int(name.split(".")[1]) in last]
        start = time.perf_counter()
        for name in chosen:
            for width in database.widths_in(name):
                database.compute(name, width)
        print(f"{len(chosen)} layers compressed in {time.perf_counter() - start:.0f} s, one process; {peak():.2f} GB")
    print(f"peak {peak():.2f} GB of {LIMIT:g}: {'fits' if peak() <= LIMIT else 'does NOT fit'}")


if __name__ == "__main__":
    main()
