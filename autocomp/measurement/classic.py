"""The recipes one would try first, as points beside the front: uniform L1 pruning, global magnitude pruning, int8 of other runtimes.

Pruned models get their BatchNorm statistics re-estimated, as any fair reading of them needs, and nothing else: channels go by the L1 norm of
their filters, and what stays is left as it is. They are compiled and timed exactly as the front's points are. Int8 of other
runtimes (ONNX Runtime's static, torch's dynamic) is in ``references``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from autocomp.database.database import LayerDatabase
from autocomp.database.orders import filter_norms
from autocomp.database.stitch import stitch
from autocomp.graph.fold import folded_bytes
from autocomp.records.candidate import Candidate

if TYPE_CHECKING:
    from autocomp.database.calibrate import Statistics
    from autocomp.graph.graph import Graph
    from autocomp.space.space import Space

KEEPS = (0.75, 0.5)


@dataclass(frozen=True)
class Classic:
    """A model made by a classic recipe: what it is called, what was done, its widths, and the bytes of its weights."""

    name: str
    note: str
    candidate: Candidate
    model: torch.nn.Module
    bytes: int


def classic_models(
    model: torch.nn.Module,
    graph: Graph,
    space: Space,
    statistics: Statistics,
    folder: Path,
    keeps: Sequence[float] = KEEPS,
) -> Iterator[Classic]:
    """Yield uniform L1 and global magnitude pruning at shares of units to keep; none if no group of the space can be narrowed.

    Widths are those the space offers, the nearest. What is the same candidate as one before is left out.
    """
    database = LayerDatabase(folder, model, graph, space, statistics, classic=True)
    seen = {space.dense().id}
    for name, note, candidate in _candidates(model, graph, space, keeps):
        if candidate.id not in seen:
            seen.add(candidate.id)
            stitched = stitch(model, graph, database, candidate)
            yield Classic(name, note, candidate, stitched, folded_bytes(stitched))


def global_widths(model: torch.nn.Module, graph: Graph, space: Space, keep: float) -> dict[str, int]:
    """Return the widths at which the share ``1 - keep`` of all units is gone, those with the smallest L1 norm anywhere.

    Norms are taken relative to the mean of their group: layers differ in scale for reasons that say nothing of importance.
    """
    narrow = [name for name, widths in space.widths.items() if len(widths) > 1]
    if not narrow:
        return {name: widths[0] for name, widths in space.widths.items()}
    relative = {}
    for name in narrow:
        norms = filter_norms(model, graph, graph.groups[name], 1)
        relative[name] = norms / norms.mean().clamp_min(1e-30)
    everything = torch.cat(list(relative.values())).sort(descending=True).values
    threshold = float(everything[max(1, round(keep * len(everything))) - 1])
    widths = {name: options[0] for name, options in space.widths.items()}
    for name, norms in relative.items():
        left = int((norms >= threshold).sum())
        widths[name] = min(space.widths[name], key=lambda width: abs(width - left))
    return widths


def _candidates(
    model: torch.nn.Module, graph: Graph, space: Space, keeps: Sequence[float]
) -> Iterator[tuple[str, str, Candidate]]:
    methods = {name: options[0] for name, options in space.methods.items()}
    for keep in keeps:
        note = f"{keep:.0%} of the channels of every group kept, by L1 norm; BatchNorm re-estimated"
        yield f"uniform L1, {keep:.0%} kept", note, space.uniform(keep)
    for keep in keeps:
        note = f"{keep:.0%} of all channels kept, by L1 norm over the mean of their group; BatchNorm re-estimated"
        widths = global_widths(model, graph, space, keep)
        yield f"global magnitude, {keep:.0%} kept", note, space.normalise(Candidate(widths, methods))
