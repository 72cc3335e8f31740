"""What a model is made of: its layers, their shapes, and the groups of channels that must go together.

`torch.export` runs first, so a model that cannot be compiled is refused here, with the place in its own source. The
tied channels are followed through the exported graph (`ties`); what that says of a group is then put to the test by
removing half of it and comparing the outputs, so that a group is offered only if it works (`groups`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx, nn

from autocomp.attention import kept_because
from autocomp.compress.quantize import pair
from autocomp.errors import ExportError
from autocomp.groups import Group as Group
from autocomp.groups import make_groups, verified
from autocomp.ties import trace

Kind = Literal["conv2d", "depthwise", "linear"]

_COMPUTED = (
    "its weight is computed (weight_norm or another parametrisation): bake it in first, with "
    "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.remove_weight_norm"
)
_PACKED = (
    "nn.MultiheadAttention holds its projections in one parameter and could not be written out: {}; "
    "write the attention with an nn.Linear for each projection, and its heads can be removed"
)


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer. Sizes are (height, width); a linear layer over R rows has the size (1, R).

    ``in_group`` and ``out_group`` name the groups its input columns and output channels belong to (None: the model's
    input, or channels that stay; both are the same for a grouped convolution, depthwise or not, which loses whole
    groups). ``norm`` names the BatchNorm that alone reads the output. ``macs`` are of one call on the example inputs.
    ``one_d`` is a convolution of [N, C, L], described as one over pictures a row high. ``fixed`` says why only fp32 at
    full rank is possible; empty otherwise.
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
    norm: str | None = None
    fixed: str = ""
    one_d: bool = False

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.out_channels * (self.in_channels // self.conv_groups) * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class Graph:
    """Layers and groups of a model by name, in the order of execution.

    ``other_bytes`` is the size of all parameters and buffers that belong to no layer and fold into none, at full width. ``skipped``
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

    Layers that are called more than once, share weights, are parametrised or override torch's own forward are named in
    ``skipped`` and stay as they are, as do groups that they take part in. ExportError if `torch.export` refuses the
    model: it names the operation and the line.
    """
    try:
        model = copy.deepcopy(model).eval()
    except Exception as error:  # whatever a module holds: the weights that old weight_norm computes, a lock, a file
        reason = str(error).split(". ")[0]
        hint = "; bake in weight_norm first (torch.nn.utils.remove_weight_norm)" if "weight_norm" in str(error) else ""
        raise ExportError(f"the model cannot be copied, which every candidate needs: {reason}{hint}") from error
    program = export(model, example_inputs)
    layers, skipped = _layers(program, model)
    folded = {*layers, *(layer.norm for layer in layers.values() if layer.norm is not None)}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    other = sum(t.numel() * t.element_size() for name, t in tensors if name.rpartition(".")[0] not in folded)
    groups = {}
    ties = trace(program, model, layers, skipped)
    for group in make_groups(ties, layers, model):
        if group.prunable:
            group = verified(model, example_inputs, ties, group)
        groups[group.name] = group
        for name in group.producers:
            layers[name] = replace(layers[name], out_group=group.name)
        for name in group.columns:
            layers[name] = replace(layers[name], in_group=group.name)
    order = {name: index for index, name in enumerate(layers)}
    groups = dict(sorted(groups.items(), key=lambda item: order[item[0]]))
    return Graph(layers, groups, other, skipped)


def export(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Run `torch.export`; ExportError names the operation it stumbled over and the line of the model."""
    try:
        with _quiet(), torch.no_grad():
            return _without_dead_code(torch.export.export(model, example_inputs))
    except Exception as error:  # torch.export lets any exception of the user's code through
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = ""
        if "data-dependent" in first:
            hint = "; control flow that depends on values of tensors must be written with torch.where or torch.cond"
        raise ExportError(
            f"the model cannot be exported: {_where(error)}torch.export says: {first} ({type(error).__name__}){hint}"
        ) from error


def _without_dead_code(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Drop what nobody reads, such as attention's weights beside its output: compiling drops it too.

    What reads a parameter stays, and so does all that leads to it: a layer runs, in torch, whether or not it is read.
    """
    signature = program.graph_signature
    held = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
    program.graph.eliminate_dead_code(
        lambda node: node.is_impure() or any(source.name in held for source in node.all_input_nodes)
    )
    return program


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
        if operation.rpartition(".")[0] not in ("aten.conv1d", "aten.conv2d", "aten.linear"):
            continue
        weight = node.args[1]
        path = parameters.get(weight.name, "") if isinstance(weight, fx.Node) else ""
        name = path.removesuffix(".weight")
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if name == path:
            owner = stack[-1][0] if stack else ""
            if not path and isinstance(model.get_submodule(owner), nn.Conv1d | nn.Conv2d | nn.Linear):
                skipped[owner] = _COMPUTED
            continue
        module = model.get_submodule(name)
        if len(owners[id(module.weight)]) > 1 or len(weight.users) > 1:
            skipped[name] = "it is used more than once"
        elif type(module) not in (nn.Conv1d, nn.Conv2d, nn.Linear) or not stack or stack[-1][0] != name:
            skipped[name] = f"it is a {type(module).__name__}, or its weight is used outside of its own forward"
        else:
            layers[name] = _layer(name, module, node, program)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            skipped.pop(f"{name}.out_proj".removeprefix("."), None)
            skipped[name] = _PACKED.format(kept_because(module, model) or "the model did not come in a Task")
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
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    one_d = isinstance(module, nn.Conv1d)
    depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
    fixed = ""
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        fixed = f"its padding ({module.padding}, {module.padding_mode}) is not a number of zeros"
    padding = (0, 0) if isinstance(module.padding, str) else _pair(module.padding, 0)
    kernel = _pair(module.kernel_size, 1)
    per_output = module.in_channels // module.groups * kernel[0] * kernel[1]
    return Layer(
        name,
        "depthwise" if depthwise else "conv2d",
        module.out_channels,
        module.in_channels,
        kernel,
        _pair(module.stride, 1),
        padding,
        _pair(module.dilation, 1),
        module.groups,
        (1, int(before[-1])) if one_d else pair(before[-2:]),
        (1, int(after[-1])) if one_d else pair(after[-2:]),
        module.bias is not None,
        int(after.numel()) * per_output,
        norm=norm,
        fixed=fixed,
        one_d=one_d,
    )


def _pair(sizes: Sequence[int], lead: int) -> tuple[int, int]:
    """(height, width) of a convolution's sizes; one over [N, C, L] is over a picture one row high."""
    return pair((lead, *sizes) if len(sizes) == 1 else sizes)


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
