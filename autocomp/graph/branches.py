"""Branches that can be left out whole: what reads them goes on with a constant in their place.

A group that loses all its units leaves the layers that read it with nothing but a bias. Where that bias meets the data again in a sum
or a product (a residual branch, a gate), and there is a way around it, the layers themselves and all that was computed for them alone
can go: a block of a ResNet, a feed-forward or attention branch, a module of a Conformer, the gate of a squeeze-and-excite.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocomp.graph.graph import Branch, Group, Layer
from autocomp.graph.labels import operation, where
from autocomp.graph.program import CanonicalModel, Size, observe, on_graph, tensor_at, tensors_of
from autocomp.layers.convolution import Layers, outputs_first
from autocomp.layers.narrow import with_weights

MEETS = {"add", "sub", "rsub", "mul"}  # where a constant of size 1 along some axes does what the whole branch did
SAME = 1e-5  # of the largest value: what differs by less along an axis is the same for all of it


@dataclass(frozen=True)
class _Cut:
    """What becomes of a graph's nodes when some layers no longer read anything."""

    constant: frozenset[fx.Node]  # what depends on those layers' biases and on weights alone
    alive: frozenset[fx.Node]  # what the outputs are still computed from, constants included

    @cached_property
    def meeting(self) -> set[fx.Node]:
        """The constants that are read beside data."""
        return {n for node in self.alive - self.constant for n in node.all_input_nodes if n in self.constant}


def find_branches(
    model: CanonicalModel, inputs: Sequence[Tensor], layers: Mapping[str, Layer], groups: Mapping[str, Group]
) -> tuple[dict[str, Branch], dict[str, str]]:
    """Return the branches that can be left out, by the group that they end in, and of other groups why not.

    Any of them can be left out beside any others: where each of two is the way around the other, the first is found. ``model`` is one that
    ``observe`` has seen with the ``inputs``. Those found are tried: left out all at once, the model must say what it says when the layers
    that read them are given weights of 0; with inputs of half a size too, where it takes such.
    """
    found: dict[str, Branch] = {}
    refused: dict[str, str] = {}
    for group in groups.values():
        branch = _branch(model, layers, groups, group)
        if isinstance(branch, str):
            refused[group.name] = branch
        elif why := _hindrance(model, layers, [end for other in (*found.values(), branch) for end in other.ends]):
            refused[group.name] = f"with the branches before it left out too: {why}"
        else:
            found[group.name] = branch
    if found and not _works(model, inputs, [end for branch in found.values() for end in branch.ends]):
        for name, branch in list(found.items()):
            if not _works(model, inputs, branch.ends):
                refused[name] = "left out, the model says something else than without its weights"
                del found[name]
    return found, refused


def bypassed(model: CanonicalModel, constants: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> CanonicalModel:
    """Return the model in which some layers give a constant [channels] whatever they read, without all that is then not needed.

    Modules and tensors are ``model``'s own. ``inputs`` are such that the model can be called with, of any values.
    """
    old = model.code.graph
    assert old is not None
    if any("val" not in node.meta for node in old.nodes if node.op != "output"):
        observe(model, inputs)
    cut = _cut(old, constants)
    values = _values(model, old, cut, constants)
    new = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    tensors: dict[str, Tensor] = {}
    for node in old.nodes:
        if node in cut.constant:
            if node in cut.meeting:
                name = f"instead.{node.name}"
                tensors[name] = nn.Parameter(_collapsed(values[node]), requires_grad=True)
                known[node] = new.get_attr(name)
                known[node].meta["val"] = torch.empty_like(tensors[name], device="meta")
        elif node in cut.alive or node.op in ("placeholder", "output"):
            known[node] = new.node_copy(node, lambda n: known[n])
            if node.args and node.args[0] in cut.constant:  # a constant is not written into
                known[node].target = _not_in_place(node.target)
    return on_graph(model, new, tensors)


def _branch(
    model: CanonicalModel, layers: Mapping[str, Layer], groups: Mapping[str, Group], group: Group
) -> Branch | str:
    graph = model.code.graph
    assert graph is not None
    if not group.consumers:
        return "no layer reads its channels"
    kept = [name for name in group.consumers if min(group.columns[name]) < 0 or layers[name].loop]
    if kept:
        return f"{kept[0]} reads other channels too"
    if why := _hindrance(model, layers, group.consumers):
        return why
    cut = _cut(graph, group.consumers)
    ends = {node for node in graph.nodes if node.op == "call_module" and str(node.target) in group.consumers}
    called = {str(node.target) for node in graph.nodes if node.op == "call_module" and node not in ends}
    needed = {str(node.target) for node in cut.alive - cut.constant if node.op == "call_module"}
    # a loop's recurrent weight is a module inside the one that is called
    gone = tuple(n for n in layers if n not in group.consumers and _caller(n, called) not in needed)
    if any(name not in gone for name in group.producers):
        return "what makes its channels is needed elsewhere"
    own = [name for name, other in groups.items() if name != group.name and set(other.producers) <= set(gone)]
    return Branch(tuple(group.consumers), gone, (group.name, *own))


def _hindrance(model: CanonicalModel, layers: Mapping[str, Layer], names: Iterable[str]) -> str:
    """Why the layers of these names cannot all give constants; empty if they can, and then any of them can."""
    graph = model.code.graph
    assert graph is not None
    cut = _cut(graph, names)
    ends = {node for node in graph.nodes if node.op == "call_module" and str(node.target) in set(names)}
    outputs = next(node for node in graph.nodes if node.op == "output").all_input_nodes
    if any(_inputs(node, frozenset()) != _inputs(node, ends) for node in outputs):
        return "there is no way around it"
    for node in graph.nodes:
        reads = node.op not in ("placeholder", "output") and node not in cut.constant
        if reads and any(n in cut.constant for n in node.all_input_nodes) and not _takes_constants(node, cut):
            return f"what it gives goes through {where(node)}, which takes no constant"
    inside = {str(node.target) for node in cut.constant - ends if node.op == "call_module"}
    if after := [name for name in layers if name in inside]:
        return f"{after[0]} would have nothing but a constant to read"
    return ""


def _takes_constants(node: fx.Node, cut: _Cut) -> bool:
    """Whether a constant does where a tensor of the whole size was: in a sum or product with data of the result's size."""
    data = [n.meta["val"].shape for n in node.all_input_nodes if n not in cut.constant and _is_tensor(n)]
    return operation(node).removesuffix("_") in MEETS and node.meta["val"].shape in data


def _caller(layer: str, called: set[str]) -> str:
    return layer if layer in called else layer.rpartition(".")[0]


def _cut(graph: fx.Graph, ends: Iterable[str]) -> _Cut:
    names = set(ends)
    constant: set[fx.Node] = set()
    given: set[fx.Node] = set()  # weights, numbers, and what is made of them alone
    for node in graph.nodes:
        if node.op == "call_module" and str(node.target) in names:
            constant.add(node)
        elif node.op == "get_attr" or (node.op != "placeholder" and not _is_tensor(node)):
            given.add(node)
        elif node.op in ("call_function", "call_module"):
            sources = [n for n in node.all_input_nodes if _is_tensor(n)]
            if all(n in given for n in sources):
                given.add(node)
            elif all(n in constant or n in given for n in sources):
                constant.add(node)
    alive: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node not in alive:
            alive.add(node)
            waiting += [] if node in constant else node.all_input_nodes
    return _Cut(frozenset(constant), frozenset(alive))


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a tensor, or several."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value))


def _inputs(output: fx.Node, ends: Iterable[fx.Node]) -> set[fx.Node]:
    """The model's inputs that an output is computed from, other than through ``ends``."""
    seen, waiting, stop = set(), [output], set(ends)
    while waiting:
        node = waiting.pop()
        if node not in seen and node not in stop:
            seen.add(node)
            waiting += node.all_input_nodes
    return {node for node in seen if node.op == "placeholder"}


def _values(
    model: CanonicalModel, graph: fx.Graph, cut: _Cut, constants: Mapping[str, Tensor]
) -> dict[fx.Node, Tensor]:
    """What the constant nodes come to, of the shapes that the graph was observed with."""
    values: dict[fx.Node, Any] = {}

    def read(leaf: Any) -> Any:
        if isinstance(leaf, Size):
            return model.sizes[leaf.name]
        return value_of(leaf) if isinstance(leaf, fx.Node) else leaf

    def value_of(node: fx.Node) -> Any:
        if node not in values:
            name = str(node.target)
            if node.op == "call_module" and name in constants:
                channels = constants[name].detach()
                shape = list(node.meta["val"].shape)
                axis = len(shape) - 1 if _is_linear(model, name) else 1
                shape[axis] = len(channels)
                values[node] = channels.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
            elif not _is_tensor(node) and node.op != "get_attr":
                values[node] = node.meta["val"]
            elif node.op == "get_attr":
                values[node] = tensor_at(model, name)
            else:
                args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), read)
                called = model.get_submodule(name) if node.op == "call_module" else node.target
                values[node] = called(*args, **kwargs)  # type: ignore[operator]
        return values[node]

    with torch.no_grad():
        return {node: value_of(node) for node in graph.nodes if node in cut.constant and node in cut.alive}


def _not_in_place(target: Any) -> Any:
    name, _, overload = str(target).removeprefix("aten.").partition(".")
    return getattr(getattr(torch.ops.aten, name.removesuffix("_")), overload) if name.endswith("_") else target


def _is_linear(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Linear)


def _collapsed(value: Tensor) -> Tensor:
    """The tensor with size 1 along the axes along which nothing changes."""
    limit = SAME * float(value.abs().max()) if value.numel() else 0.0
    for axis in range(value.dim()):
        first = value.narrow(axis, 0, 1)
        if value.shape[axis] > 1 and bool(((value - first).abs() <= limit).all()):
            value = first
    return value.clone()


def _works(model: CanonicalModel, inputs: Sequence[Tensor], ends: Iterable[str]) -> bool:
    """Whether the model with those layers bypassed says what it says with weights of 0 and those constants as their biases, at every size."""
    generator = torch.Generator().manual_seed(0)
    blind = copy.deepcopy(model)
    constants = {}
    for name in dict.fromkeys(ends):
        module = model.get_submodule(name)
        assert isinstance(module, Layers)
        weight = torch.zeros_like(outputs_first(module))
        constants[name] = torch.randn(len(weight), generator=generator)
        blind.set_submodule(name, with_weights(module, weight, constants[name]))
    with torch.no_grad():
        try:
            small = bypassed(model, constants, inputs)
        except Exception:  # whatever an operation says to a constant: the branch stays
            return False
        return _same(blind, small, inputs) and all(_same(blind, small, half, True) for half in _halved(inputs))


def _same(model: nn.Module, small: nn.Module, inputs: Sequence[Tensor], untaken: bool = False) -> bool:
    """Whether two models say the same; ``untaken`` where the first does not take inputs of these sizes."""
    try:
        expected = tensors_of(model(*(t.clone() for t in inputs)))
    except Exception:
        return untaken
    try:
        found = tensors_of(small(*(t.clone() for t in inputs)))
    except Exception:
        return False
    pairs = zip(expected, found, strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True) for a, b in pairs)


def _halved(inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The inputs with half of a size, for each size that they have: what a branch gives must not depend on lengths."""
    for size in sorted({size for tensor in inputs for size in tensor.shape if size > 1}):
        half = list(inputs)
        for at, tensor in enumerate(inputs):
            for axis in (axis for axis, own in enumerate(tensor.shape) if own == size):
                half[at] = half[at].narrow(axis, 0, size // 2)
        yield half
