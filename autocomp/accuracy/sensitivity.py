"""Tier 0: what each option costs by itself, read off the layer database's tables, and what masks of single weights would."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from autocomp.compress.hessian import WIDE
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Sensitivity
from autocomp.records.precisions import FP32

if TYPE_CHECKING:
    from torch import nn

    from autocomp.database.calibrate import Statistics
    from autocomp.database.database import LayerTable
    from autocomp.graph.graph import Graph


def curves(tables: Iterable[LayerTable]) -> list[Sensitivity]:
    """Return a row for each rank and each precision of each layer at dense widths, and for each width of each group in fp32.

    Methods that are both low rank and quantised are no point of either curve and are left out, as are precisions that do not hold a weight.
    """
    rows: list[Sensitivity] = []
    by_group: dict[str, dict[int, tuple[float, float]]] = {}
    for table in tables:
        dense = float(table.bytes[0, 0, 0])
        for m, method in enumerate(table.methods):
            error, share = float(table.error[0, 0, m]), float(table.bytes[0, 0, m]) / dense
            if method.ranks and method.precision == FP32:
                rows.append(Sensitivity(table.layer, "rank", "x".join(map(str, method.ranks)), error, share))
            elif not method.ranks and method.precision != FP32:
                rows.append(Sensitivity(table.layer, "precision", method.precision, error, share))
        if table.in_group is not None:
            found = by_group.setdefault(table.in_group, {})
            for i, width in enumerate(table.widths_in):
                out = i if table.in_group == table.out_group else 0
                error, size = found.get(width, (0.0, 0.0))
                found[width] = (error + float(table.error[i, out, 0]), size + float(table.bytes[i, out, 0]))
    for group, found in by_group.items():
        full = max(size for _, size in found.values())
        narrower = list(found.items())[1:]  # the first is all of it
        rows += [Sensitivity(group, "width", str(width), error, size / full) for width, (error, size) in narrower]
    return [row for row in rows if math.isfinite(row.error)]


def masks(model: nn.Module, graph: Graph, statistics: Statistics) -> Iterator[list[Sensitivity]]:
    """Yield of each ungrouped layer a row for each mask of single weights; ``share`` is of the bytes in the smallest form of its file.

    A study of accuracy and size: no kernel skips single zeros, so no candidate is masked. It takes O K^3 operations a layer and mask;
    layers wider than `WIDE` have none.
    """
    from autocomp.compress.sparse import study
    from autocomp.layers.convolution import Layers, outputs_first

    for name, layer in graph.layers.items():
        if layer.conv_groups > 1 or layer.fixed or layer.columns > WIDE:
            continue
        module, seen = model.get_submodule(name), statistics.layers[name]
        assert isinstance(module, Layers)
        weight = outputs_first(module)
        points = study(name, weight.detach().flatten(1), seen.covariance, seen.fisher)
        yield [
            Sensitivity(
                name, "mask", p.pattern if p.positions else f"{p.kept:.0%}", p.error, p.bytes / (4 * weight.numel())
            )
            for p in points
        ]


def additive_error(tables: Iterable[LayerTable], candidate: Candidate) -> float:
    """Return the tier-0 proxy of a candidate: the sum of its layers' errors, nats a sample."""
    total = 0.0
    for table in tables:
        i = _level(table.widths_in, table.in_group, candidate.widths)
        o = _level(table.widths_out, table.out_group, candidate.widths)
        total += float(table.error[i, o, table.methods.index(candidate.methods[table.layer])])
    return total


def _level(widths: tuple[int, ...], group: str | None, chosen: Mapping[str, int]) -> int:
    return 0 if group is None else widths.index(chosen[group])
