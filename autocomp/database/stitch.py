"""Stitch a candidate out of database entries: a smaller model, its BatchNorm statistics estimated anew."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor, nn

from autocomp.compress.batchnorm import reestimate_batchnorm
from autocomp.graph.branches import bypassed
from autocomp.graph.program import CanonicalModel, tensor_at
from autocomp.graph.removal import Changes, narrowed
from autocomp.records.candidate import Candidate, Method

if TYPE_CHECKING:
    from autocomp.database.database import LayerDatabase
    from autocomp.graph.graph import Graph, Layer


def stitch(
    model: nn.Module, graph: Graph, database: LayerDatabase, candidate: Candidate, reestimate: bool = True
) -> nn.Module:
    """Return the candidate as a model of its own, in evaluation mode; ``model`` is not changed.

    Tensors are really smaller, 8-bit layers are `QuantConv2d` or `QuantLinear`, factorised ones `nn.Sequential`, branches left out. The
    result can be exported, copied and saved. ``reestimate`` makes a pass over the calibration batches for BatchNorm.
    """
    candidate = database.space.normalise(candidate)
    ended = database.space.left_out(candidate.widths)
    left = graph.without(ended)
    memo: dict[int, object] = {}
    for name, layer in left.layers.items():
        method = candidate.methods[name]
        width_in = database.widths_in(name)[0] if layer.in_group is None else candidate.widths[layer.in_group]
        rows = _rows(database, layer, candidate)
        if method == Method() and rows is None and width_in == database.widths_in(name)[0]:
            continue
        original = model.get_submodule(name)
        memo[id(original)] = database.entry(name, width_in, method).module(layer, original, rows)
    less: Counter[str] = Counter()  # by how much each size shrinks: one may follow several groups
    for group in left.groups.values():
        kept = database.kept(group.name, candidate.widths[group.name])
        if kept is not None:
            changes = narrowed(model, group, kept)
            memo |= {id(model.get_submodule(name)): module for name, module in changes.modules.items()}
            memo |= {id(tensor_at(model, path)): tensor for path, tensor in changes.tensors.items()}
            less.update(changes.sizes)
    constants = {
        end: database.entry(end, 0, Method()).constant(_rows(database, graph.layers[end], candidate))
        for name in ended
        for end in graph.branches[name].ends
    }
    changed = bool(memo or constants)
    # Deep copies go through the memo: what was replaced is never copied.
    stitched: nn.Module = copy.deepcopy(model, memo).eval()
    Changes({}, {}, less).apply(stitched)
    if constants:
        assert isinstance(stitched, CanonicalModel)
        stitched = bypassed(stitched, constants, database.statistics.batches[0])
    if changed and reestimate:
        reestimate_batchnorm(stitched, database.statistics.batches, database.statistics.axes)
    return stitched


def _rows(database: LayerDatabase, layer: Layer, candidate: Candidate) -> Tensor | None:
    """The output channels that a layer keeps; None if all."""
    return None if layer.out_group is None else database.rows(layer.name, candidate.widths[layer.out_group])
