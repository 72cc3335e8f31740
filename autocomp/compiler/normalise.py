"""Exported graphs brought to the operations that are translated rightly.

First decomposed (`operations.decompositions`), then every conversion of types that torch makes on the fly is written out
(`operations.promotion`). This TVM (0.27) imports some operations with no warning and a wrong result, or other types: what is left after
these steps has a translation of ours (`operations.translations`), or one of TVM's that was found right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autocomp.compiler.operations.support import origin
from autocomp.compiler.recurrent import KINDS, projected
from autocomp.errors import ExportError

if TYPE_CHECKING:
    import torch


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Decompose to the operations that are translated, conversions written out. ExportError names what cannot be compiled."""
    import torch

    from autocomp.compiler.operations.decompositions import decompositions
    from autocomp.compiler.operations.promotion import promote

    aten = torch.ops.aten
    table = dict(decompositions())
    _keep_recurrences(program, table)
    program = program.run_decompositions(table)
    graph = program.graph
    rewritings = {
        aten.select.int: _wrap_select,
        aten.add.Tensor: _spell_out_alpha,
        aten.sub.Tensor: _spell_out_alpha,
    }
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if "_pool" in str(node.target) and len(node.args) > 2 and not node.args[2]:  # no stride is the window's size
            node.args = (*node.args[:2], node.args[1], *node.args[3:])
        if node.target in rewritings:
            rewritings[node.target](graph, node)
        elif str(node.target).startswith(
            "aten._assert"
        ):  # what it asserts was seen to hold when the model was exported
            graph.erase_node(node)
    promote(graph)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return program


def _keep_recurrences(program: torch.export.ExportedProgram, table: Any) -> None:
    """Recurrent layers stay whole: each is a loop over time (``compiler.recurrent``), where torch would write every step out."""
    import torch

    for name in KINDS:
        table.pop(getattr(torch.ops.aten, name.removesuffix(".input")).input, None)
    for node in program.graph.nodes:
        if str(node.target).removeprefix("aten.") in KINDS and projected(node):
            raise ExportError(
                f"{origin(node)} projects its states (proj_size), which is not compiled: use a linear layer after the recurrent one, "
                "or keep it outside the compressed model"
            )


def _wrap_select(_graph: Any, node: Any) -> None:
    source, axis, index = node.args
    if isinstance(index, int) and index < 0:
        node.args = (source, axis, index + int(source.meta["val"].shape[axis]))


def _spell_out_alpha(graph: Any, node: Any) -> None:
    import torch

    alpha = node.kwargs.get("alpha", 1)
    if alpha == 1:
        return
    if isinstance(node.args[1], torch.fx.Node):
        with graph.inserting_before(node):
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node.args[1], alpha))
        value = node.args[1].meta["val"]
        scaled.meta = {**node.meta, "val": value.to(torch.result_type(value, alpha))}
    else:
        scaled = node.args[1] * alpha
    node.args = (node.args[0], scaled)
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "alpha"}
