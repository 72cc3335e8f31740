"""What a model is made of: its layers, their shapes, and the groups of channels that must go together.

`torch.export` runs first, so a model that cannot be compiled is refused here, with the place in its own source. The
tied channels come from torch-pruning's dependency graph, behind `_tied`; whatever it says of a group is then put to the
test by removing half the group's channels and comparing the outputs, so that a group is offered only if it works.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from autocomp.compress.prune import spread, take
from autocomp.compress.quantize import pair
from autocomp.errors import ExportError

Kind = Literal["conv2d", "depthwise", "linear"]


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer. Sizes are (height, width); a linear layer over R rows has the size (1, R).

    ``in_group`` and ``out_group`` name the groups its input and output channels belong to (None: the model's input, or
    channels that stay; for a depthwise layer both are the same). ``in_spread`` columns of a linear layer stand for one
    channel of its group (1 but after a flatten); its ``in_channels`` count columns. ``norm`` names the BatchNorm that
    alone reads the output. ``macs`` are of one call on the example inputs. ``fixed`` says why only fp32 at full rank is
    possible; empty otherwise.
    """

    name: str
    kind: Kind
    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    conv_groups: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    bias: bool
    macs: int
    in_group: str | None = None
    out_group: str | None = None
    in_spread: int = 1
    norm: str | None = None
    fixed: str = ""

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.out_channels * (self.in_channels // self.conv_groups) * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class Group:
    """Channels that are kept or removed together: ``width`` of them.

    ``producers`` are the layers whose output channels they are, in the order of execution (a depthwise layer that
    passes them on included), ``consumers`` those that read them, ``norms`` the BatchNorms between. The group is named
    after its first producer. ``reason`` says why a group that is not ``prunable`` must keep all its channels.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    norms: tuple[str, ...] = ()
    prunable: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Graph:
    """Layers and groups of a model by name, in the order of execution.

    ``other_bytes`` is the size of all parameters and buffers that belong to no layer and fold into none. ``skipped``
    says of other convolutions and linear layers why they are left alone.
    """

    layers: Mapping[str, Layer]
    groups: Mapping[str, Group]
    other_bytes: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)

    def norms(self) -> dict[str, str]:
        """Map layer to the BatchNorm that follows it: what `fold_batchnorm` takes."""
        return {layer.name: layer.norm for layer in self.layers.values() if layer.norm is not None}


def analyse(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> Graph:
    """Return the layers and channel groups of ``model`` in evaluation mode.

    Layers that are called more than once, share weights or override torch's own forward are named in ``skipped`` and
    stay as they are, as do groups that they, or anything but convolutions, linear layers, BatchNorm and elementwise
    operations, take part in. ExportError if `torch.export` refuses the model: it names the operation and the line.
    """
    model = copy.deepcopy(model).eval()
    program = export(model, example_inputs)
    layers, skipped = _layers(program, model)
    folded = {*layers, *(layer.norm for layer in layers.values() if layer.norm is not None)}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    other = sum(t.numel() * t.element_size() for name, t in tensors if name.rpartition(".")[0] not in folded)
    groups = {}
    for group in _tied(model, example_inputs, layers, skipped):
        if group.prunable:
            reason = _removal_fails(model, example_inputs, layers, group)
            group = replace(group, prunable=not reason, reason=reason)
        groups[group.name] = group
        for name in group.producers:
            layers[name] = replace(layers[name], out_group=group.name)
            if layers[name].kind == "depthwise":
                layers[name] = replace(layers[name], in_group=group.name)
        for name in group.consumers:
            layer = layers[name]
            layers[name] = replace(layer, in_group=group.name, in_spread=layer.in_channels // group.width)
    order = {name: index for index, name in enumerate(layers)}
    groups = dict(sorted(groups.items(), key=lambda item: order[item[0]]))
    return Graph(layers, groups, other, skipped)


def export(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Run `torch.export`; ExportError names the operation it stumbled over and the line of the model."""
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(model, example_inputs)
    except Exception as error:  # torch.export lets any exception of the user's code through
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = ""
        if "data-dependent" in first:
            hint = "; control flow that depends on values of tensors must be written with torch.where or torch.cond"
        raise ExportError(
            f"the model cannot be exported: {_where(error)}torch.export says: {first} ({type(error).__name__}){hint}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs and prints whole graphs before it raises; the message above says what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _where(error: BaseException) -> str:
    """Name the last line of the traceback that lies outside torch and this file: the user's own."""
    own = Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if own not in path.parents and path != Path(__file__) and frame.name != "<module>" and frame.line:
            return f"at {path.name}:{frame.lineno} in {frame.name}, `{frame.line}`: "
    return ""


def _layers(program: torch.export.ExportedProgram, model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Find the convolutions and linear layers that are plain torch modules called once; say of others why not."""
    parameters = program.graph_signature.inputs_to_parameters
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    for node in program.graph.nodes:
        operation = str(node.target)
        if operation not in ("aten.conv2d.default", "aten.conv2d.padding", "aten.linear.default"):
            continue
        weight = node.args[1]
        path = parameters.get(weight.name, "") if isinstance(weight, fx.Node) else ""
        name = path.removesuffix(".weight")
        if name == path:
            continue  # a computed weight: torch-pruning and the test by removal find out what it ties
        module = model.get_submodule(name)
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if len(owners[id(module.weight)]) > 1 or len(weight.users) > 1:
            skipped[name] = "it is used more than once"
        elif type(module) not in (nn.Conv2d, nn.Linear) or not stack or stack[-1][0] != name:
            skipped[name] = f"it is a {type(module).__name__}, or its weight is used outside of its own forward"
        else:
            layers[name] = _layer(name, module, node, program)
    return {name: layer for name, layer in layers.items() if name not in skipped}, skipped


def _layer(name: str, module: nn.Module, node: fx.Node, program: torch.export.ExportedProgram) -> Layer:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"].shape, node.meta["val"].shape
    norm = _norm_after(node, program)
    if isinstance(module, nn.Linear):
        rows = int(before.numel()) // module.in_features
        o, i = module.out_features, module.in_features
        one, zero = (1, 1), (0, 0)
        has_bias, size, macs = module.bias is not None, (1, rows), rows * i * o
        return Layer(name, "linear", o, i, one, one, zero, one, 1, size, size, has_bias, macs, norm=norm)
    assert isinstance(module, nn.Conv2d)
    depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
    fixed = ""
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        fixed = f"its padding ({module.padding}, {module.padding_mode}) is not a number of zeros"
    padding = (0, 0) if isinstance(module.padding, str) else pair(module.padding)
    per_output = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
    return Layer(
        name,
        "depthwise" if depthwise else "conv2d",
        module.out_channels,
        module.in_channels,
        pair(module.kernel_size),
        pair(module.stride),
        padding,
        pair(module.dilation),
        module.groups,
        pair(before[-2:]),
        pair(after[-2:]),
        module.bias is not None,
        int(after.numel()) * per_output,
        norm=norm,
        fixed=fixed,
    )


def _norm_after(node: fx.Node, program: torch.export.ExportedProgram) -> str | None:
    users = list(node.users)
    if len(users) != 1 or str(users[0].target) != "aten.batch_norm.default":
        return None
    mean = users[0].args[3]
    name = program.graph_signature.inputs_to_buffers.get(mean.name) if isinstance(mean, fx.Node) else None
    # Running statistics read by two calls belong to a BatchNorm that is used twice: it cannot be folded.
    if name is None or not isinstance(mean, fx.Node) or len(mean.users) > 1:
        return None
    return name.removesuffix(".running_mean")


def _tied(
    model: nn.Module, inputs: tuple[Tensor, ...], layers: Mapping[str, Layer], skipped: Mapping[str, str]
) -> Iterator[Group]:
    """Yield the groups torch-pruning sees; those of which one member is out of our reach come with a reason."""
    import torch_pruning

    names = {id(module): name for name, module in model.named_modules()}
    with _quiet():
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs, verbose=False)
        groups = list(graph.get_all_groups())
    found = [[(dep.target.module, dep.handler.__name__, list(indices)) for dep, indices in group] for group in groups]
    order = {name: index for index, name in enumerate(layers)}
    for members in found:
        producers: dict[str, int] = {}
        consumers: dict[str, list[int]] = {}
        norms: dict[str, None] = {}
        reason = ""
        for module, handler, indices in members:
            name = names.get(id(module), "")
            kind = type(module).__name__
            if name in layers and "out_channels" in handler:
                producers[name] = len(indices)
            elif name in layers:
                consumers.setdefault(name, []).extend(indices)
            elif name in skipped:
                reason = f"layer {name} cannot be changed: {skipped[name]}"
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                norms[name] = None
            elif not kind.startswith("_"):  # torch-pruning's stand-ins for operations without weights start so
                reason = f"{name or 'a parameter outside of layers'} ({kind}) is tied to its channels"
            elif kind in ("_ConcatOp", "_SplitOp"):
                reason = f"its channels are {'concatenated with' if kind == '_ConcatOp' else 'split from'} others"
        makers = sorted(producers, key=order.__getitem__)
        if not makers:
            continue
        width = layers[makers[0]].out_channels
        readers = tuple(sorted(consumers, key=order.__getitem__))
        group = Group(makers[0], width, tuple(makers), readers, tuple(sorted(norms)))
        reason = reason or _reason(group, layers, consumers)
        yield replace(group, prunable=not reason, reason=reason)


def _reason(group: Group, layers: Mapping[str, Layer], consumers: Mapping[str, list[int]]) -> str:
    if not group.consumers:
        return "no layer reads its channels: they are the model's output"
    if all(layers[name].kind == "depthwise" for name in group.producers):
        return "its channels are the model's input"
    for name in (*group.producers, *group.consumers):
        if layers[name].conv_groups > 1 and layers[name].kind != "depthwise":
            return f"layer {name} is a grouped convolution"
    for name in group.producers:
        if layers[name].out_channels != group.width:
            return f"layer {name} ties several of its channels together"
    for name in group.consumers:
        columns = sorted(consumers[name])
        if columns != list(range(layers[name].in_channels)) or len(columns) % group.width:
            return f"layer {name} reads its channels among others"
    return ""


def _removal_fails(model: nn.Module, inputs: tuple[Tensor, ...], layers: Mapping[str, Layer], group: Group) -> str:
    """Remove half the channels and compare with the model whose consumers ignore them; say what differs, if any."""
    if group.width < 2:
        return "it has a single channel"
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(group.width, generator=generator)[: group.width // 2].sort().values
    modules = {name: model.get_submodule(name) for name in (*group.producers, *group.consumers, *group.norms)}
    small: dict[str, nn.Module] = {name: take(modules[name], kept) for name in (*group.producers, *group.norms)}
    masked: dict[str, nn.Module] = {}
    for name in group.consumers:
        columns = spread(kept, layers[name].in_channels // group.width)
        rows = kept if name in group.producers else None
        small[name] = take(modules[name], rows, columns)
        ignoring = copy.deepcopy(modules[name])
        assert isinstance(ignoring, nn.Conv2d | nn.Linear)
        weight = torch.zeros_like(ignoring.weight)
        weight[:, columns] = ignoring.weight[:, columns].detach()
        ignoring.weight = nn.Parameter(weight)
        masked[name] = ignoring
    try:
        with torch.no_grad():
            with _swapped(model, masked):
                expected = _tensors(model(*inputs))
            with _swapped(model, small):
                actual = _tensors(model(*inputs))
    except Exception as error:  # a reshape in the user's forward that counts on the width, say
        return f"the model fails without some of its channels: {str(error).splitlines()[0]}"
    if any(a.shape != b.shape for a, b in zip(actual, expected, strict=True)):
        return "its channels are the model's output"
    for a, b in zip(actual, expected, strict=True):
        if (a - b).abs().max() > 1e-3 * b.abs().max().clamp_min(1e-6):
            return "removing its channels changes more than the layers that read them"
    return ""


@contextlib.contextmanager
def _swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def _tensors(output: Any) -> list[Tensor]:
    from torch.utils import _pytree

    return [leaf.float() for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
