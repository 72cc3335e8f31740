"""Exported graphs brought to the operations that TVM's importer translates rightly.

This TVM (0.27) imports some core operations with no warning and a wrong result: ``select`` and ``index`` with a negative index
read outside the tensor (what made LSTMs come out 4e13 off was their ``outputs[:, -1]``), ``alpha`` of ``add`` and ``sub`` is
dropped, so are ``scale`` and ``input_scale`` of ``elu`` (SELU), and nearest upsampling to a size that is no multiple picks other pixels.
Each is rewritten here; what has no rewriting is refused by name. GroupNorm becomes a LayerNorm, which has a fast kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autocomp.errors import ExportError

if TYPE_CHECKING:
    import torch

# Recurrent layers are unrolled over time: so many cells compile in about two minutes.
_MOST_CELLS = 1000
_RECURRENT = ("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Decompose to core operations and rewrite those that are imported wrongly. ExportError names what has no rewriting."""
    import torch
    from torch._decomp import get_decompositions

    aten = torch.ops.aten
    table = torch.export.default_decompositions()
    table.update(get_decompositions([aten.elu, aten.upsample_nearest2d, aten.upsample_nearest1d]))
    table[aten.native_group_norm.default] = _group_norm
    if not any(_masked(node) for node in program.graph.nodes):
        table[aten.scaled_dot_product_attention.default] = _attention
    _check_recurrences(program)
    program = program.run_decompositions(table)
    graph = program.graph
    rewritings = {
        aten.select.int: _wrap_select,
        aten.add.Tensor: _spell_out_alpha,
        aten.sub.Tensor: _spell_out_alpha,
        aten.index.Tensor: _wrap_index,
        aten.avg_pool1d.default: _refuse_divisor,
        aten.avg_pool2d.default: _refuse_divisor,
    }
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in rewritings:
            rewritings[node.target](graph, node)
    graph.lint()
    program.graph_module.recompile()
    return program


def _check_recurrences(program: torch.export.ExportedProgram) -> None:
    cells = 0
    for node in program.graph.nodes:
        if str(node.target) not in _RECURRENT:
            continue
        layers, bidirectional, batch_first = node.args[4], node.args[7], node.args[8]
        steps = int(node.args[0].meta["val"].shape[1 if batch_first else 0])
        cells += steps * layers * (2 if bidirectional else 1)
        if cells > _MOST_CELLS:
            raise ExportError(
                f"recurrent layers are unrolled over time, and with {origin(node)} ({steps} steps) the model has {cells} cells, more than the "
                f"{_MOST_CELLS} that are compiled: shorten the sequence, or keep the layer outside the compressed model"
            )


def _masked(node: Any) -> bool:
    """Whether a node is attention of another kind than plain: masked, causal, or with fewer heads of keys than of queries."""
    if node.op != "call_function" or not str(node.target).startswith("aten.scaled_dot_product_attention"):
        return False
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given.get("attn_mask") is not None or bool(given.get("is_causal")) or bool(given.get("enable_gqa"))


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, scale: float | None = None, **__: Any
) -> torch.Tensor:
    """Plain attention as products and a softmax; torch's own decomposition guards against rows that a mask forbids whole."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    return scores.softmax(-1) @ value


def _group_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    channels: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    length = channels // groups * size
    ones, zeros = x.new_ones(length), x.new_zeros(length)
    y = torch.layer_norm(x.reshape(n, groups, length), [length], ones, zeros, eps).reshape(x.shape)
    along = [1, channels] + [1] * (x.dim() - 2)
    if weight is not None:
        y = y * weight.reshape(along)
    if bias is not None:
        y = y + bias.reshape(along)
    unused = x.new_zeros(n, groups)  # mean and reciprocal deviation, which only training reads
    return y, unused, unused.clone()


def origin(node: Any) -> str:
    """Where in the model an exported operation comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((name for name, _ in reversed(list(stack.values())) if name), "")
    return f"module {path!r}" if path else f"node {node.name!r}"


def _wrap_select(_graph: Any, node: Any) -> None:
    source, axis, index = node.args
    if isinstance(index, int) and index < 0:
        node.args = (source, axis, index + int(source.meta["val"].shape[axis]))


def _spell_out_alpha(graph: Any, node: Any) -> None:
    import torch

    alpha = node.kwargs.get("alpha", 1)
    if alpha == 1:
        return
    with graph.inserting_before(node):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node.args[1], alpha))
        scaled.meta = dict(getattr(node.args[1], "meta", {}))
    node.args = (node.args[0], scaled)
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "alpha"}


def _wrap_index(graph: Any, node: Any) -> None:
    """``x[i]`` with ``i`` negative counts from the end: add the axis' size to what is below zero."""
    import torch

    source, indices = node.args
    wrapped = list(indices)
    for axis, index in enumerate(indices):
        if index is None or not index.meta["val"].dtype.is_signed:
            continue
        size = int(source.meta["val"].shape[axis])
        with graph.inserting_before(node):
            below = graph.call_function(torch.ops.aten.lt.Scalar, (index, 0))
            moved = graph.call_function(torch.ops.aten.add.Tensor, (index, size))
            wrapped[axis] = graph.call_function(torch.ops.aten.where.self, (below, moved, index))
        for made in (below, moved, wrapped[axis]):
            made.meta = dict(index.meta)
        below.meta["val"] = index.meta["val"] < 0
    node.args = (source, wrapped)


def _refuse_divisor(_graph: Any, node: Any) -> None:
    divisor = node.args[6] if len(node.args) > 6 else node.kwargs.get("divisor_override")
    if divisor is not None:
        raise ExportError(
            f"{origin(node)} averages with divisor_override={divisor}, which the compiler does not support; "
            "use the plain average and multiply its result"
        )
