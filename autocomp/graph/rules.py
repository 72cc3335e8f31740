"""What single operations do to the labels of `ties`: one function for each kind, looked up by the operation's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import fx, nn

from autocomp.graph.labels import Counted, Label, Labels, Product, Rule, argument, nothing, shape_of, where
from autocomp.graph.program import Size, tensor_at
from autocomp.layers.recurrent import Recurrence

if TYPE_CHECKING:
    from autocomp.graph.labels import Tracer

BATCH_LETTERS = "stuvwxyz"


class Operand(NamedTuple):
    """A tensor of a product, its axes named by letters as in einsum."""

    label: Label
    shape: Sequence[int]
    letters: str

    def repeated(self, times: int) -> Operand:
        """Each head of keys or values serves ``times`` heads of queries."""
        axis = len(self.shape) - 3
        full = self.label.atoms
        if full.shape[axis] > 1:
            full = full.repeat_interleave(times, axis)
        shape = [size * times if i == axis else size for i, size in enumerate(self.shape)]
        return Operand(Label(full, self.label.soft), shape, self.letters)

    def spread(self, letters: str) -> tuple[Label, list[int]]:
        """Label and shape with an axis for each of ``letters``; bare parameters have no label here."""
        order = [self.letters.index(x) for x in letters if x in self.letters]
        atoms, sizes = self.label.atoms.permute(order), [self.shape[i] for i in order]
        for axis, letter in enumerate(letters):
            if letter not in self.letters:
                atoms = atoms.unsqueeze(axis)
                sizes.insert(axis, 1)
        return Label(atoms, self.label.soft), sizes


def contract(tracer: Tracer, node: fx.Node, a: Operand, b: Operand, out: str, exact: bool = False) -> Label:
    """A sum over products of two tensors; ``exact``: the number of what is summed over enters the result by itself."""
    place = where(node)
    letters = "".join(dict.fromkeys(a.letters + b.letters))
    spread = a.spread(letters), b.spread(letters)
    labels, shapes = [label for label, _ in spread], [sizes for _, sizes in spread]
    if all(label.soft or label.empty for label in labels):
        labels = [nothing(len(letters)) for _ in labels]
    # a constant (positions, say) follows the channels of the other factor, and along its other axes goes whole
    for side in (0, 1):
        if labels[side].soft:
            for axis in labels[side].axes - labels[1 - side].axes:
                labels[side] = tracer.along(labels[side], axis, place)
            labels[side] = Label(labels[side].atoms)
    summed = [axis for axis, letter in enumerate(letters) if letter not in out]
    for axis in summed:
        labels = [tracer.along(x, axis, place) if x.axes - {axis} else x for x in labels]
        reading = [x for x in labels if axis in x.axes]
        if len(reading) == 2 and not exact:
            tracer.link(labels[0].atoms, labels[1].atoms, place)
        elif reading:
            for x in reading:
                tracer.freeze(
                    x.atoms, f"its channels are summed over at {place}, by a scale or factors of a fixed number"
                )
        labels = [nothing(len(letters)) if axis in x.axes else x for x in labels]
    live = sum(not x.empty for x in labels)
    sides = [
        (label, [1 if axis in summed else size for axis, size in enumerate(sizes)])
        for label, sizes in zip(labels, shapes, strict=True)
    ]
    merged = tracer.unite(sides, place) if live else nothing(len(letters))
    if live == 2 and not merged.empty:
        extents = dict.fromkeys(("batch", "m", "k", "n"), 1)
        for axis, letter in enumerate(letters):
            kind = "k" if axis in summed else "batch"
            if kind == "batch" and not (letter in a.letters and letter in b.letters):
                kind = "m" if letter in a.letters else "n"
            extents[kind] *= max(sizes[axis] for sizes in shapes)
        tracer.ties.products.append(Product(merged.atoms.flatten().unique(), **extents))
    atoms = merged.atoms
    for axis in reversed(summed):
        atoms = atoms.squeeze(axis)
    left = [x for x in letters if x in out]
    return Label(atoms.permute([left.index(x) for x in out]))


def on_layer(tracer: Tracer, node: fx.Node) -> Labels:
    """A convolution or linear layer: reads its columns, makes its rows; anything else on its input goes to neither."""
    name, source = str(node.target), node.args[0]
    module = tracer.model.get_submodule(name)
    label, shape = tracer.label(source), shape_of(source)
    axis = len(shape) - 1 if isinstance(module, nn.Linear) else 1
    if label.axes - {axis}:
        tracer.freeze(label.atoms, f"layer {name} works on each of its channels alike")
        label = nothing(len(shape))
    outputs = shape_of(node)[axis]
    rows = (
        tracer.ties.outputs[name] if name in tracer.ties.outputs else tracer.fresh(outputs)
    )  # called again: the same channels
    made = Label(rows.view([-1 if i == axis else 1 for i in range(len(shape_of(node)))]))
    if name not in tracer.layers or label.soft:
        why = tracer.skipped.get(name) or "its input does not depend on the model's"
        for atoms in (label.atoms, rows):
            tracer.freeze(atoms, f"layer {name} cannot be changed: {why}")
        return made
    columns = label.atoms.flatten().expand(shape[axis])
    if name in tracer.ties.inputs:
        tracer.link(tracer.ties.inputs[name], columns, f"layer {name} also reads values of a fixed width")
    tracer.ties.inputs[name], tracer.ties.outputs[name] = columns, rows
    groups = tracer.layers[name].conv_groups
    if groups > 1:  # whole groups go, with all they read and make
        first = rows.view(groups, -1)[:, :1]
        tracer.link(first, rows.view(groups, -1), name)
        tracer.link(first, columns.reshape(groups, -1), "its channels are the model's input, or of a fixed width")
    return made


def on_recurrence(tracer: Tracer, node: fx.Node) -> Labels:
    """A loop over time: a hidden unit is its rows in every gate, a column of the recurrent weight, and its states."""
    name = f"{node.target}.hidden"
    module = tracer.model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    width, gates = module.in_features, tracer.label(node.args[0])
    known = name in tracer.ties.outputs  # called again: the same units
    units = tracer.ties.inputs[name] if known else tracer.fresh(width)
    rows = tracer.ties.outputs[name] if known else tracer.fresh(module.out_features)
    tracer.ties.inputs[name], tracer.ties.outputs[name] = units, rows
    if gates.axes - {2}:
        tracer.freeze(gates.atoms, f"layer {name} works on each of its channels alike")
        gates = nothing(3)
    if name not in tracer.layers:
        tracer.freeze(units, f"layer {name} cannot be changed: {tracer.skipped.get(name, '')}")
    for atoms in (rows, gates.atoms.flatten().expand(len(rows))):
        tracer.link(units, atoms.view(-1, width), f"the gates of {name} are values of a fixed width")
    for state in node.args[1:]:
        if state is not None:
            label = tracer.label(state)
            label = tracer.along(label, 0, where(node)) if label.axes == {0, 1} else label
            tracer.link(units, label.atoms.flatten().expand(width), f"the states of {name} are values of a fixed width")
    state_label = Label(units.view(1, -1))
    count = len(node.meta["val"]) - 1
    return (Label(units.view(1, 1, -1)), *[state_label] * count)


def on_batch_norm(tracer: Tracer, node: fx.Node) -> Labels:
    label, name = tracer.label(node.args[0]), str(node.target)
    if not label.axes:
        return label
    if label.axes != {1}:
        tracer.freeze(label.atoms, f"its channels do not lie along the axis that {name} normalises")
        return tracer.nothing(node)
    if name not in tracer.ties.norms:
        tracer.ties.norms[name] = tracer.fresh(label.atoms.shape[1])
    tracer.link(
        label.atoms.flatten(), tracer.ties.norms[name], f"norm {name} reads values of a fixed width among its channels"
    )
    return label


def on_layer_norm(tracer: Tracer, node: fx.Node) -> Labels:
    label, shape, count = tracer.label(node.args[0]), shape_of(node), len(argument(node, 1, "normalized_shape"))
    normalised = set(range(len(shape) - count, len(shape)))
    if not label.axes or label.axes - normalised:
        return tracer.keep_axes(node, normalised, "are normalised together")
    return over_those_left(tracer, node, label, node.args[2:4])


def over_those_left(tracer: Tracer, node: fx.Node, label: Label, parameters: Sequence[object]) -> Label:
    """A norm of all channels of a group together: it is computed over those that are left, with their own ``parameters``."""
    operands = [(label, shape_of(node))]
    for parameter in parameters:
        if isinstance(parameter, fx.Node):
            operands.append((tracer.label(parameter), shape_of(parameter)))
    tracer.approximate(label.atoms, where(node))
    return tracer.unite(operands, where(node))


def on_group_norm(tracer: Tracer, node: fx.Node) -> Labels:
    """Whole groups of channels go, and their number follows."""
    label, groups = tracer.label(node.args[0]), argument(node, 1, "num_groups")
    if 1 not in label.axes:
        return label
    if label.axes != {1} or not isinstance(groups, int):
        return tracer.keep_axes(node, [1], "are normalised in groups that would change")
    if groups == 1:
        tracer.approximate(label.atoms, where(node))
    else:
        rows = label.atoms.flatten().view(groups, -1)
        tracer.link(rows[:, :1], rows, where(node))
    for parameter in node.args[2:4]:
        if isinstance(parameter, fx.Node):
            tracer.link(label.atoms.flatten(), tracer.label(parameter).atoms.flatten(), where(node))
    if isinstance(groups, Size):
        tracer.ties.counted.append(Counted(groups.name, int(groups), rows))
    return label


def on_instance_norm(tracer: Tracer, node: fx.Node) -> Labels:
    label = tracer.keep_axes(node, range(2, len(shape_of(node))), "are normalised")
    if isinstance(label, Label) and label.axes == {1}:
        for parameter in node.args[1:5]:  # weight, bias, running mean and variance
            if isinstance(parameter, fx.Node):
                tracer.link(label.atoms.flatten(), tracer.label(parameter).atoms.flatten(), where(node))
    return label


def on_cat(tracer: Tracer, node: fx.Node) -> Labels:
    sources: Sequence[fx.Node] = argument(node, 0, "tensors")
    rank = len(shape_of(node))
    axis = int(argument(node, 1, "dim", 0)) % rank
    labels = [tracer.label(source) for source in sources]
    if any(label.axes - {axis} for label in labels if not label.soft):  # along another axis: all have the same width
        parts = []
        for source, label in zip(sources, labels, strict=True):
            sizes = [1 if i == axis else size for i, size in enumerate(shape_of(source))]
            parts.append((tracer.along(label, axis, where(node)), sizes))
        return tracer.unite(parts, where(node))
    whole = []
    for source, label in zip(sources, labels, strict=True):
        size = [shape_of(source)[i] if i == axis else 1 for i in range(rank)]
        whole.append((nothing(rank) if label.soft else label).atoms.expand(size))
    return Label(torch.cat(whole, axis))


def on_stack(tracer: Tracer, node: fx.Node) -> Labels:
    sources: Sequence[fx.Node] = argument(node, 0, "tensors")
    merged = tracer.unite([(tracer.label(s), shape_of(s)) for s in sources], where(node))
    return Label(merged.atoms.unsqueeze(int(argument(node, 1, "dim", 0))), merged.soft)


def on_pad(tracer: Tracer, node: fx.Node) -> Labels:
    return tracer.keep_axes(node, range(-(len(argument(node, 1, "pad")) // 2), 0), "are padded")


def on_glu(tracer: Tracer, node: fx.Node) -> Labels:
    label, shape = tracer.label(node.args[0]), shape_of(node)
    axis = int(argument(node, 1, "dim", -1)) % len(shape)
    if axis not in label.axes:
        return label
    return tracer.unite([(Label(half), shape) for half in label.atoms.chunk(2, axis)], where(node))


def on_prelu(tracer: Tracer, node: fx.Node) -> Labels:
    source, factor = node.args
    if np.prod(shape_of(factor)) == 1:
        return tracer.label(source)
    slopes = tracer.label(factor)
    sizes = [-1 if axis == 1 else 1 for axis in range(len(shape_of(source)))]
    along = Label(slopes.atoms.view(sizes), slopes.soft)
    return tracer.unite([(tracer.label(source), shape_of(source)), (along, along.atoms.shape)], where(node))


def on_matmul(tracer: Tracer, node: fx.Node) -> Labels:
    shapes = [shape_of(x) for x in node.args[:2]]
    ranks = [len(shape) for shape in shapes]
    if min(ranks) < 2:
        tracer.stop(node, f"its channels are multiplied with a vector at {where(node)}")
        return tracer.nothing(node)
    batch = BATCH_LETTERS[: max(ranks) - 2]
    letters = [batch[len(batch) - rank + 2 :] + tail for rank, tail in zip(ranks, ("mk", "kn"), strict=True)]
    one, two = (Operand(tracer.label(x), s, t) for x, s, t in zip(node.args[:2], shapes, letters, strict=True))
    return contract(tracer, node, one, two, batch + "mn")


def on_einsum(tracer: Tracer, node: fx.Node) -> Labels:
    equation, sources = str(argument(node, 0, "equation")), argument(node, 1, "tensors")
    left, _, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    plain = len(terms) == 2 and out and "." not in left and all(len(set(term)) == len(term) for term in terms)
    if not plain:
        tracer.stop(node, f"its channels go through einsum {equation!r} ({where(node)}), which is not followed")
        return tracer.nothing(node)
    one, two = (Operand(tracer.label(x), shape_of(x), term) for x, term in zip(sources, terms, strict=True))
    return contract(tracer, node, one, two, out)


def on_attention(tracer: Tracer, node: fx.Node) -> Labels:
    """`scaled_dot_product_attention`, with a mask, causal, or with fewer heads of keys than of queries."""
    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    batch = BATCH_LETTERS[: len(shape_of(query)) - 2]
    one, two, three = (
        Operand(tracer.label(x), shape_of(x), batch + y) for x, y in ((query, "mk"), (key, "nk"), (value, "np"))
    )
    if node.kwargs.get("enable_gqa"):
        times = one.shape[-3] // two.shape[-3]
        two, three = two.repeated(times), three.repeated(times)
    scores = contract(tracer, node, one, two, batch + "mn", exact=node.kwargs.get("scale") is None)
    shape = [*one.shape[:-1], two.shape[-2]]
    mask = argument(node, 3, "attn_mask", None)
    if mask is not None:
        scores = tracer.unite([(scores, shape), (tracer.label(mask), shape_of(mask))], where(node))
    return contract(tracer, node, Operand(scores, shape, batch + "mn"), three, batch + "mp")


def on_embedding(tracer: Tracer, node: fx.Node) -> Labels:
    path, shape = f"{node.target}.weight", tensor_at(tracer.model, f"{node.target}.weight").shape
    known = tracer.ties.parameters.get(path)
    atoms = known[0][0] if known else tracer.fresh(shape[1])
    tracer.ties.parameters.setdefault(path, [atoms[None].expand(*shape)])
    return Label(atoms.view([1] * (len(shape_of(node)) - 1) + [-1]))


RULES: Mapping[str, Rule] = {
    "layer_norm": on_layer_norm,
    "rms_norm": on_layer_norm,
    "group_norm": on_group_norm,
    "instance_norm": on_instance_norm,
    "cat": on_cat,
    "stack": on_stack,
    "pad": on_pad,
    "constant_pad_nd": on_pad,
    "glu": on_glu,
    "prelu": on_prelu,
    "matmul": on_matmul,
    "bmm": on_matmul,
    "einsum": on_einsum,
    "scaled_dot_product_attention": on_attention,
}

MODULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: on_layer,
    nn.Conv1d: on_layer,
    nn.Conv2d: on_layer,
    nn.Conv3d: on_layer,
    nn.ConvTranspose1d: on_layer,
    nn.ConvTranspose2d: on_layer,
    nn.ConvTranspose3d: on_layer,
    nn.BatchNorm1d: on_batch_norm,
    nn.BatchNorm2d: on_batch_norm,
    nn.BatchNorm3d: on_batch_norm,
    nn.Embedding: on_embedding,
    Recurrence: on_recurrence,
}
