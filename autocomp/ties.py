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

LARGEST_RAW = 1 << 18  # elements of a bare parameter at most that get atoms of their own; larger ones keep their shape

POINTWISE = {"hardswish", "prelu", "masked_fill", "where", "rsub", "hardshrink", "rrelu", "selu", "celu", "add", "mul"}
SAME = {"dropout", "alpha_dropout", "feature_dropout", "contiguous", "clone", "detach", "alias", "to", "_to_copy"}
SAME |= {"type_as", "lift_fresh_copy", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "float"}
MOVES = {"permute", "transpose", "t", "select", "slice", "chunk", "split", "split_with_sizes", "unbind", "expand"}
MOVES |= {"repeat", "repeat_interleave", "roll", "flip", "squeeze", "unsqueeze", "view", "reshape", "flatten", "narrow"}
MOVES |= {"unflatten", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "movedim", "swapaxes", "numpy_T"}
MOVES |= {"tensor_split", "expand_as", "_unsafe_view", "moveaxis", "ravel", "unsafe_chunk", "unsafe_split", "swapdims"}
CREATE = {"zeros", "ones", "full", "arange", "empty", "eye", "scalar_tensor", "linspace", "rand", "randn", "new_zeros"}
REDUCE = {"mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "max", "min", "prod"}
AXIS = {"softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "argmax", "argmin", "sort", "topk"}
SPATIAL = {"max_pool1d": 1, "max_pool2d": 2, "avg_pool1d": 1, "avg_pool2d": 2, "adaptive_avg_pool1d": 1}
SPATIAL |= {"adaptive_avg_pool2d": 2, "adaptive_max_pool1d": 1, "adaptive_max_pool2d": 2, "upsample_nearest1d": 1}
SPATIAL |= {"upsample_nearest2d": 2, "upsample_bilinear2d": 2, "upsample_linear1d": 1, "upsample_bicubic2d": 2}


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


class Reshape(NamedTuple):
    """A reshape in the model's own code: the module it stands in, and the atoms along an axis it makes or takes."""

    module: str
    size: int
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
    reshapes: list[Reshape] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    frozen: dict[int, str] = field(default_factory=dict)


def trace(
    program: torch.export.ExportedProgram, model: nn.Module, layers: Mapping[str, Any], skipped: Mapping[str, str]
) -> Ties:
    """Follow the channels of ``layers`` through an exported program; atoms come back as numbers of components."""
    tracer = _Tracer(program, model, layers, skipped)
    for node in program.graph.nodes:
        tracer.see(node)
    return tracer.finish()


class _Tracer:
    def __init__(
        self,
        program: torch.export.ExportedProgram,
        model: nn.Module,
        layers: Mapping[str, Any],
        skipped: Mapping[str, str],
    ) -> None:
        signature = program.graph_signature
        self.paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.model, self.layers, self.skipped = model, layers, skipped
        self.count = 1
        self.links: list[Tensor] = []  # [2, n] each
        self.freezes: list[tuple[Tensor, str]] = []
        self.labels: dict[fx.Node, Label | tuple[Label, ...]] = {}
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

    def label(self, node: Any) -> Label:
        """The label of a node; a bare parameter gets atoms when it is first asked for."""
        found = self.labels.get(node)
        if isinstance(found, Label):
            return found
        shape = _shape(node)
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
            return next((label for label, _ in aligned if not label.soft and not label.empty), _nothing(rank))
        axes = set.union(*(label.axes for label in hard))
        result = min(hard, key=lambda label: label.atoms.numel())
        for label in hard:
            if result.axes - label.axes:  # such as rows against columns: no channel could go alone
                for other in hard:
                    self.freeze(other.atoms, f"channels of two kinds meet at {where}")
                return _nothing(rank)
            if label is not result:
                self.link(result.atoms, label.atoms, f"at {where} they meet values of a fixed width")
        for label, shape in aligned:
            against = {axis for axis in axes if shape[axis] > 1}
            if against and not label.empty and (label.soft or not label.axes):
                self.link(result.atoms, label.atoms, where)
            elif against and label.empty:
                self.freeze(result.atoms, f"at {where} they meet values of a fixed width")
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
                        self.freeze(label.atoms, "they are the model's output")
        elif node.op == "call_function":
            self.labels[node] = self.call(node)

    def call(self, node: fx.Node) -> Label | tuple[Label, ...]:
        if "getitem" in str(node.target) and not str(node.target).startswith("aten"):
            source, index = node.args
            found = self.labels[source]  # type: ignore[index]
            return found if isinstance(found, Label) else found[index]  # type: ignore[index]
        name = str(node.target).removeprefix("aten.").split(".")[0]
        name = name.removesuffix("_") if not name.startswith("__") else name
        rule: Callable[[fx.Node], Label | tuple[Label, ...]] | None = getattr(self, f"_on_{name}", None)
        if rule is not None:
            return rule(node)
        if name in SAME:
            return self.label(node.args[0])
        if name in MOVES:
            return self.move(node)
        if name in SPATIAL:
            return self.keep_axes(node, range(-SPATIAL[name], 0), "are pooled or resized along them")
        if name in REDUCE:
            return self.reduce(node)
        if name in AXIS:
            axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
            return self.keep_axes(node, [axis], f"are mixed by {name}")  # type: ignore[list-item]
        tags = getattr(node.target, "tags", ())
        if torch.Tag.pointwise in tags or name in POINTWISE:
            return self.unite([(self.label(n), _shape(n)) for n in node.all_input_nodes], _where(node))
        if name not in CREATE:
            self.stop(node, f"they go through {name} ({_where(node)}), which is not followed")
        return self.nothing(node)

    def stop(self, node: fx.Node, why: str) -> None:
        for source in node.all_input_nodes:
            found = self.labels.get(source, ())
            for label in (found,) if isinstance(found, Label) else found:
                self.freeze(label.atoms, why)

    def nothing(self, node: fx.Node) -> Label | tuple[Label, ...]:
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            return tuple(_nothing(v.dim() if isinstance(v, Tensor) else 0) for v in value)
        return _nothing(value.dim() if isinstance(value, Tensor) else 0)

    def keep_axes(self, node: fx.Node, axes: Iterable[int], why: str) -> Label | tuple[Label, ...]:
        """Pass the label on, unless it depends on one of the axes that are worked on."""
        label = self.label(node.args[0])
        rank = label.atoms.dim()
        if label.axes & {axis % rank for axis in axes if rank}:
            self.freeze(label.atoms, f"they {why} ({_where(node)})")
            return self.nothing(node)
        return label if isinstance(node.meta.get("val"), Tensor) else tuple(label for _ in node.meta["val"])

    def reduce(self, node: fx.Node) -> Label | tuple[Label, ...]:
        label = self.label(node.args[0])
        rank = label.atoms.dim()
        position = 2 if "vector_norm" in str(node.target) else 1
        given = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
        axes = list(range(rank)) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
        if len(node.all_input_nodes) > 1 or not isinstance(node.meta.get("val"), Tensor):
            self.stop(node, f"they are compared at {_where(node)}")
            return self.nothing(node)
        if label.axes & {axis % rank for axis in axes}:
            self.freeze(label.atoms, f"they are summed up at {_where(node)}")
            return self.nothing(node)
        if node.meta["val"].dim() == rank:
            return label
        atoms = label.atoms
        for axis in sorted({axis % rank for axis in axes}, reverse=True):
            atoms = atoms.squeeze(axis)
        return Label(atoms, label.soft)

    def move(self, node: fx.Node) -> Label | tuple[Label, ...]:
        """Carry a reshape, slice or permutation out on the label itself."""
        source = node.args[0]
        label, shape = self.label(source), _shape(source)
        if label.empty:
            return self.nothing(node)
        full = label.atoms.expand(shape)
        rest = [torch.empty(_shape(a)) if isinstance(a, fx.Node) else a for a in node.args[1:]]
        target: Any = node.target
        if "view" in str(target):
            target = torch.ops.aten.reshape.default
        try:
            moved = target(full, *rest, **node.kwargs)
        except (RuntimeError, TypeError):  # an index or a size that is itself computed
            self.stop(node, f"they go through {node.target} ({_where(node)}) with computed sizes")
            return self.nothing(node)
        if not isinstance(moved, Tensor):
            return tuple(Label(_squeezed(part), label.soft) for part in moved)
        result = Label(_squeezed(moved), label.soft)
        if any(word in str(node.target) for word in ("view", "reshape", "flatten", "expand", "split")):
            self.note_reshape(node, label, shape)
            self.note_reshape(node, result, _shape(node))
        return result

    def note_reshape(self, node: fx.Node, label: Label, shape: Sequence[int]) -> None:
        for axis in label.axes:
            self.ties.reshapes.append(Reshape(_module(node), int(shape[axis]), label.atoms.flatten().unique()))

    def contract(self, node: fx.Node, a: _Operand, b: _Operand, out: str, exact: bool = False) -> Label:
        """A sum over products of two tensors, by letters; ``exact``: the size of what is summed over enters the result."""
        where = _where(node)
        letters = "".join(dict.fromkeys(a.letters + b.letters))
        labels, shapes = [], []
        for operand in (a, b):
            atoms = operand.label.atoms
            order = [operand.letters.index(x) for x in letters if x in operand.letters]
            atoms = atoms.permute(order)
            sizes = [operand.shape[i] for i in order]
            for axis, letter in enumerate(letters):
                if letter not in operand.letters:
                    atoms = atoms.unsqueeze(axis)
                    sizes.insert(axis, 1)
            labels.append(_nothing(len(letters)) if operand.label.soft else Label(atoms))
            shapes.append(sizes)
        for axis, letter in enumerate(letters):
            if letter in out:
                continue
            labels = [self.along(x, axis, where) if x.axes - {axis} else x for x in labels]
            reading = [x for x in labels if axis in x.axes]
            if len(reading) == 2 and not exact:
                self.link(labels[0].atoms, labels[1].atoms, where)
            for x in reading if len(reading) == 1 or exact else ():
                self.freeze(x.atoms, f"they are summed over at {where}, by a scale or a factor of their full number")
            labels = [_nothing(len(letters)) if axis in x.axes else x for x in labels]
        live = [(x, s) for x, s in zip(labels, shapes, strict=True) if not x.empty]
        summed = [axis for axis, letter in enumerate(letters) if letter not in out]
        sides = []
        for label, sizes in zip(labels, shapes, strict=True):
            sides.append((label, [1 if axis in summed else size for axis, size in enumerate(sizes)]))
        merged = self.unite(sides, where) if live else _nothing(len(letters))
        sizes = {letter: max(s[axis] for s in shapes) for axis, letter in enumerate(letters)}
        if live and len(live) == 2 and not merged.empty:
            both = [x for x in letters if x in a.letters and x in b.letters and x in out]
            extent = [
                int(np.prod([sizes[x] for x in letters if keep(x)]))
                for keep in (
                    lambda x: x in both,
                    lambda x: x in a.letters and x not in b.letters,
                    lambda x: x not in out,
                    lambda x: x in b.letters and x not in a.letters,
                )
            ]
            self.ties.products.append(Product(merged.atoms.flatten().unique(), *extent))
        atoms = merged.atoms
        for axis in sorted(summed, reverse=True):
            atoms = atoms.squeeze(axis)
        left = [x for x in letters if x in out]
        return Label(atoms.permute([left.index(x) for x in out]))

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
        ties.reshapes = [r._replace(atoms=component[r.atoms]) for r in ties.reshapes]
        ties.products = [p._replace(atoms=component[p.atoms].unique()) for p in ties.products]
        for atoms, why in self.freezes:
            for number in component[atoms].unique().tolist():
                ties.frozen.setdefault(number, why)
        return ties

    # --- operations with rules of their own --------------------------------------------------------------------------

    def _on_linear(self, node: fx.Node) -> Label | tuple[Label, ...]:
        return self.layer(node, -1)

    def _on_conv1d(self, node: fx.Node) -> Label | tuple[Label, ...]:
        return self.layer(node, -2)

    def _on_conv2d(self, node: fx.Node) -> Label | tuple[Label, ...]:
        return self.layer(node, -3)

    def layer(self, node: fx.Node, axis: int) -> Label | tuple[Label, ...]:
        source, weight = node.args[0], node.args[1]
        path = self.paths.get(weight.name, "") if isinstance(weight, fx.Node) else ""
        name = path.removesuffix(".weight")
        label, shape = self.label(source), _shape(source)
        axis %= len(shape)
        rank = len(_shape(node))
        if label.axes - {axis}:
            self.freeze(label.atoms, f"layer {name or _module(node)} works on each of them alike")
            label = _nothing(len(shape))
        rows = self.fresh(_shape(weight)[0])
        made = Label(rows.view([-1 if i == axis else 1 for i in range(rank)]))
        if name not in self.layers or label.soft:
            why = self.skipped.get(name) or self.skipped.get(_module(node)) or "its weights are no layer's of its own"
            for atoms in (label.atoms, rows):
                self.freeze(atoms, f"layer {name or _module(node)} cannot be changed: {why}")
            return made
        columns = label.atoms.flatten().expand(shape[axis])
        self.ties.inputs[name], self.ties.outputs[name] = columns, rows
        groups = self.layers[name].conv_groups
        if groups > 1:  # whole groups go, with all they read and make
            first = rows.view(groups, -1)[:, :1]
            self.link(first, rows.view(groups, -1), name)
            self.link(first, columns.reshape(groups, -1), "they are the model's input, or of a fixed width")
        return made

    def _on_batch_norm(self, node: fx.Node) -> Label | tuple[Label, ...]:
        mean = node.args[3]
        name = self.paths.get(mean.name, "").removesuffix(".running_mean") if isinstance(mean, fx.Node) else ""
        label = self.label(node.args[0])
        if not label.axes:
            return label
        module = self.model.get_submodule(name) if name else None
        if label.axes != {1} or type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            self.freeze(label.atoms, f"they are normalised at {_where(node)} by what cannot be narrowed")
            return self.nothing(node)
        atoms = self.ties.norms.setdefault(name, self.fresh(label.atoms.shape[1]))
        self.link(label.atoms.flatten(), atoms, f"norm {name} reads values of a fixed width among them")
        return label

    def _on_layer_norm(self, node: fx.Node) -> Label | tuple[Label, ...]:
        axes = range(-len(node.args[1]), 0)  # type: ignore[arg-type]
        return self.keep_axes(node, axes, "are normalised over all of them together: those left would change")

    _on_rms_norm = _on_layer_norm

    def _on_group_norm(self, node: fx.Node) -> Label | tuple[Label, ...]:
        return self.keep_axes(node, [1], "are normalised in groups that would change")

    _on_instance_norm = _on_group_norm

    def _on_cat(self, node: fx.Node) -> Label | tuple[Label, ...]:
        sources: Any = node.args[0]
        shape = _shape(node)
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        axis = int(given) % len(shape)  # type: ignore[call-overload]
        labels = [self.label(source) for source in sources]
        if any(label.axes - {axis} for label in labels if not label.soft):
            parts = []
            for source, label in zip(sources, labels, strict=True):
                sizes = [1 if i == axis else size for i, size in enumerate(_shape(source))]
                parts.append((self.along(label, axis, _where(node)), sizes))
            return self.unite(parts, _where(node))
        whole = []
        for source, label in zip(sources, labels, strict=True):
            size = [_shape(source)[i] if i == axis else 1 for i in range(len(shape))]
            whole.append((_nothing(len(shape)) if label.soft else label).atoms.expand(size))
        return Label(torch.cat(whole, axis))

    def _on_stack(self, node: fx.Node) -> Label | tuple[Label, ...]:
        sources: Any = node.args[0]
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        merged = self.unite([(self.label(s), _shape(s)) for s in sources], _where(node))
        return Label(merged.atoms.unsqueeze(int(given)), merged.soft)  # type: ignore[call-overload]

    def _on_pad(self, node: fx.Node) -> Label | tuple[Label, ...]:
        count = len(node.args[1]) // 2  # type: ignore[arg-type]
        return self.keep_axes(node, range(-count, 0), "are padded")

    _on_constant_pad_nd = _on_pad

    def _on_glu(self, node: fx.Node) -> Label | tuple[Label, ...]:
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
        label, shape = self.label(node.args[0]), list(_shape(node))
        axis = int(given) % len(shape)  # type: ignore[call-overload]
        if axis not in label.axes:
            return label
        return self.unite([(Label(half), shape) for half in label.atoms.chunk(2, axis)], _where(node))

    def _on_prelu(self, node: fx.Node) -> Label | tuple[Label, ...]:
        source, factor = node.args
        if np.prod(_shape(factor)) == 1:
            return self.label(source)
        rank = len(_shape(source))
        sizes = [-1 if axis == 1 else 1 for axis in range(rank)]
        slopes = self.label(factor)
        along = Label(slopes.atoms.view(sizes), slopes.soft)
        return self.unite([(self.label(source), _shape(source)), (along, along.atoms.shape)], _where(node))

    def _on_matmul(self, node: fx.Node) -> Label | tuple[Label, ...]:
        a, b = node.args[:2]
        ranks = len(_shape(a)), len(_shape(b))
        if min(ranks) < 2:
            self.stop(node, f"they are multiplied with a vector at {_where(node)}")
            return self.nothing(node)
        batch = "uvwxyz"[: max(ranks) - 2]
        one = self.operand(a, batch[len(batch) - ranks[0] + 2 :] + "mk")
        two = self.operand(b, batch[len(batch) - ranks[1] + 2 :] + "kn")
        return self.contract(node, one, two, batch + "mn")

    _on_bmm = _on_matmul

    def _on_einsum(self, node: fx.Node) -> Label | tuple[Label, ...]:
        equation, sources = node.args[:2]
        left, _, out = str(equation).replace(" ", "").partition("->")
        terms = left.split(",")
        plain = len(terms) == 2 and out and "." not in left and all(len(set(term)) == len(term) for term in terms)
        if not plain:
            self.stop(node, f"they go through einsum {equation!r} ({_where(node)}), which is not followed")
            return self.nothing(node)
        operands = [self.operand(source, term) for source, term in zip(sources, terms, strict=True)]  # type: ignore[arg-type,call-overload]
        return self.contract(node, operands[0], operands[1], out)

    def _on_scaled_dot_product_attention(self, node: fx.Node) -> Label | tuple[Label, ...]:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        query, key, value = (given[name] for name in names[:3])
        batch = "uvwxyz"[: len(_shape(query)) - 2]
        one, two, three = (self.operand(x, batch + y) for x, y in ((query, "mk"), (key, "nk"), (value, "np")))
        if given.get("enable_gqa"):
            times = one.shape[-3] // two.shape[-3]
            two, three = (x.repeated(times) for x in (two, three))
        scores = self.contract(node, one, two, batch + "mn", exact=given.get("scale") is None)
        shape = [*one.shape[:-1], two.shape[-2]]
        mask = given.get("attn_mask")
        if mask is not None:
            scores = self.unite([(scores, shape), (self.label(mask), _shape(mask))], _where(node))
        return self.contract(node, _Operand(scores, shape, batch + "mn"), three, batch + "mp")

    def operand(self, node: Any, letters: str) -> _Operand:
        return _Operand(self.label(node), list(_shape(node)), letters)

    def _on_embedding(self, node: fx.Node) -> Label | tuple[Label, ...]:
        weight = node.args[0]
        assert isinstance(weight, fx.Node)
        rank = len(_shape(node))
        if weight.name not in self.paths:
            return self.nothing(node)
        atoms = self.fresh(_shape(weight)[1])
        self.ties.parameters.setdefault(self.paths[weight.name], []).append(atoms[None].expand(_shape(weight)))
        return Label(atoms.view([-1 if i == rank - 1 else 1 for i in range(rank)]))


class _Operand(NamedTuple):
    label: Label
    shape: list[int]
    letters: str

    def repeated(self, times: int) -> _Operand:
        """Each head of keys or values serves ``times`` heads of queries."""
        axis = len(self.shape) - 3
        full = self.label.atoms
        if full.shape[axis] > 1:
            full = full.repeat_interleave(times, axis)
        shape = [size * times if i == axis else size for i, size in enumerate(self.shape)]
        return _Operand(Label(full, self.label.soft), shape, self.letters)


def _nothing(rank: int) -> Label:
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


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _module(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _where(node: fx.Node) -> str:
    name = str(node.target).removeprefix("aten.").split(".")[0]
    module = _module(node)
    return f"{name} in {module}" if module else f"{name} in the model's forward"
