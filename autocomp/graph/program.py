"""The canonical form of a model: plain layers of torch.nn, and one generated function that calls them.

Whatever a user's model is written like, `canonical` brings it to a `CanonicalModel`: convolutions, linear layers, embeddings and
BatchNorms with constant weights are plain modules of torch.nn at dotted names, everything else is a call of an aten operation in a
generated ``forward``. It holds no code of the user's: it can be copied, pickled, exported and narrowed. Sizes that are written into
operations (of reshapes, splits, slices) stand in ``sizes`` by name, so that they follow when channels are removed.
"""

from __future__ import annotations

import operator
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from autocomp.errors import UsageError

_SIZES = "sizes"
# What a generated source may name.
_KNOWN: dict[str, Any] = {
    "torch": torch,
    "inf": float("inf"),
    "nan": float("nan"),
    "NoneType": type(None),
    "device": torch.device,
    "operator": operator,
}


class Size(int):
    """A number in an operation of a canonical graph that may follow a number of channels; written as ``sizes['name']``."""

    name: str

    def __new__(cls, value: int, name: str) -> Size:
        made = super().__new__(cls, value)
        made.name = name
        return made

    def __repr__(self) -> str:
        return f"{_SIZES}[{self.name!r}]"

    def __str__(self) -> str:
        return repr(self)

    def __reduce__(self) -> Any:
        return Size, (int(self), self.name)


class Batch(NamedTuple):
    """The batch axis of each input and output tensor of a model; None where there is none. ``fixed`` is the only batch
    size that its operations take, 0 for any."""

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    fixed: int = 0


class Held(NamedTuple):
    """What the tensors of a model take: bytes, each memory once however many of them lie in it, and numbers in parameters."""

    bytes: int
    parameters: int

    @classmethod
    def of(cls, model: nn.Module) -> Held:
        memories = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*model.parameters(), *model.buffers())
        }
        return cls(sum(memories.values()), sum(parameter.numel() for parameter in model.parameters()))


@dataclass(frozen=True)
class Code:
    """What the copies of a canonical model share: its graph and the function made of it. Never changed, never copied.

    ``parameters`` are the names of the inputs, ``returns`` the structure of the outputs, ``norms`` maps layer to the BatchNorm
    that alone reads it. ``graph`` is None in a model that was read from a file, as is ``held``, what the model that it was made of holds.
    """

    source: str
    parameters: tuple[str, ...]
    returns: _pytree.TreeSpec
    norms: Mapping[str, str]
    batch: Batch
    graph: fx.Graph | None = field(default=None, compare=False)
    origins: Mapping[str, str] = field(default_factory=dict)  # of a layer: the line of the user's model it comes from
    held: Held | None = field(default=None, compare=False)
    run: Callable[..., Sequence[Any]] = field(default=None, compare=False)  # type: ignore[assignment] # made of `source`

    def __post_init__(self) -> None:
        if self.run is None:
            object.__setattr__(self, "run", compiled(self.source))

    def __deepcopy__(self, _memo: Any) -> Code:
        return self

    def __reduce__(self) -> Any:
        returns = _plain(self.returns)
        try:
            pickle.loads(pickle.dumps(returns))
        except Exception:  # a class of outputs that cannot be named from elsewhere: they become a tuple
            returns = tuple, None, [None] * self.returns.num_leaves
        return _read, (self.source, self.parameters, returns, dict(self.norms), self.batch, dict(self.origins))


def _plain(spec: _pytree.TreeSpec) -> Any:
    return None if spec.is_leaf() else (spec.type, spec.context, [_plain(child) for child in spec.children()])


def _spec(plain: Any) -> _pytree.TreeSpec:
    if plain is None:
        return _pytree.treespec_leaf()
    kind, context, children = plain
    return _pytree.TreeSpec(kind, context, [_spec(child) for child in children])


def _read(
    source: str, parameters: tuple[str, ...], returns: Any, norms: Mapping[str, str], batch: Batch, origins: Any
) -> Code:
    return Code(source, parameters, _spec(returns), norms, batch, None, origins)


def compiled(source: str) -> Callable[..., Sequence[Any]]:
    """Make the function that ``source`` defines: ``forward(self, *inputs)``, which returns the outputs in a row."""
    names = dict(_KNOWN)
    exec(compile(source, "<canonical model>", "exec"), names)  # made by `canonical` from a graph of operations
    function: Callable[..., Sequence[Any]] = names["forward"]
    return function


class CanonicalModel(nn.Module):
    """A model in canonical form. Called as the model it was made of, with its tensors in order or by name.

    ``sizes`` are the numbers in its operations that follow its channels.
    """

    def __init__(
        self, code: Code, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], sizes: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.code = code
        self.sizes = dict(sizes)
        for name, module in modules.items():
            _holder(self, name).add_module(name.rpartition(".")[2], module)
        for name, tensor in tensors.items():
            holder, last = _holder(self, name), name.rpartition(".")[2]
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(last, tensor)
            else:
                holder.register_buffer(last, tensor)
        self.eval()

    def forward(self, *inputs: Tensor, **named: Any) -> Any:
        inputs = self._in_order(inputs, named)
        batch, run = self.code.batch, partial(self.code.run, self)
        outputs = in_pieces(run, batch.fixed, inputs, batch) if batch.fixed else run(*inputs)
        return _pytree.tree_unflatten(list(outputs), self.code.returns)

    def _in_order(self, inputs: tuple[Tensor, ...], named: Mapping[str, Any]) -> tuple[Tensor, ...]:
        names = self.code.parameters
        given = dict(zip(names, inputs, strict=False)) | {k: v for k, v in named.items() if v is not None}
        unknown = [name for name in given if name not in names]
        missing = [name for name in names if name not in given]
        if len(inputs) > len(names) or missing or unknown:
            raise UsageError(
                f"the model takes the inputs {', '.join(names)}, as Task.example_inputs gives them; it was called with "
                f"{len(inputs)} in order and {', '.join(named) or 'none'} by name"
            )
        return tuple(given[name] for name in names)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"the model has no {name!r}: what autocomp compresses is the exported model, which can be called and holds "
                "layers and weights, but none of the methods and settings of the class that it was written as"
            ) from None


def observe(model: CanonicalModel, inputs: Sequence[Tensor]) -> fx.Graph:
    """Run a model once and note at each node of its graph what came out: ``meta["val"]``, tensors without their data, or a number."""
    graph = model.code.graph
    assert graph is not None
    waiting = iter(inputs)
    values: dict[fx.Node, Any] = {}
    readers = {node: len(node.users) for node in graph.nodes}
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "output":
                break
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                value: Any = next(waiting).clone()
            elif node.op == "get_attr":
                value = tensor_at(model, str(node.target))
            elif node.op == "call_module":
                value = model.get_submodule(str(node.target))(*args, **kwargs)
            else:
                value = node.target(*args, **kwargs)
            node.meta["val"] = _pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), value)
            values[node] = value
            for source in node.all_input_nodes:
                readers[source] -= 1
                if not readers[source]:
                    values.pop(source, None)
    return graph


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """The parameter or buffer of that name."""
    owner, _, name = path.rpartition(".")
    found = getattr(model.get_submodule(owner), name)
    assert isinstance(found, Tensor)
    return found


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a model's output in a row, as floats."""
    return [leaf.float() for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def on_graph(model: CanonicalModel, graph: fx.Graph, more: Mapping[str, Tensor] | None = None) -> CanonicalModel:
    """The model that another graph makes of the parts of ``model`` that it names, the same ones, and of ``more`` tensors."""
    tensors = dict(more or {})
    used = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    modules = {}
    for name in sorted(used - set(tensors)):
        try:
            modules[name] = model.get_submodule(name)
        except AttributeError:
            tensors[name] = tensor_at(model, name)
    norms = {layer: norm for layer, norm in model.code.norms.items() if layer in used and norm in used}
    code = replace(model.code, source=source_of(graph), graph=graph, norms=norms, run=None)  # type: ignore[arg-type] # made of the source
    return CanonicalModel(code, modules, tensors, model.sizes)


def _holder(model: nn.Module, path: str) -> nn.Module:
    """The module that something of this dotted name belongs into; plain containers are made on the way."""
    for name in path.split(".")[:-1]:
        child = model._modules.get(name)
        if child is None:
            child = nn.Module()
            model.add_module(name, child)
        model = child
    return model


def in_pieces(run: Callable[..., Sequence[Any]], size: int, inputs: Sequence[Tensor], batch: Batch) -> Sequence[Any]:
    """The outputs, in a row, of what takes batches of ``size`` samples alone on one of any: piece by piece, the last one filled up."""
    samples = next((t.shape[a] for t, a in zip(inputs, batch.inputs, strict=True) if a is not None), size)
    if samples == size:
        return run(*inputs)
    found = []
    for start in range(0, samples, size):
        index = (torch.arange(size) + start).clamp(max=samples - 1)
        found.append(
            run(*(t if a is None else t.index_select(a, index) for t, a in zip(inputs, batch.inputs, strict=True)))
        )
    joined = []
    for values, axis in zip(zip(*found, strict=True), batch.outputs, strict=True):
        if axis is None or not isinstance(values[0], Tensor):
            joined.append(values[0])
        else:
            joined.append(torch.cat(list(values), axis).narrow(axis, 0, samples))
    return joined


def source_of(graph: fx.Graph) -> str:
    """The Python source of a canonical graph, as `compiled` takes it."""
    code = graph.python_code("self")
    body = code.src.replace("def forward(self", "def forward(self", 1)
    # What fx would put into the function's globals is spelt out, so that the source stands alone.
    lines = [
        f"import {value.__name__} as {name}" if isinstance(value, type(sys)) else f"{name} = {_spelt(name, value)}"
        for name, value in code.globals.items()
        if name not in (*_KNOWN, "fx_pytree", "pytree")
    ]
    head, colon, rest = body.partition(":\n")
    first = rest[: len(rest) - len(rest.lstrip(" "))]
    return "\n".join([*lines, f"{head}{colon}{first}{_SIZES} = self.{_SIZES}\n{rest}"])


def _spelt(name: str, value: Any) -> str:
    module, own = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if module in ("_operator", "operator"):
        return f"operator.{own}"
    if isinstance(value, torch.device | torch.dtype):
        return repr(value)
    if module and own and "<" not in own:
        return f"__import__({module!r}, fromlist=['']).{own}"
    raise UsageError(f"the model's graph holds {name} = {value!r}, which cannot be written down")
