"""The compression pipeline on a small net, made once for several test files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import families
import nets
import torch
from torch import Tensor, nn

from autocomp.compress.batchnorm import reestimate_batchnorm
from autocomp.database.calibrate import Statistics, collect_from
from autocomp.database.database import LayerDatabase
from autocomp.graph.analyse import analyse
from autocomp.graph.canonical import canonical
from autocomp.graph.graph import Graph
from autocomp.records.precisions import Precision
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile
from autocomp.space.space import Space

torch.set_num_threads(1)


@dataclass(frozen=True)
class Vectors:
    """What a space reads of a profile."""

    name: str = "test"
    lanes: int = 8
    precisions: tuple[str, ...] = ("fp32", "w8a8")


EVERYTHING = SpaceFile(
    format_version=1,
    rules=[Rule(layers="*", keep=[1.0, 0.75, 0.5, 0.25], ranks=[0.5, 0.25], precisions=["fp32", "w8a8"])],
)

# Ways to store a weight, of every kind; first and last layers included, so that small nets have layers to store.
STORABLE: list[Precision] = ["fp32", "fp16", "w8a8", "w8", "w4g32", "vq4", "vq2", "rvq4"]
STORED = SpaceFile(
    format_version=1,
    ends="any",
    rules=[Rule(layers="*", keep=[1.0, 0.5], ranks=[0.5], spatial_ranks=[0.5], precisions=STORABLE)],
)


@dataclass(frozen=True)
class Pipeline:
    """A model and everything up to its layer database."""

    model: nn.Module
    graph: Graph
    space: Space
    statistics: Statistics
    data: Tensor

    def database(self, folder: Path) -> LayerDatabase:
        return LayerDatabase(folder, self.model, self.graph, self.space, self.statistics)


@cache
def pipeline(kind: str = "plain") -> Pipeline:
    """``plain``, ``depthwise``, ``flat``, ``odd``, or one of ``families.FAMILIES``; with `` stored`` after it, in many precisions."""
    stored, kind = kind.endswith(" stored"), kind.removesuffix(" stored")
    data = families.samples(kind, 96) if kind in families.FAMILIES else nets.images(96)
    if kind in families.FAMILIES:
        model = families.make(kind)
    elif kind in ("flat", "odd"):
        torch.manual_seed(0)
        model = (nets.Flat() if kind == "flat" else nets.Odd()).eval()
    else:
        model = nets.make(width=32, depthwise=kind == "depthwise")
        reestimate_batchnorm(model, [(data,)])  # as after training: statistics that fit the data
    model = canonical(model, (data[:1],))
    graph = analyse(model, (data[:1],))
    space = build_space(graph, STORED if stored else EVERYTHING, Vectors())
    return Pipeline(model, graph, space, collect_from(model, [(data,)], graph, 96), data)
