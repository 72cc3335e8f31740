"""Which channels of a model must go together: followed through the exported graph, element by element.

Every output channel of a layer is an *atom*, a number from 1. A tensor's *label* says which atom each of its elements
belongs to; it has size 1 along the axes it does not depend on. Reshapes, slices and permutations are carried out on the
labels themselves, so heads, halves and offsets come out right by construction; arithmetic links the atoms that meet;
whatever mixes channels (a norm over them, the model's output, an operation without a rule) freezes them with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from autocomp.graph.program import CanonicalModel
from autocomp.graph.sizes import places, size_at

LARGEST_RAW = 1 << 18  # elements of a bare parameter at most that get atoms of their own; larger ones keep their shape

POINTWISE = {"hardswish", "prelu", "masked_fill", "where", "rsub", "hardshrink", "rrelu", "selu", "celu", "add", "mul"}
SAME = {"dropout", "alpha_dropout", "feature_dropout", "contiguous", "clone", "detach", "alias", "to", "_to_copy"}
SAME |= {"type_as", "lift_fresh_copy", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "float"}
MOVES = {
    "permute", "transpose", "t", "select", "slice", "chunk", "split", "split_with_sizes", "unbind", "expand", "repeat", "repeat_interleave",
    "roll", "flip", "squeeze", "unsqueeze", "view", "reshape", "flatten", "narrow", "unflatten", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "unfold", "movedim", "numpy_T", "tensor_split", "expand_as", "reshape_as", "view_as", "_unsafe_view", "ravel",
    "unsafe_chunk", "unsafe_split", "tile", "broadcast_to", "atleast_1d", "atleast_2d", "atleast_3d", "rot90", "diagonal",
}  # fmt: skip
CREATE = {"zeros", "ones", "full", "arange", "empty", "eye", "scalar_tensor", "linspace", "rand", "randn", "new_zeros"}
REDUCE = {"mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "max", "min", "prod"}
# Those of another number of channels still say how large they are: taken over those that are left, where they scale these very channels.
RELATIVE = {"mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm"}
AXIS = {"softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "argmax", "argmin", "sort", "topk"}
SPATIAL = {
    "max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3, "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "lp_pool1d": 1, "lp_pool2d": 2,
    "adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3, "adaptive_max_pool1d": 1, "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3, "upsample_nearest1d": 1, "upsample_nearest2d": 2, "upsample_nearest3d": 3, "upsample_linear1d": 1,
    "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3,
}  # fmt: skip


class Label(NamedTuple):
    """Atoms of a tensor's elements, size 1 along axes they do not depend on; 0 is what never goes.

    ``soft`` labels are of bare parameters: they tie channels only where they meet some.
    """

    atoms: Tensor
    soft: bool = False

    @property
    def empty(self) -> bool:
        return not bool(self.atoms.any())

    @property
    def axes(self) -> set[int]:
        """The axes the label depends on; an axis of size 1 of the tensor itself counts for nothing."""
        return {axis for axis, size in enumerate(self.atoms.shape) if size > 1}


Labels = Label | tuple[Label, ...]  # of an operation's result, or of its several results


Rule = Callable[["Tracer", fx.Node], Labels]  # what an operation does to the labels of what it reads


class Counted(NamedTuple):
    """A number in an operation and what it counts: a row of atoms for each element of the axis."""

    name: str
    value: int
    atoms: Tensor


class Product(NamedTuple):
    """A product of two activations (attention): ``batch`` matrices of m x k by k x n, of the atoms' units together."""

    atoms: Tensor
    batch: int
    m: int
    k: int
    n: int


@dataclass
class Ties:
    """What `trace` found. Component 0 is what never goes; ``frozen`` says of other components why they stay."""

    inputs: dict[str, Tensor] = field(default_factory=dict)  # atoms of a layer's input columns, then components
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of its output channels
    norms: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, list[Tensor]] = field(default_factory=dict)  # of the same shape as the parameter
    counted: list[Counted] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    frozen: dict[int, str] = field(default_factory=dict)
    approximate: dict[int, str] = field(default_factory=dict)  # what is computed over those that are left


class Reduction(NamedTuple):
    """A value made of all channels at once, and the channels that it meets later."""

    atoms: Tensor
    what: str
    meets: list[Tensor]


class Tracer:
    def __init__(
        self,
        model: CanonicalModel,
        layers: Mapping[str, Any],
        skipped: Mapping[str, str],
        rules: Mapping[str, Rule],
        modules: Mapping[type[nn.Module], Rule],
    ) -> None:
        self.rules, self.modules = rules, modules
        self.paths: dict[str, str] = {}  # of bare parameters and buffers, by node
        self.model, self.layers, self.skipped = model, layers, skipped
        self.count = 1
        self.links: list[Tensor] = []  # [2, n] each
        self.freezes: list[tuple[Tensor, str]] = []
        self.approximations: list[tuple[Tensor, str]] = []
        self.reductions: list[Reduction] = []
        self.made_of: dict[fx.Node, frozenset[int]] = {}  # the reductions that a node is computed from
        self.labels: dict[fx.Node, Labels] = {}
        self.ties = Ties()

    # --- atoms -------------------------------------------------------------------------------------------------------

    def fresh(self, *shape: int) -> Tensor:
        count = int(np.prod(shape))
        self.count += count
        return torch.arange(self.count - count, self.count).view(shape)

    def link(self, a: Tensor, b: Tensor, why: str) -> None:
        """Tie atoms that meet one by one; what meets the atom 0 is frozen."""
        a, b = torch.broadcast_tensors(a, b)
        pairs = torch.stack([a.flatten(), b.flatten()])
        fixed = (pairs == 0).any(0)
        if bool(fixed.any()):
            self.freeze(pairs[:, fixed], why)
        self.links.append(pairs[:, ~fixed])

    def freeze(self, atoms: Tensor, why: str) -> None:
        found = atoms.flatten().unique()
        found = found[found > 0]
        if len(found):
            self.freezes.append((found, why))

    def approximate(self, atoms: Tensor, what: str) -> None:
        """Without some of these atoms, ``what`` is computed over those that are left."""
        self.approximations.append((atoms.flatten().unique(), what))

    def label(self, node: Any) -> Label:
        """The label of a node; a bare parameter gets atoms when it is first asked for."""
        found = self.labels.get(node)
        if isinstance(found, Label):
            return found
        shape = shape_of(node)
        if isinstance(node, fx.Node) and node.name in self.paths and 1 < np.prod(shape) <= LARGEST_RAW:
            made = Label(self.fresh(*shape), soft=True)
            self.ties.parameters.setdefault(self.paths[node.name], []).append(made.atoms)
        else:
            made = Label(torch.zeros([1] * len(shape), dtype=torch.int64))
        if isinstance(node, fx.Node):
            self.labels[node] = made
        return made

    def unite(self, parts: Sequence[tuple[Label, Sequence[int]]], where: str) -> Label:
        """Tie the atoms of operands that broadcast against each other; each comes with its tensor's shape."""
        rank = max(len(shape) for _, shape in parts)
        aligned = [(_rank(label, rank), [1] * (rank - len(shape)) + list(shape)) for label, shape in parts]
        hard = [label for label, _ in aligned if not label.soft and label.axes and not label.empty]
        if not hard:
            return next((label for label, _ in aligned if not label.soft and not label.empty), nothing(rank))
        axes = set.union(*(label.axes for label in hard))
        result = min(hard, key=lambda label: label.atoms.numel())
        for label in hard:
            if result.axes - label.axes:  # such as rows against columns: no channel could go alone
                for other in hard:
                    self.freeze(other.atoms, f"channels of two kinds meet at {where}")
                return nothing(rank)
            if label is not result:
                self.link(result.atoms, label.atoms, f"its channels meet values of a fixed width at {where}")
        for label, shape in aligned:
            against = {axis for axis in axes if shape[axis] > 1}
            if (
                against and label.soft and min(axes) not in against
            ):  # a weight within every head, say: heads go whole, it stays
                for axis in against:
                    result = self.along(result, axis, where)
            elif against and not label.empty and (label.soft or not label.axes):
                self.link(result.atoms, label.atoms, where)
            elif against and label.empty and axes - against:  # such as rotary positions within every head
                for axis in against:
                    result = self.along(result, axis, where)
            elif against and label.empty:
                self.freeze(result.atoms, f"its channels meet values of a fixed width at {where}")
        return result

    def along(self, label: Label, axis: int, where: str) -> Label:
        """Tie the atoms along an axis, so that the label no longer depends on it."""
        if label.atoms.shape[axis] == 1:
            return label
        first = label.atoms.narrow(axis, 0, 1)
        self.link(first, label.atoms.narrow(axis, 1, label.atoms.shape[axis] - 1), where)
        return Label(first, label.soft)

    # --- operations --------------------------------------------------------------------------------------------------

    def see(self, node: fx.Node) -> None:
        if node.op == "output":
            for source in node.all_input_nodes:
                found = self.labels.get(source)
                for label in found if isinstance(found, tuple) and not isinstance(found, Label) else (found,):
                    if isinstance(label, Label):
                        self.freeze(label.atoms, "its channels are the model's output")
        elif node.op == "get_attr":
            self.paths[node.name] = str(node.target)
        elif node.op in ("call_function", "call_module"):
            self.labels[node] = self.call(node)
            self.follow_reductions(node)
            if node.op == "call_function":
                self.count_sizes(node)

    def call(self, node: fx.Node) -> Labels:
        if node.op == "call_module":
            return self.modules[type(self.model.get_submodule(str(node.target)))](self, node)
        if "getitem" in str(node.target) and not str(node.target).startswith("aten"):
            source, index = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(index, int)
            found = self.labels[source]
            return found if isinstance(found, Label) else found[index]
        name = operation(node)
        name = name.removesuffix("_") if not name.startswith("__") else name
        if name in self.rules:
            return self.rules[name](self, node)
        if name in SAME:
            return self.label(node.args[0])
        if name in MOVES:
            return self.move(node)
        if name in SPATIAL:
            return self.keep_axes(node, range(-SPATIAL[name], 0), "are pooled or resized over")
        if name in REDUCE:
            return self.reduce(node)
        if name in AXIS:
            return self.keep_axes(node, [int(argument(node, 1, "dim", -1))], f"are mixed by {name}")
        tags = getattr(node.target, "tags", ())
        if torch.Tag.pointwise in tags or name in POINTWISE:
            return self.unite([(self.label(n), _reach(n)) for n in node.all_input_nodes], where(node))
        if name not in CREATE:
            self.stop(node, f"its channels go through {name} ({where(node)}), which is not followed")
        return self.nothing(node)

    def stop(self, node: fx.Node, why: str) -> None:
        for source in node.all_input_nodes:
            found = self.labels.get(source, ())
            for label in (found,) if isinstance(found, Label) else found:
                self.freeze(label.atoms, why)

    def nothing(self, node: fx.Node) -> Labels:
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            return tuple(nothing(v.dim() if isinstance(v, Tensor) else 0) for v in value)
        return nothing(value.dim() if isinstance(value, Tensor) else 0)

    def keep_axes(self, node: fx.Node, axes: Iterable[int], why: str) -> Labels:
        """Pass the label on, unless it depends on one of the axes that are worked on."""
        label = self.label(node.args[0])
        rank = label.atoms.dim()
        worked_on = label.axes & {axis % rank for axis in axes if rank}
        if worked_on and not label.axes - worked_on:
            self.freeze(label.atoms, f"its channels {why} ({where(node)})")
            return self.nothing(node)
        for axis in worked_on:  # such as a norm within every head: heads go whole
            label = self.along(label, axis, where(node))
        return label if isinstance(node.meta.get("val"), Tensor) else tuple(label for _ in node.meta["val"])

    def reduce(self, node: fx.Node) -> Labels:
        label = self.label(node.args[0])
        rank = label.atoms.dim()
        given = argument(node, 2 if "norm" in str(node.target) else 1, "dim", None)
        axes = list(range(rank)) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
        if len(node.all_input_nodes) > 1 or not isinstance(node.meta.get("val"), Tensor):
            self.stop(node, f"its channels are compared at {where(node)}")
            return self.nothing(node)
        summed = label.axes & {axis % rank for axis in axes}
        if summed and not label.axes - summed:
            if operation(node) in RELATIVE and not label.soft:
                self.reductions.append(Reduction(label.atoms, where(node), []))
                self.made_of[node] = frozenset([len(self.reductions) - 1])
            else:
                self.freeze(label.atoms, f"its channels are summed up at {where(node)}")
            return self.nothing(node)
        for axis in summed:
            label = self.along(label, axis, where(node))
        if node.meta["val"].dim() == rank:
            return label
        atoms = label.atoms
        for axis in sorted({axis % rank for axis in axes}, reverse=True):
            atoms = atoms.squeeze(axis)
        return Label(atoms, label.soft)

    def follow_reductions(self, node: fx.Node) -> None:
        """Note which channels a value made of all channels meets; what comes of that is made of these."""
        if node in self.made_of:
            return
        parts = [source for source in node.all_input_nodes if source in self.made_of]
        if not parts:
            return
        found = [self.labels.get(source) for source in node.all_input_nodes if source not in self.made_of]
        met = [label.atoms for label in found if isinstance(label, Label) and not label.soft and not label.empty]
        numbers = frozenset().union(*(self.made_of[source] for source in parts))
        for number in numbers:
            self.reductions[number].meets.extend(met)
        if not met:
            self.made_of[node] = numbers

    def move(self, node: fx.Node) -> Labels:
        """Carry a reshape, slice or permutation out on the label itself."""
        source = node.args[0]
        label, shape = self.label(source), shape_of(source)
        if label.empty:
            return self.nothing(node)
        full = label.atoms.expand(shape)
        rest = fx.map_arg(
            node.args[1:], lambda n: n.meta["val"] if isinstance(n.meta["val"], int) else torch.empty(shape_of(n))
        )
        target: Any = node.target
        if "view" in str(target):
            target = torch.ops.aten.reshape.default
        try:
            moved = target(full, *rest, **node.kwargs)
        except (RuntimeError, TypeError):  # an index or a size that is itself computed
            self.stop(node, f"its channels go through {node.target} ({where(node)}) with computed sizes")
            return self.nothing(node)
        if not isinstance(moved, Tensor):
            return tuple(Label(_squeezed(part), label.soft) for part in moved)
        return Label(_squeezed(moved), label.soft)

    def count_sizes(self, node: fx.Node) -> None:
        """Note which channels the numbers in an operation count."""
        for place in places(node):
            size = size_at(node, place)
            found = self.labels[node] if place.of == "output" else self.labels.get(node.args[0])  # type: ignore[arg-type]
            if size is None or found is None:
                continue
            label = found if isinstance(found, Label) else found[place.item]
            if label.soft or not label.atoms.dim() or label.atoms.shape[place.axis] == 1:
                continue
            rows = label.atoms.movedim(place.axis, 0).flatten(1)
            if place.what == "before":
                rows = rows[: int(size)]
            elif place.what == "after":
                rows = rows[len(rows) + int(size) :]
            self.ties.counted.append(Counted(size.name, int(size), rows))

    def finish(self) -> Ties:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        pairs = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *self.links], 1).numpy()
        matrix = coo_matrix((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(self.count, self.count))
        # Atom 0 has no links, so it is component 0 and alone.
        component = torch.from_numpy(connected_components(matrix, directed=False)[1].astype(np.int64))
        ties = self.ties
        for table in (ties.inputs, ties.outputs, ties.norms):
            for name in table:
                table[name] = component[table[name]]
        ties.parameters = {name: [component[a] for a in parts] for name, parts in ties.parameters.items()}
        ties.counted = [c._replace(atoms=component[c.atoms]) for c in ties.counted]
        ties.products = [p._replace(atoms=component[p.atoms].unique()) for p in ties.products]
        for reduction in self.reductions:
            own = component[reduction.atoms].unique()
            scaled = (
                torch.cat([component[atoms].flatten() for atoms in reduction.meets]) if reduction.meets else own[:0]
            )
            if bool(torch.isin(own[own > 0], scaled).any()):
                self.approximations.append((reduction.atoms.flatten(), reduction.what))
            else:
                self.freezes.append((reduction.atoms.flatten(), f"its channels are summed up at {reduction.what}"))
        for atoms, what in self.approximations:
            for number in component[atoms].unique().tolist():
                ties.approximate.setdefault(number, what)
        for atoms, why in self.freezes:
            for number in component[atoms].unique().tolist():
                ties.frozen.setdefault(number, why)
        return ties


def nothing(rank: int) -> Label:
    """The label of what no channel is in."""
    return Label(torch.zeros([1] * rank, dtype=torch.int64))


def _rank(label: Label, rank: int) -> Label:
    return Label(label.atoms.view([1] * (rank - label.atoms.dim()) + list(label.atoms.shape)), label.soft)


def _squeezed(atoms: Tensor) -> Tensor:
    """Give up the axes along which nothing changes."""
    for axis in range(atoms.dim()):
        first = atoms.narrow(axis, 0, 1)
        if atoms.shape[axis] > 1 and (atoms.stride(axis) == 0 or bool((atoms == first).all())):
            atoms = first
    return atoms.contiguous()


def shape_of(node: Any) -> tuple[int, ...]:
    """The sizes of a node's tensor; empty for anything else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _reach(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a node's tensor, 1 where it repeats itself along an axis as often as another tensor is wide."""
    shape, source = shape_of(node), node.args[0] if node.args else None
    if not str(node.target).startswith("aten.expand_as"):
        return shape
    before = shape_of(source)
    return (1,) * (len(shape) - len(before)) + before


def module_of(node: fx.Node) -> str:
    """The module of the model that an operation stands in."""
    if node.op == "call_module":
        return str(node.target)
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack else ""


def operation(node: fx.Node) -> str:
    """The name of an operation, without its overload."""
    return str(node.target).removeprefix("aten.").split(".")[0]


def where(node: fx.Node) -> str:
    """An operation and its place, for messages."""
    name, module = operation(node), module_of(node)
    return f"{name} in {module}" if module else f"{name} in the model's forward"


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of an operation, by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
