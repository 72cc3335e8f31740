"""What a model is made of: its layers, their shapes, and the groups of channels that must go together.

The model is brought to its canonical form first, so a model that cannot be compiled is refused here, with the place in its own
source. The tied channels are followed through its graph (`ties`); what that says of a group is then put to the test by
removing half of it and comparing the outputs, so that a group is offered only if it works (`groups`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, fx, nn

from autocomp.graph.branches import find_branches
from autocomp.graph.canonical import canonical
from autocomp.graph.graph import Graph, Layer
from autocomp.graph.graph import Group as Group
from autocomp.graph.groups import make_groups, verified
from autocomp.graph.program import CanonicalModel, observe
from autocomp.graph.ties import trace
from autocomp.layers.convolution import AnyLayer, Layers, Transposed
from autocomp.layers.recurrent import Recurrence


def analyse(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> Graph:
    """Return the layers and channel groups of ``model`` in evaluation mode.

    Channels are removed from the model's canonical form alone: one that is in it already (a Task's) is not changed. Layers that
    share weights are named in ``skipped`` and stay as they are, as do groups that they take part in. ExportError if the
    model has no canonical form: it names the operation and the line.
    """
    model = copy.deepcopy(canonical(model, example_inputs))
    graph = observe(model, example_inputs)
    layers, skipped = _layers(model, graph)
    folded = {*layers, *(layer.norm for layer in layers.values() if layer.norm is not None)}
    tensors = {id(t): (name, t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    other = sum(t.numel() * t.element_size() for name, t in tensors.values() if name.rpartition(".")[0] not in folded)
    groups = {}
    ties = trace(model, layers, skipped)
    for group in make_groups(ties, layers, model):
        if group.prunable:
            group = verified(model, example_inputs, group)
        groups[group.name] = group
        for name in group.producers:
            layers[name] = replace(layers[name], out_group=group.name)
        for name in group.columns:
            layers[name] = replace(layers[name], in_group=group.name)
    order = {name: index for index, name in enumerate(layers)}
    groups = dict(sorted(groups.items(), key=lambda item: order[item[0]]))
    branches, whole = find_branches(model, example_inputs, layers, groups)
    return Graph(layers, groups, other, skipped, branches, whole)


def _layers(model: CanonicalModel, graph: fx.Graph) -> tuple[dict[str, Layer], dict[str, str]]:
    """Describe the convolutions and linear layers that can be compressed, and say of others why they stay."""
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    owners: dict[int, str] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        name = str(node.target)
        module = model.get_submodule(name)
        loop = module if isinstance(module, Recurrence) else None
        if loop is not None:
            name, module = f"{name}.hidden", loop.hidden
        if isinstance(module, Layers):
            first = owners.setdefault(id(module.weight), name)
            if first != name:
                skipped[name] = skipped[first] = "its weight is used by another layer too"
            known = layers.get(name)
            made = _layer(name, module, node, model.code.norms.get(name)) if loop is None else _step(name, loop, node)
            layers[name] = made if known is None else _again(known, made)
    return {name: layer for name, layer in layers.items() if name not in skipped}, skipped


def _again(known: Layer, made: Layer) -> Layer:
    """A layer that is called once more, maybe on another size."""
    more = known.more if known.loop else (*known.more, (made.in_size, made.out_size))
    return replace(known, calls=known.calls + made.calls, more=more)


def _layer(name: str, module: AnyLayer, node: fx.Node, norm: str | None) -> Layer:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if isinstance(module, nn.Linear):
        rows = int(before.numel()) // module.in_features
        o, i = module.out_features, module.in_features
        one, zero = (1, 1), (0, 0)
        has_bias, size, macs = module.bias is not None, (1, rows), rows * i * o
        return Layer(name, "linear", o, i, one, one, zero, one, 1, size, size, has_bias, macs, norm=norm)
    one_d = len(module.kernel_size) == 1
    depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
    transposed = isinstance(module, Transposed)
    # Each output is a sum over the taps; of a transposed convolution, each input is spread over them.
    places = int(before.numel()) // module.in_channels if transposed else int(after.numel()) // module.out_channels
    assert not isinstance(module.padding, str)

    def sizes(values: Sequence[int], lead: int) -> tuple[int, ...]:
        return (lead, int(values[0])) if one_d else tuple(int(value) for value in values)

    kernel = sizes(module.kernel_size, 1)
    return Layer(
        name,
        "depthwise" if depthwise else "conv2d",
        module.out_channels,
        module.in_channels,
        kernel,
        sizes(module.stride, 1),
        sizes(module.padding, 0),
        sizes(module.dilation, 1),
        module.groups,
        sizes(before[2:], 1),
        sizes(after[2:], 1),
        module.bias is not None,
        places * module.out_channels * (module.in_channels // module.groups) * math.prod(kernel),
        norm=norm,
        one_d=one_d,
        output_padding=sizes(module.output_padding, 0) if isinstance(module, Transposed) else None,
    )


def _step(name: str, loop: Recurrence, node: fx.Node) -> Layer:
    """The recurrent weight of a loop over time: a linear layer on the states of a batch, called at every step."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    assert isinstance(loop.hidden, nn.Linear)
    first, second, outputs = source.meta["val"].shape
    rows, steps = (first, second) if loop.batch_first else (second, first)
    width, one, zero = loop.hidden.in_features, (1, 1), (0, 0)
    size, has_bias = (1, int(rows)), loop.hidden.bias is not None
    return Layer(
        name, "linear", outputs, width, one, one, zero, one, 1, size, size, has_bias, rows * outputs * width,
        calls=int(steps), loop=loop.kind,
    )  # fmt: skip
