"""Stitch a candidate out of database entries: a smaller model, its BatchNorm statistics estimated anew."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autocomp.groups import narrowed, tensor_at
from autocomp.records import Candidate, Method

if TYPE_CHECKING:
    from autocomp.compress.database import LayerDatabase
    from autocomp.graph import Graph

Norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Input elements of one pass at most that is made with all samples at once: 256 samples of 3 x 64 x 64.
ONE_PASS = 256 * 3 * 64 * 64


def stitch(
    model: nn.Module, graph: Graph, database: LayerDatabase, candidate: Candidate, reestimate: bool = True
) -> nn.Module:
    """Return the candidate as a model of its own, in evaluation mode; ``model`` is not changed.

    Tensors are really smaller, 8-bit layers are `QuantConv2d` or `QuantLinear`, factorised ones `nn.Sequential`. The
    result can be exported, copied and saved. ``reestimate`` makes a pass over the calibration batches for BatchNorm.
    """
    candidate = database.space.normalise(candidate)
    memo: dict[int, object] = {}
    for name, layer in graph.layers.items():
        method = candidate.methods[name]
        width_in = database.widths_in(name)[0] if layer.in_group is None else candidate.widths[layer.in_group]
        rows = None
        if layer.out_group is not None:
            rows = database.rows(name, candidate.widths[layer.out_group])
        if method == Method() and rows is None and width_in == database.widths_in(name)[0]:
            continue
        original = model.get_submodule(name)
        memo[id(original)] = database.entry(name, width_in, method).module(layer, original, rows)
    integers: dict[tuple[str, str], int] = {}
    for group in graph.groups.values():
        kept = database.kept(group.name, candidate.widths[group.name])
        if kept is not None:
            changes = narrowed(model, group, kept)
            memo |= {id(model.get_submodule(name)): module for name, module in changes.modules.items()}
            memo |= {id(tensor_at(model, path)): tensor for path, tensor in changes.tensors.items()}
            integers |= changes.integers
    changed = bool(memo)
    # Deep copies go through the memo: what was replaced is never copied.
    stitched: nn.Module = copy.deepcopy(model, memo).eval()
    for (owner, attribute), value in integers.items():
        setattr(stitched.get_submodule(owner), attribute, value)
    if changed and reestimate:
        reestimate_batchnorm(stitched, database.statistics.batches)
    return stitched


def reestimate_batchnorm(model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> Tensor | None:
    """Replace the running statistics of every BatchNorm by those of ``batches``, in place.

    Everything else stays in evaluation mode. A single batch small enough is run at once: each BatchNorm then sees what
    the re-estimated ones before it make, and the logits [N, classes] are returned: the model's own on this data (but for N
    against N - 1 in the variances). Several batches are averaged (None).
    """
    from autocomp.accuracy.calibrate import logits_of

    norms = [module for module in model.modules() if isinstance(module, Norms) and module.track_running_stats]
    if not norms:
        return None
    momenta = [norm.momentum for norm in norms]
    whole = len(batches) == 1 and sum(tensor.numel() for tensor in batches[0]) <= ONE_PASS
    parts = list(batches) if whole else [p for b in batches for p in zip(*(t.split(64) for t in b), strict=True)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
        norm.train()
    output = None
    try:
        with torch.no_grad():
            for part in parts:
                output = model(*part)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
    return logits_of(output).float() if whole else None
