"""A canonical model as plain data, and back: its graph, its modules and sizes, and nothing that would have to be trusted.

Operations are named, and looked up among torch's (`aten`, `prims`), ours (`autocomp`) and a few functions of Python; modules among those of
`layers.table`. What is read is checked by that alone: it holds no code.
"""

from __future__ import annotations

import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from autocomp.graph.program import Batch, CanonicalModel, Code, Size, source_of
from autocomp.layers.table import FORMS, make, settings_of

FORMAT_VERSION = 1
_DICTS = (dict, OrderedDict, defaultdict)
_SPACES = ("aten", "prims", "autocomp")
_SYMBOLIC = ("sym_max", "sym_min", "sym_float", "sym_int", "sym_ite", "sym_not", "sym_sqrt", "sym_sum")


class Outputs(dict[str, Any]):
    """Outputs by name, as attributes and by position too: what a delivered model returns where the original returned a class of its own."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model has no output {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


_pytree.register_pytree_node(
    Outputs,
    lambda outputs: (list(outputs.values()), list(outputs)),
    lambda values, names: Outputs(zip(names, values, strict=True)),
    serialized_type_name="autocomp.Outputs",
)


def describe(model: CanonicalModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The structure of a model as JSON can hold it, and its tensors by name. TypeError names what cannot be written."""
    graph, code = model.code.graph, model.code
    if graph is None:
        raise TypeError("the model's graph is not known: it was read from a file of an older version")
    modules = {name: module for name, module in model.named_modules() if name and type(module) is not nn.Module}
    owned = [f"{name}." for name in modules]
    tensors, kinds, aliases = {}, {}, {}
    first: dict[Any, str] = {}
    memories: set[int] = set()
    named: list[tuple[str, Tensor, str]] = [
        *((n, t, "parameter") for n, t in model.named_parameters(remove_duplicate=False))
    ]
    named += [(n, t, "buffer") for n, t in model.named_buffers(remove_duplicate=False)]
    for name, tensor, kind in named:
        if not name.startswith(tuple(owned)):
            kinds[name] = kind
        memory = tensor.untyped_storage().data_ptr()
        same = memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        if memory and same in first:  # a size of none has no memory, and is shared by nobody
            aliases[name] = first[same]
        else:
            first[same] = name
            tensors[name] = tensor.detach().contiguous()
            if memory in memories:  # another part of a memory that is written already
                tensors[name] = tensors[name].clone()
            memories.add(memory)
    structure = {
        "format_version": FORMAT_VERSION,
        "parameters": list(code.parameters),
        "returns": _returns(code.returns),
        "norms": dict(code.norms),
        "batch": {
            "inputs": list(code.batch.inputs),
            "outputs": list(code.batch.outputs),
            "fixed": code.batch.fixed,
        },
        "origins": dict(code.origins),
        "sizes": dict(model.sizes),
        "modules": {n: {"kind": type(m).__name__, "settings": settings_of(m)} for n, m in modules.items()},
        "projections": {n: m.projection for n, m in modules.items() if getattr(m, "projection", "")},
        "tensors": kinds,
        "aliases": aliases,
        "nodes": [
            {
                "name": node.name,
                "op": node.op,
                "target": _target_name(node.target) if node.op == "call_function" else str(node.target),
                "args": [_value(argument) for argument in node.args],
                "kwargs": {key: _value(argument) for key, argument in node.kwargs.items()},
            }
            for node in graph.nodes
        ],
    }
    return structure, tensors


def rebuild(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CanonicalModel:
    """The model that `describe` wrote. KeyError, TypeError, ValueError or AttributeError where it is anything else."""
    tensors = {**tensors, **{name: tensors[source] for name, source in structure["aliases"].items()}}
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    sizes = {str(name): int(value) for name, value in structure["sizes"].items()}
    for found in structure["nodes"]:
        op, target = found["op"], found["target"]
        if op not in ("placeholder", "get_attr", "call_function", "call_module", "output"):
            raise ValueError(f"no node is a {op!r}")
        args = tuple(_read(argument, nodes, sizes) for argument in found["args"])
        kwargs = {key: _read(argument, nodes, sizes) for key, argument in found["kwargs"].items()}
        made = graph.create_node(op, _target(target) if op == "call_function" else target, args, kwargs, found["name"])
        nodes[found["name"]] = made
    modules: dict[str, nn.Module] = {}
    for name, form in structure["modules"].items():
        own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == name}
        modules[name] = _made(form, own)
    for name, projection in structure["projections"].items():
        modules[name].projection = projection
    bare = {
        name: nn.Parameter(tensors[name], requires_grad=tensors[name].is_floating_point())
        if kind == "parameter"
        else tensors[name]
        for name, kind in structure["tensors"].items()
    }
    batch = structure["batch"]
    code = Code(
        source_of(graph),
        tuple(structure["parameters"]),
        _spec(structure["returns"]),
        structure["norms"],
        Batch(tuple(batch["inputs"]), tuple(batch["outputs"]), batch["fixed"]),
        graph,
        structure["origins"],
    )
    return CanonicalModel(code, modules, bare, sizes)


def _made(form: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    if form["kind"] not in FORMS:
        raise ValueError(f"no delivered model has a {form['kind']!r}")
    return make(form["kind"], form["settings"], tensors)


# --- operations -----------------------------------------------------------------------------------------------------


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        space, _, name = target._schema.name.partition("::")
        if space in _SPACES:
            return f"{space}.{name}.{target._overloadname}"
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return f"operator.{name}"
    if name in _SYMBOLIC and getattr(torch, name) is target:
        return f"torch.{name}"
    raise TypeError(f"operation {target} has no name that it could be read back by")


def _target(name: str) -> Callable[..., Any]:
    space, _, rest = name.partition(".")
    found: Any = None
    if space in _SPACES:
        operation, _, overload = rest.rpartition(".")
        found = getattr(getattr(getattr(torch.ops, space), operation), overload)
    elif space == "operator" and not rest.startswith("_"):
        found = getattr(operator, rest)
    elif space == "torch" and rest in _SYMBOLIC:
        found = getattr(torch, rest)
    if not callable(found):
        raise ValueError(f"there is no operation {name!r}")
    call: Callable[..., Any] = found
    return call


# --- arguments ------------------------------------------------------------------------------------------------------

_OF_TORCH: Mapping[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def _value(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, Size):
        return {"size": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_value(part) for part in value]}
    if isinstance(value, list):
        return [_value(part) for part in value]
    if isinstance(value, slice):
        return {"slice": [_value(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, of in _OF_TORCH.items():
        if isinstance(value, of):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"an operation has the argument {value!r}, which cannot be written")


def _read(value: Any, nodes: Mapping[str, fx.Node], sizes: Mapping[str, int]) -> Any:
    if isinstance(value, list):
        return [_read(part, nodes, sizes) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "size":
        return Size(sizes[content], content)
    if kind in ("tuple", "slice"):
        parts = [_read(part, nodes, sizes) for part in content]
        return tuple(parts) if kind == "tuple" else slice(*parts)
    if kind == "device":
        return torch.device(content)
    if kind in _OF_TORCH:
        found = getattr(torch, content)
        if not isinstance(found, _OF_TORCH[kind]):
            raise ValueError(f"torch.{content} is no {kind}")
        return found
    if kind == "complex":
        return complex(*content)
    if kind == "float":
        return float(content)
    raise ValueError(f"no argument is a {kind!r}")


# --- outputs --------------------------------------------------------------------------------------------------------


def _returns(spec: _pytree.TreeSpec) -> Any:
    """The arrangement of the outputs; a class of the user's or of another package becomes `Outputs` where its parts have names, else a tuple."""
    if spec.is_leaf():
        return None
    children = [_returns(child) for child in spec.children()]
    if spec.type is list:
        return children
    if spec.type in _DICTS:
        keys = spec.context[1] if spec.type is defaultdict else spec.context
        if strange := [key for key in keys if not isinstance(key, str | int | float | bool | None)]:
            raise TypeError(
                f"the outputs have the key {strange[0]!r}: a file of weights names outputs by texts and numbers only"
            )
        return {"dict": list(zip(keys, children, strict=True))}
    names = spec.context
    named = isinstance(names, list | tuple) and len(names) == len(children) and all(isinstance(n, str) for n in names)
    if named:
        return {"named": list(zip(names, children, strict=True))}
    return {"tuple": children}


def _spec(returns: Any) -> _pytree.TreeSpec:
    if returns is None:
        return _pytree.treespec_leaf()
    if isinstance(returns, list):
        return _pytree.TreeSpec(list, None, [_spec(child) for child in returns])
    ((kind, parts),) = returns.items()
    if kind == "tuple":
        return _pytree.TreeSpec(tuple, None, [_spec(child) for child in parts])
    if kind not in ("dict", "named"):
        raise ValueError(f"no outputs are a {kind!r}")
    names, children = [name for name, _ in parts], [_spec(child) for _, child in parts]
    return _pytree.TreeSpec(dict if kind == "dict" else Outputs, names, children)
