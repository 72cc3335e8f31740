"""TVM's importer of exported programs, with our translations before its own and every node's result held to what torch says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from autocomp.compiler.expressions import is_constant
from autocomp.compiler.operations.support import advice, describe
from autocomp.compiler.operations.translations import OURS, Translation
from autocomp.errors import ExportError

_MOST_FOLDED = 1 << 20  # elements of a constant that is larger than what it is computed from


class Importer(ExportedProgramImporter):
    """Translates one program. What depends on no input is computed by torch and becomes a constant."""

    def __init__(self, program: torch.export.ExportedProgram, special: Mapping[str, Translation]) -> None:
        super().__init__()
        self.ours = {**OURS, **special}
        self.folded = constants(program)
        self.refused: list[str] = []
        self.unknown: set[fx.Node] = set()  # what follows from something refused: only whether it is known is asked

    def _check_unsupported_func_type(self, nodes: Any) -> None:
        """Found node by node, so that the message can say where."""

    def _translate_fx_graph(
        self, graph_module: Any, nodes: Any, inputs_vars: dict[str, Any], custom_ops: Any = None
    ) -> tuple[Any, ...]:
        for node in nodes:
            if node.op == "placeholder":
                if node.name in inputs_vars:
                    self.env[node] = inputs_vars[node.name]
            elif node.op == "get_attr":
                self.env[node] = getattr(graph_module, node.target)
            elif node.op == "call_function":
                try:
                    self.env[node] = self._translated(node)
                except ExportError as error:  # go on, so that the user hears of all at once
                    self.refused.append(str(error))
                    self.unknown.add(node)
            elif node.op == "output":
                if self.refused:
                    raise ExportError("\n".join(dict.fromkeys(self.refused)))
                leaves = torch.utils._pytree.tree_leaves(node.args[0])
                return tuple(self.env[leaf] for leaf in leaves if isinstance(leaf, fx.Node))
        raise AssertionError("a graph ends with its output")

    def _translated(self, node: fx.Node) -> Any:
        if node in self.folded:
            return constant(self.folded[node])
        name = str(getattr(node.target, "__name__", node.target))
        # TVM has some random operations, as zeros
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if name not in self.ours and (random or name not in self.convert_map):
            raise ExportError(f"the compiler has no {describe(node)}; {advice(node)}")
        if any(source in self.unknown for source in node.all_input_nodes):
            self.unknown.add(node)
            return None
        operands = [self.env.get(source) for source in node.all_input_nodes]
        if operands and all(is_constant(value) for value in operands):
            for source in node.all_input_nodes:  # TVM computes with two constants in Python
                self.env[source] = self.block_builder.emit(self.env[source])
        try:
            value = self.ours[name](node, self) if name in self.ours else self.convert_map[name](node)
        except Exception as error:
            reason = next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), "")
            raise ExportError(
                f"the compiler cannot translate {describe(node)}: {reason or type(error).__name__}"
            ) from error
        return self._held(node, value)

    def _held(self, node: fx.Node, value: Any) -> Any:
        """The value in the type that torch gives it; a shape that differs is a fault of the translation."""
        expected = node.meta.get("val")
        if isinstance(expected, (tuple, list)) or not isinstance(expected, torch.Tensor):
            return value
        kind = getattr(value, "ty", None)
        if not isinstance(kind, relax.TensorType):
            return value
        shape = [int(size) for size in kind.shape] if kind.shape is not None else None
        if shape != list(expected.shape):
            raise ExportError(
                f"the compiler translates {describe(node)} to another shape: {shape} instead of {list(expected.shape)}"
            )
        wanted = self._convert_data_type(expected.dtype)
        if str(kind.dtype).removeprefix("T.") != wanted:
            return self.block_builder.emit(relax.op.astype(value, wanted))
        return value


def constant(value: Any) -> Any:
    """A tensor, or several, as constants of Relax."""
    if isinstance(value, torch.Tensor):
        array = value.detach().contiguous().numpy()
        return relax.const(array, str(array.dtype))  # without the type, one number of 64 bits becomes one of 32
    return relax.Tuple([constant(item) for item in value])


def constants(program: torch.export.ExportedProgram) -> dict[fx.Node, Any]:
    """Values of the nodes of ``program`` that depend on no input; none that is large without need."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants,
    }  # fmt: skip
    state = {**program.state_dict, **program.constants}
    known: dict[fx.Node, Any] = {}
    folded: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            known[node] = state[names[node.name]].detach()
        if node.op != "call_function" or not all(source in known for source in node.all_input_nodes):
            continue
        random = isinstance(node.target, torch._ops.OpOverload) and (
            torch.Tag.nondeterministic_seeded in node.target.tags or node.target.namespace != "aten"
        )
        if random or not _small(node):
            continue
        arguments, keywords = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: known[source])
        with torch.no_grad():
            value = node.target(*arguments, **keywords)
        items = value if isinstance(value, (tuple, list)) else [value]
        if all(isinstance(item, torch.Tensor) for item in items):
            known[node] = folded[node] = value
    return folded


def _small(node: fx.Node) -> bool:
    def elements(value: Any) -> int:
        tensors = [item for item in torch.utils._pytree.tree_leaves(value) if isinstance(item, torch.Tensor)]
        return sum(math.prod(tensor.shape) for tensor in tensors)

    read = sum(elements(source.meta.get("val")) for source in node.all_input_nodes)
    return elements(node.meta.get("val")) <= max(_MOST_FOLDED, read)
