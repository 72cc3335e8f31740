"""An exported program → a canonical graph: constant expressions folded, layers made modules, calls that change nothing left out."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from autocomp.errors import ExportError
from autocomp.graph import complex_numbers
from autocomp.graph.aliases import usual
from autocomp.graph.layer_calls import LAYER_CALLS, Call, Constant
from autocomp.graph.pairs import Pair
from autocomp.graph.recurrent_calls import EXPANSIONS
from autocomp.layers.convolution import Layers, Transposed
from autocomp.layers.narrow import Norms
from autocomp.layers.recurrent import Recurrence

# What a call of these returns is its first argument, in evaluation mode and on one device.
_NOTHING = {
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "dropout_",
    "detach",
    "alias",
    "lift_fresh_copy",
    "contiguous",
    "lift",
}
_HARMLESS = {"detach_", "requires_grad_"}  # said to write, but no value
_CHECKS = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
}
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
LARGEST_MADE = (
    1 << 20
)  # elements of a constant at most that is made of no weight (a mask, positions); larger ones are computed anew
GROWTH = 4  # a constant expression of weights is folded where it is no larger than so many times what it is made of


class Reader:
    """Reads one exported program. Afterwards ``graph``, ``modules`` and what the methods return make the canonical model."""

    def __init__(self, program: torch.export.ExportedProgram, model: nn.Module) -> None:
        self.program, self.model = program, model
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.origins: dict[str, str] = {}
        assert program.call_spec.out_spec is not None
        self.returns = program.call_spec.out_spec
        self._env: dict[fx.Node, Any] = {}
        self._constants: dict[int, fx.Node] = {}  # by tensor
        self._tensors: dict[str, Tensor] = {}
        self._calls: dict[fx.Node, Call] = {}
        self._copies: dict[int, Tensor] = {}  # of the model's own tensors, so that what was shared stays so
        self._kept: list[Tensor] = []  # ids of tensors are keys: they must not be used anew
        self._written: set[fx.Node] = set()
        self._strided = any(_name(node) == "as_strided" for node in program.graph.nodes)  # layouts matter then
        self._outside: list[fx.Node] = []

    # --- reading -------------------------------------------------------------------------------------------------------

    def read(self) -> Reader:
        """Build the graph. ExportError for what has no canonical form."""
        program = self.program
        self._written = _written_roots(program.graph)
        by_name = {str(name): self._own(path) for name, path in self._paths().items()}
        last = None
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in by_name:
                value, path = by_name[node.name]
                if node in self._written:
                    raise ExportError(
                        f"the model writes its buffer {path!r} when it is called: a compiled module has no memory between calls. "
                        "Take the state as an input and return it as an output instead"
                    )
                self._env[node] = Constant(value, path, value.numel())
            elif node.op == "placeholder":
                made = self.graph.placeholder(node.name)
                made.meta = _meta(node)
                self._outside.append(made)
                self._env[node] = made
            elif node.op != "output":
                self._run(node)
            if node.op == "placeholder" and node in self._written:  # what the model does to its input is its own affair
                self._env[node] = self._call(torch.ops.aten.clone.default, (self._env[node],), {}, node)
            last = node
        assert last is not None
        outputs = _pytree.tree_map_only(fx.Node, self._value_of, list(last.args[0]))
        if any(isinstance(value, Pair) for value in outputs):
            raise ExportError(
                "an output of the model is complex, which no compiled module returns: return torch.view_as_real of it"
            )
        self.graph.output([self._materialised(value) for value in outputs])
        self.graph.eliminate_dead_code(lambda node: node.op == "output" or node.op == "placeholder" or _writes(node))
        self._make_modules()
        return self

    def parameters(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the inputs: those of the model's forward where it names them, else the graph's."""
        known = inspect.signature(model.forward).parameters.values()
        given = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return tuple(given[i] if i < len(given) else node.name for i, node in enumerate(self._outside))

    def tensors(self) -> dict[str, Tensor]:
        """Bare parameters and buffers by name: what no layer holds."""
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        return {name: tensor for name, tensor in self._tensors.items() if name in used}

    def norms(self) -> dict[str, str]:
        """Map a layer to the BatchNorm that alone reads it, each called once."""
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        times: dict[Any, int] = {}
        for node in calls:
            times[node.target] = times.get(node.target, 0) + 1
        found = {}
        for node in calls:
            before = node.args[0]
            if (
                not isinstance(self.modules[str(node.target)], Norms)
                or not isinstance(before, fx.Node)
                or before.op != "call_module"
            ):
                continue
            layer = self.modules[str(before.target)]
            rows = _outputs(layer)
            flat = not isinstance(layer, nn.Linear) or len(_shape(before)) == 2  # of [N, L, C] a BatchNorm normalises L
            alone = len(before.users) == 1 and times[node.target] == times[before.target] == 1
            if alone and flat and isinstance(layer, Layers) and rows == self.modules[str(node.target)].num_features:
                found[str(before.target)] = str(node.target)
        return found

    def _paths(self) -> dict[Any, str]:
        signature = self.program.graph_signature
        return {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }

    def _own(self, path: str) -> tuple[Tensor, str]:
        """A copy of a tensor of the model; the same one for the same tensor."""
        program = self.program
        tensor = program.state_dict[path] if path in program.state_dict else program.constants[path]
        if id(tensor) not in self._copies:
            copied = tensor.detach().clone()
            self._copies[id(tensor)] = (
                nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
            )
            self._kept.append(tensor)
        return self._copies[id(tensor)], path

    def _run(self, node: fx.Node) -> None:
        node.target = usual(node.target)
        name = _name(node)
        if node.op == "get_attr":
            found = getattr(node.graph.owning_module, str(node.target))
            self._env[node] = Constant(found, str(node.target), 0) if isinstance(found, Tensor) else found
            return
        if name in _CHECKS:
            return
        if name.startswith(_INLINED):
            self._inline(node)
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ExportError(
                f"the model's control flow depends on its values ({name}, at {_place(node)}), which cannot be compiled; compute both "
                "branches and choose with torch.where"
            )
        args, kwargs = _pytree.tree_map_only(fx.Node, self._value_of, (list(node.args), dict(node.kwargs)))
        kept = self._strided and name in ("contiguous", "clone")
        if _is_nothing(node, name) and node not in self._written and not kept:
            self._env[node] = args[0]
            return
        constant = self._constant(node, args, kwargs)
        self._env[node] = self._dynamic(node, args, kwargs) if constant is None else constant

    def _value_of(self, node: fx.Node) -> Any:
        if node not in self._env:
            raise ExportError(f"the model's graph reads {node.name} before it is made")
        return self._env[node]

    def _inline(self, node: fx.Node) -> None:
        """A block under no_grad or autocast: its graph in place of the call. Computed in the precision of its inputs."""
        first = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
        block = getattr(node.graph.owning_module, str(node.args[first].target))  # type: ignore[union-attr]
        inputs = [n for n in block.graph.nodes if n.op == "placeholder"]
        for inner, outer in zip(inputs, node.args[first + 1 :], strict=True):
            self._env[inner] = self._env[outer] if isinstance(outer, fx.Node) else outer
        self._written |= _written_roots(block.graph)
        for inner in block.graph.nodes:
            if inner.op == "output":
                self._env[node] = _pytree.tree_map_only(fx.Node, self._value_of, inner.args[0])
            elif inner.op != "placeholder":
                self._run(inner)

    def _constant(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """What a call on constants alone gives; None where it depends on the inputs, on chance, or would grow too large."""
        leaves = _pytree.tree_leaves((args, kwargs))
        if node in self._written or any(isinstance(leaf, fx.Node) for leaf in leaves):
            return None
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or _writes(node):
            return None
        real = _pytree.tree_map_only(Constant, lambda c: c.value, (args, kwargs))
        with torch.no_grad():
            value = _unstrided(node)(*real[0], **real[1])
        made_of = sum(leaf.made_of for leaf in leaves if isinstance(leaf, Constant))
        return _pytree.tree_map_only(Tensor, lambda t: Constant(t, "", made_of), value)

    def _dynamic(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if (found := complex_numbers.expanded(self, node, args, kwargs)) is not None:
            if node in self._written:
                raise ExportError(
                    f"{node.target} writes into complex numbers, at {_place(node)}: make a new tensor instead"
                )
            return found
        if _name(node) == "getitem" and not isinstance(args[0], fx.Node):
            return args[0][args[1]]
        if node.target is torch.ops.aten.cat.default:  # an empty cache adds nothing, and may have any rank
            parts = [part for part, given in zip(args[0], node.args[0], strict=True) if 0 not in _shape(given)]  # type: ignore[arg-type]
            if len(parts) == 1 and isinstance(parts[0], fx.Node):
                return parts[0]
            args = [parts, *args[1:]]
        if node not in self._written and _unstrided(node) is not node.target:
            return self._call(_unstrided(node), *self._plain(args, kwargs), node)
        if node.target is torch.ops.aten.select.int and (part := _stacked(*args[:3])) is not None:
            return part
        expansion = EXPANSIONS.get(str(node.target))
        expanded = expansion(self, node, args) if expansion is not None else None
        if expanded is not None:
            return expanded
        layer = LAYER_CALLS.get(str(node.target))
        call = layer(node, args, kwargs) if layer is not None else None
        if call is None:
            return self._call(node.target, *self._plain(args, kwargs), node)
        return self.layer(call, node)

    def layer(self, call: Call, node: fx.Node) -> fx.Node:
        """Call a layer in the place of a node."""
        source = self._materialised(call.source)
        if call.padding is not None:
            source = self._call(torch.ops.aten.constant_pad_nd.default, (source, list(call.padding), 0.0), {}, None)
        made = self.graph.create_node(
            "call_module", "?", (source, *map(self._materialised, call.others)), {}, node.name
        )
        made.meta = _meta(node)
        self._calls[made] = call
        return made

    def operation(self, target: Any, args: tuple[Any, ...], node: fx.Node) -> fx.Node:
        """Call an operation in the place of a node."""
        return self._call(target, *self._plain(list(args), {}), node)

    def _plain(self, args: list[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = _pytree.tree_map_only(Constant, self._materialised, (args, kwargs))
        return tuple(args), kwargs

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: fx.Node | None) -> fx.Node:
        made = self.graph.create_node("call_function", target, args, kwargs, None if node is None else node.name)
        made.meta = _meta(node) if node is not None else {}
        return made

    def _materialised(self, value: Any) -> Any:
        """A constant that the graph reads: a bare tensor of the canonical model."""
        if not isinstance(value, Constant):
            return value
        if id(value.value) not in self._constants:
            tensor = value.value.detach() if not isinstance(value.value, nn.Parameter) else value.value
            if not isinstance(tensor, nn.Parameter):
                tensor = tensor.contiguous() if not value.path else tensor
            name = value.path or f"constants.c{len(self._tensors)}"
            while name in self._tensors:
                name += "_"
            with self.graph.inserting_before(_first(self.graph)):
                node = self.graph.get_attr(name)
            self._tensors[name] = tensor
            self._constants[id(value.value)] = node
            self._kept.append(value.value)
        return self._constants[id(value.value)]

    # --- layers --------------------------------------------------------------------------------------------------------

    def _make_modules(self) -> None:
        """Name every layer and make its module; calls with the same weights and settings share one."""
        made: dict[Any, str] = {}
        calls = [(node, self._calls[node]) for node in self.graph.nodes if node in self._calls]
        uses = Counter(key for _, key in {(call.kind, call.path) for _, call in calls})
        wanted = [_wanted(node, call, uses[call.path] > 1) for node, call in calls]
        paths = {*wanted, *(str(node.target) for node in self.graph.nodes if node.op == "get_attr")}
        for (node, call), name in zip(calls, wanted, strict=True):
            key = (call.kind, *(id(tensor) for tensor in call.tensors.values()), call.settings)
            if key not in made:
                if any(
                    path.startswith(name + ".") for path in paths
                ):  # it would hold other things, and vanish with them
                    name = f"{name}.{call.kind.__name__.lower()}"
                while name in self.modules or name in self._tensors:
                    name += "_"
                made[key] = name
                self.modules[name] = call.make()
                self.origins[name] = _place(node)
            node.target = made[key]
            module = self.modules[made[key]]
            if isinstance(module, Recurrence):
                module.projection = str(node.args[0].target)  # the layer made just before


def _outputs(layer: nn.Module) -> int:
    weight = getattr(layer, "weight", None)
    return int(weight.shape[1 if isinstance(layer, Transposed) else 0]) if isinstance(weight, Tensor) else 0


def _wanted(node: fx.Node, call: Call, shared: bool) -> str:
    """The name a layer should have: that of its weight's owner; of the module it stands in where its weight is computed or shared."""
    if call.path.startswith("."):  # which of the layers of that module
        return f"{_module_of(node)}{call.path}".removeprefix(".")
    if call.path and not (shared and _module_of(node)):
        name = call.path.removesuffix(".weight").removesuffix(".running_mean")
        return name if name not in ("weight", "running_mean") else "layer"
    return _module_of(node) or "layer"


def _meta(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}


def _module_of(node: fx.Node) -> str:
    stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    return str(stack[-1]).removeprefix("L['self'].") if stack else ""


def _place(node: fx.Node) -> str:
    """The line of the user's code that an operation comes from, and the module it stands in."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    where = [line for line in trace if line.startswith("File ")]
    code = f", `{trace[-1]}`" if trace and not trace[-1].startswith("File ") else ""
    parts = where[-1].split('"') if where else []
    at = (
        f"{parts[1].rpartition('/')[2]}:{parts[2].split(',')[1].removeprefix(' line ')}"
        if len(parts) > 2
        else "the model's forward"
    )
    module = _module_of(node)
    return f"{at}{code}" + (f" in {module}" if module else "")


def _unstrided(node: fx.Node) -> Any:
    """The operation, without a wish for a layout: its source may lie otherwise now, where a copy that changed nothing else was left out."""
    return torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target


def _name(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target)) if callable(node.target) else str(node.target)
    return name.removeprefix("aten.").split(".")[0]


def _stacked(source: Any, axis: Any, index: Any) -> fx.Node | None:
    """Which of several tensors was stacked only to be selected again, such as the last layer's state; None if it is no such thing."""
    if (
        not isinstance(source, fx.Node)
        or source.target is not torch.ops.aten.stack.default
        or not isinstance(index, int)
    ):
        return None
    parts, along = source.args[0], source.args[1] if len(source.args) > 1 else 0
    assert isinstance(parts, list | tuple)
    part = parts[index] if axis == along == 0 and -len(parts) <= index < len(parts) else None
    return part if isinstance(part, fx.Node) else None


def _shape(node: fx.Node) -> Sequence[int]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_nothing(node: fx.Node, name: str) -> bool:
    """Whether a call changes neither values nor type nor shape."""
    value, source = node.meta.get("val"), node.args[0] if node.args else None
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return False
    if name in _NOTHING:
        return not ("dropout" in name and bool(node.args[2]))
    if name in ("to", "_to_copy", "float", "type_as"):
        return value.dtype == before.dtype
    if name == "slice":
        start, end, step = (list(node.args[2:]) + [None, None, 1][len(node.args) - 2 :])[:3]
        whole = end is None or (isinstance(end, int) and end >= 1 << 62)
        return start in (0, None) and whole and bool(step == 1)
    return False


def _writes(node: fx.Node) -> bool:
    """Whether an operation writes into an argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or _name(node) in _HARMLESS:
        return False
    return any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


def _written_roots(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory some operation writes into: where it was made, and every view on the way."""
    root: dict[fx.Node, fx.Node] = {}
    written: set[fx.Node] = set()
    for node in graph.nodes:
        root[node] = node
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            if _name(node) == "getitem" and isinstance(node.args[0], fx.Node):
                root[node] = root[node.args[0]]
            continue
        for index, argument in enumerate(schema.arguments):
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if argument.alias_info is None or not isinstance(value, fx.Node):
                continue
            root[node] = root[value]
            if argument.alias_info.is_write and _name(node) not in _HARMLESS:
                written.add(root[value])
    return {node for node in graph.nodes if root.get(node) in written}


def _first(graph: fx.Graph) -> fx.Node:
    """The first node that is neither an input nor a constant."""
    return next(iter(node for node in graph.nodes if node.op not in ("placeholder", "get_attr")), graph._root)
