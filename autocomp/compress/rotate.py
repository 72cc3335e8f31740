"""Residual streams turned to their principal directions, so that the channels that go are those that hardly vary.

Between linear layers a stream under norms of root mean squares may be turned by any orthogonal matrix: what writes into it is multiplied by
it, what reads it by its inverse, and no norm notices (SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024; here one matrix for the whole stream,
so that residual additions stay as they are). A LayerNorm is such a norm once what writes into the stream is centred. Factors and shifts of the
norms go into what reads them. The model computes what it did.

The sum of squares is divided by the width that the stream had, whatever is left of it: of a turned stream nearly all of the sum is left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from autocomp.graph.batches import split
from autocomp.graph.labels import MOVES, SAME, argument, operation
from autocomp.graph.program import CanonicalModel, on_graph, tensor_at, tensors_of
from autocomp.graph.removal import Changes
from autocomp.layers.convolution import Layers, outputs_first
from autocomp.layers.hooks import hooked
from autocomp.layers.narrow import with_weights

if TYPE_CHECKING:
    from autocomp.graph.batches import Axes, Batch
    from autocomp.graph.graph import Graph, Group

aten = torch.ops.aten
NEAR = 1e-4  # of the largest output: what rounding may change


class _NoStream(Exception):
    """A group is no stream that can be turned; the message says why."""


@dataclass(frozen=True)
class _Norm:
    """A norm of ``source`` over its last axis that gives ``result``; ``inside`` are the nodes it is written with."""

    source: fx.Node
    result: fx.Node
    epsilon: float
    centres: bool
    factor: str | None = None
    shift: str | None = None
    inside: tuple[fx.Node, ...] = ()


@dataclass
class _Stream:
    """Values of the stream, what writes them (layers, tables by path and axis), its norms, and which norm each layer reads."""

    norms: Sequence[_Norm]
    values: set[fx.Node] = field(default_factory=set)
    makers: set[str] = field(default_factory=set)
    tables: dict[str, int] = field(default_factory=dict)
    readers: dict[str, _Norm] = field(default_factory=dict)


def rotated(
    model: nn.Module,
    graph: Graph,
    example_inputs: tuple[Tensor, ...],
    batches: Iterable[Batch],
    axes: Axes | None = None,
) -> tuple[nn.Module, dict[str, str]]:
    """Return ``model`` with every stream turned that can be, and of each approximate group why it was not (empty: it was).

    The directions are those of the ``batches``, whose samples lie along ``axes``. A model in canonical form that is changed is a new one.
    """
    said: dict[str, str] = {}
    batches = list(batches)
    for group in graph.groups.values():
        if not group.approximate or not group.prunable:
            continue
        try:
            assert isinstance(model, CanonicalModel)
            made = _turned(model, group, batches, axes)
            with torch.no_grad():
                pairs = zip(tensors_of(made(*example_inputs)), tensors_of(model(*example_inputs)), strict=True)
                if any((a - b).abs().max() > NEAR * b.abs().max() for a, b in pairs):
                    raise _NoStream("the turned model computes something else")
        except _NoStream as error:
            said[group.name] = str(error)
        else:
            model, said[group.name] = made, ""
    return model, said


def _turned(model: CanonicalModel, group: Group, batches: Sequence[Batch], axes: Axes | None) -> CanonicalModel:
    if model.code.graph is None:
        raise _NoStream("the model has no graph any more")
    width = group.width
    for units in (*group.rows.values(), *group.columns.values(), *(slab.units for slab in group.slabs)):
        if tuple(units) != tuple(range(width)):
            raise _NoStream("its channels do not stand in one order")
    stream = _follow(model.code.graph, group)
    plain = _with_plain_norms(model, stream, width)
    with torch.no_grad():
        turn = _directions(plain, stream, batches, axes, width)
        if stream.norms[0].centres:
            turn = turn - turn.mean(0)  # (1 - 11^T / d) Q
        _write(plain, stream, turn)
    return plain


# --- the stream in the graph --------------------------------------------------------------------------------------------


def _follow(graph: fx.Graph, group: Group) -> _Stream:
    own = {slab.path for slab in group.slabs}
    stream = _Stream([norm for node in graph.nodes if (norm := _norm(node, own)) is not None])
    # Other streams' norms have other parameters; those without any belong where their source does.
    if not stream.norms:
        raise _NoStream("it has no norm of its last axis")
    axes = {slab.path: slab.axis for slab in group.slabs}
    for norm in stream.norms:
        _back(norm.source, group, axes, stream)
    inside = {node for norm in stream.norms for node in norm.inside}
    written = stream.makers | set(stream.tables) | {path.removesuffix(".weight") for path in stream.tables}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and str(node.target) in written and node not in stream.values:
            raise _NoStream(f"what {node.target} makes is read elsewhere too")
    for value in stream.values:
        for user in value.users:
            if user not in stream.values and user not in inside:
                raise _NoStream(f"it is also read by {user.name}")
    for norm in stream.norms:
        _forth(norm.result, norm, group, stream)
    parameters = {path for norm in stream.norms for path in (norm.factor, norm.shift) if path is not None}
    if stream.makers != set(group.producers) or set(stream.readers) != set(group.consumers):
        raise _NoStream("other layers write or read it")
    if own != parameters | set(stream.tables):
        raise _NoStream("other parameters lie along it")
    if len({norm.centres for norm in stream.norms}) > 1:
        raise _NoStream("it has norms of two kinds")
    return stream


def _norm(node: fx.Node, own: set[str]) -> _Norm | None:
    """The norm that begins at a node: one operation, or the root of a mean square written out."""
    name = str(node.target)
    if name in ("aten.layer_norm.default", "aten.rms_norm.default") and len(argument(node, 1, "normalized_shape")) == 1:
        centres = "layer" in name
        factor, shift = argument(node, 2, "weight"), argument(node, 3, "bias") if centres else None
        paths = [str(p.target) if isinstance(p, fx.Node) else None for p in (factor, shift)]
        known = paths[0] is not None and all(path is None or path in own for path in paths)
        source, default = node.args[0], 1e-5 if centres else torch.finfo(torch.float32).eps
        epsilon = argument(node, 4 if centres else 3, "eps", None)
        assert isinstance(source, fx.Node)
        if not known:
            return None
        return _Norm(source, node, default if epsilon is None else float(epsilon), centres, paths[0], paths[1], (node,))
    if name != "aten.rsqrt.default":
        return None
    added = node.args[0]
    mean = added.args[0] if _is(added, "add") and isinstance(added.args[1], float) else None  # type: ignore[union-attr]
    square = mean.args[0] if _is(mean, "mean") and list(mean.args[1]) == [-1] and mean.args[2:] == (True,) else None  # type: ignore[union-attr, arg-type]
    source = square.args[0] if _is(square, "pow") and square.args[1] == 2 else None  # type: ignore[union-attr]
    product = next(iter(node.users))
    if source is None or not _is(product, "mul") or source not in product.args or len(node.users) > 1:
        return None
    scaled = next(iter(product.users))
    factor = next((p for p in scaled.all_input_nodes if p.op == "get_attr" and str(p.target) in own), None)
    if not _is(scaled, "mul") or factor is None or len(product.users) > 1:
        return None
    inside = (square, mean, added, node, product, scaled)
    return _Norm(source, scaled, float(added.args[1]), False, str(factor.target), None, inside)  # type: ignore[union-attr, arg-type]


def _is(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and operation(node) == name


def _back(node: fx.Node, group: Group, axes: Mapping[str, int], stream: _Stream) -> None:
    """Collect what a value of the stream is the sum of."""
    if node in stream.values:
        return
    if node.op == "get_attr" and str(node.target) in axes:
        stream.tables[str(node.target)] = axes[str(node.target)]
        stream.values.add(node)
        return
    stream.values.add(node)
    if node.op == "call_module":
        if str(node.target) in group.producers:
            stream.makers.add(str(node.target))
        elif f"{node.target}.weight" in axes:
            stream.tables[f"{node.target}.weight"] = axes[f"{node.target}.weight"]
        else:
            raise _NoStream(f"{node.target} is no layer of the group")
    elif _is(node, "add") and len(node.all_input_nodes) == len(node.args) == 2 and not node.kwargs:
        for source in node.all_input_nodes:
            _back(source, group, axes, stream)
    elif _is(node, "cat") or operation(node) in MOVES | SAME:
        for source in node.all_input_nodes if _is(node, "cat") else node.all_input_nodes[:1]:
            _back(source, group, axes, stream)
    else:
        raise _NoStream(f"it goes through {node.target}")


def _forth(node: fx.Node, norm: _Norm, group: Group, stream: _Stream) -> None:
    """Find the layers that read a norm's result, which only moves on the way."""
    for user in node.users:
        if user.op == "call_module" and str(user.target) in group.consumers:
            if stream.readers.setdefault(str(user.target), norm) is not norm:
                raise _NoStream(f"{user.target} reads two norms")
        elif operation(user) in MOVES | SAME and user.op == "call_function" and user.args[0] is node:
            _forth(user, norm, group, stream)
        else:
            raise _NoStream(f"{user.name} reads its norm")


# --- the model without the norms' parameters, and turned ------------------------------------------------------------------


def _with_plain_norms(model: CanonicalModel, stream: _Stream, width: int) -> CanonicalModel:
    """A copy whose norms divide by the root of the mean square alone; factors and shifts have gone into what reads them.

    A LayerNorm is only itself again when the stream is centred.
    """
    old = model.code.graph
    assert old is not None
    results = {norm.result: norm for norm in stream.norms}
    inside = {node for norm in stream.norms for node in norm.inside}
    new = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in old.nodes:
        if node in results:
            norm = results[node]
            known[node] = _root_mean_square(new, known[norm.source], norm.epsilon, width)
        elif node not in inside:
            known[node] = new.node_copy(node, lambda n: known[n])
    new.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    plain = on_graph(copy.deepcopy(model), new)
    for name, norm in stream.readers.items():
        layer = plain.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach().double()
        bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.detach().double()
        bias = bias if norm.shift is None else bias + weight @ tensor_at(model, norm.shift).double()
        weight = weight if norm.factor is None else weight * tensor_at(model, norm.factor).double()
        plain.set_submodule(name, with_weights(layer, weight.float(), bias.float() if bias.any() else None))
    return plain


def _root_mean_square(graph: fx.Graph, x: fx.Node, epsilon: float, width: int) -> fx.Node:
    call: Callable[..., fx.Node] = graph.call_function
    total = call(aten.sum.dim_IntList, (call(aten.pow.Tensor_Scalar, (x, 2)), [-1], True))
    mean = call(aten.mul.Tensor, (total, 1 / width))
    return call(aten.mul.Tensor, (x, call(aten.rsqrt.default, (call(aten.add.Tensor, (mean, epsilon)),))))


def _directions(
    model: CanonicalModel, stream: _Stream, batches: Sequence[Batch], axes: Axes | None, width: int
) -> Tensor:
    """Columns are the directions of the normalised stream, those it varies most along first; all its norms count alike."""
    total = torch.zeros(width, width, dtype=torch.float64)
    one_each = {id(norm): name for name, norm in stream.readers.items()}
    centre = torch.eye(width) - (1 / width if stream.norms[0].centres else 0)

    def see(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = arguments[0].flatten(0, -2).double()
        total.add_(rows.T @ rows / len(rows))

    writers = _written(model, stream, centre.double())
    before = Changes(
        {n: model.get_submodule(n) for n in writers.modules}, {p: tensor_at(model, p) for p in writers.tensors}, {}
    )
    writers.apply(model)
    try:
        with hooked(model.get_submodule(name).register_forward_pre_hook(see) for name in one_each.values()):
            for batch in batches:
                for piece in split(batch, 64, axes):
                    model(*piece)
    finally:
        before.apply(model)
    result: Tensor = torch.linalg.eigh(total)[1].flip(1)
    return result


def _written(model: CanonicalModel, stream: _Stream, turn: Tensor) -> Changes:
    """What writes into the stream, its channels multiplied by ``turn`` [old, new]."""
    modules: dict[str, nn.Module] = {}
    for name in stream.makers:
        module = model.get_submodule(name)
        assert isinstance(module, Layers)
        weight = outputs_first(module).detach().double()
        weight = (turn.T @ weight.flatten(1)).view(weight.shape).float()
        modules[name] = with_weights(
            module, weight, None if module.bias is None else (module.bias.detach().double() @ turn).float()
        )
    tensors = {}
    for path, axis in stream.tables.items():
        old = tensor_at(model, path)
        new = (old.detach().double().movedim(axis, -1) @ turn).movedim(-1, axis).float().contiguous()
        tensors[path] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
    return Changes(modules, tensors, {})


def _write(model: CanonicalModel, stream: _Stream, turn: Tensor) -> None:
    """Turn what writes and what reads, in place."""
    changes = _written(model, stream, turn)
    modules = dict(changes.modules)
    for name in stream.readers:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        # A centred stream has no part along the ones, so the centring of what reads changes nothing.
        modules[name] = with_weights(layer, (layer.weight.detach().double() @ turn).float(), layer.bias)
    replace(changes, modules=modules).apply(model)
