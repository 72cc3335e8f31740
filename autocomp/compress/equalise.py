"""Cross-layer equalisation: the channels between two layers brought to like ranges, the function of the model unchanged.

One 8-bit scale serves all channels of an activation, so that a channel with a small range is left few of its 256 levels; depthwise
networks suffer most (Nagel et al. 2019, arXiv:1906.04721). Dividing what makes channel c by s_c and multiplying what reads it by s_c
changes nothing where the activation between is positively homogeneous (ReLU, or none). Ranges come from the calibration data, as in
SmoothQuant (arXiv:2211.10438). The s_c are powers of two: no weight is rounded, and the model's outputs stay what they were.

ReLU6 is not homogeneous: a channel whose values reach 6 keeps its scale, and no other is brought to reach it; that keeps the function
on the calibration data, where these ranges were seen, and is reported with the site.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, fx, nn

from autocomp.graph.batches import split
from autocomp.layers.convolution import Layers
from autocomp.layers.hooks import hooked

if TYPE_CHECKING:
    from autocomp.graph.batches import Axes, Batch
    from autocomp.graph.graph import Graph

Between = Literal["nothing", "relu", "relu6"]
_ACTIVATIONS: dict[str, Between] = {
    "aten.relu.default": "relu",
    "aten.relu_.default": "relu",
    "aten.relu6.default": "relu6",
    "aten.relu6_.default": "relu6",
    "aten.hardtanh.default": "relu6",  # with the bounds 0 and 6; others are no site
    "aten.hardtanh_.default": "relu6",
}
CEILING = 6.0  # of ReLU6
LARGEST = 2.0**8  # a channel is scaled by no more: what is smaller than that is noise


@dataclass(frozen=True)
class Site:
    """Where channels may be rescaled: made by layer ``first`` (and ``norm``), read by layer ``second`` alone.

    ``scaled`` channels were given another scale; ``gain`` is the ratio of the largest to the median channel's range before, over after.
    """

    first: str
    norm: str | None
    second: str
    between: Between
    scaled: int = 0
    gain: float = 1.0


def equalised(
    model: nn.Module,
    graph: Graph,
    example_inputs: tuple[Tensor, ...],
    batches: Sequence[Batch],
    axes: Axes | None = None,
) -> tuple[nn.Module, list[Site]]:
    """Return a copy of ``model`` whose channels have like ranges on the calibration ``batches``, and what was done where.

    ``axes`` is as ``Task.batch_axes``.

    ``graph`` is that of the model. Nothing is changed (and the list is empty) where no two layers follow each other directly.
    """
    found = sites(model, graph, example_inputs)
    result = copy.deepcopy(model).eval()
    ranges = _ranges(result, [site.second for site in found], batches, graph, axes)
    done = [_equalise(result, graph, site, ranges[site.second]) for site in found]
    return result, done


def sites(model: nn.Module, graph: Graph, example_inputs: tuple[Tensor, ...]) -> list[Site]:
    """Find the pairs of layers with at most a BatchNorm and a ReLU or ReLU6 between them, nothing else reading what is between."""
    from autocomp.graph.canonical import canonical

    model = canonical(model, example_inputs)
    assert model.code.graph is not None
    found = []
    for node in model.code.graph.nodes:
        second = _layer_at(node, graph)
        if second is None or not isinstance(node.args[0], fx.Node):
            continue
        described = graph.layers[second]
        if described.conv_groups > 1 and described.kind != "depthwise":
            continue
        before: object = node.args[0]
        between: Between = "nothing"
        if isinstance(before, fx.Node) and str(before.target) in _ACTIVATIONS:
            between = _ACTIVATIONS[str(before.target)]
            if "hardtanh" in str(before.target) and tuple(before.args[1:3]) != (0.0, CEILING):
                continue
            if len(before.users) > 1:
                continue
            before = before.args[0]
        norm = None
        if not isinstance(before, fx.Node):
            continue
        if before.op == "call_module" and before.target in graph.norms().values():
            if len(before.users) > 1:
                continue
            norm = str(before.target)
            before = before.args[0]
        if not isinstance(before, fx.Node):
            continue
        first = _layer_at(before, graph)
        if first is None or len(before.users) > 1 or graph.layers[first].out_channels != described.in_channels:
            continue
        if norm is not None and getattr(model.get_submodule(norm), "weight", None) is None:
            continue
        found.append(Site(first, norm, second, between))
    return found


def _layer_at(node: fx.Node, graph: Graph) -> str | None:
    layer = graph.layers.get(str(node.target)) if node.op == "call_module" else None
    return layer.name if layer is not None and layer.calls == 1 and layer.is_plain else None


def _ranges(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], graph: Graph, axes: Axes | None
) -> dict[str, Tensor]:
    """The largest magnitude of each input channel of some layers."""
    ranges: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            channel = x.dim() - 1 if graph.layers[name].kind == "linear" else 1
            seen = x.detach().abs().amax([axis for axis in range(x.dim()) if axis != channel])
            ranges[name] = torch.maximum(ranges[name], seen) if name in ranges else seen

        return hook

    with hooked(model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names), torch.no_grad():
        for batch in batches:
            for piece in split(batch, 64, axes):
                model(*piece)
    return ranges


def _equalise(model: nn.Module, graph: Graph, site: Site, ranges: Tensor) -> Site:
    """Rescale the channels of one site in place."""
    free = ranges > 0
    if site.between == "relu6":
        free &= ranges < CEILING
    if int(free.sum()) < 2:
        return site
    second = model.get_submodule(site.second)
    maker = model.get_submodule(site.first if site.norm is None else site.norm)
    assert isinstance(second, Layers)
    assert isinstance(maker, (*Layers, nn.BatchNorm1d, nn.BatchNorm2d))
    depthwise = graph.layers[site.second].kind == "depthwise"
    weight = second.weight.detach()
    reads = (weight.flatten(1) if depthwise else weight.transpose(0, 1).flatten(1)).abs().amax(1)
    # A depthwise row has a scale of its own, so all of the imbalance may move into it; else the two sides share it.
    wanted = ranges.double() if depthwise else (ranges.double() / reads.double().clamp_min(1e-12)).sqrt()
    middle = wanted[free].log().mean().exp()
    scale = torch.where(free, wanted / middle, torch.ones_like(wanted)).clamp(1 / LARGEST, LARGEST)
    scale = scale.log2().round().exp2()
    if site.between == "relu6":  # nothing may come to reach the ceiling
        scale = torch.where(ranges / scale < CEILING, scale, torch.ones_like(scale))
    scale = scale.to(weight.dtype)
    with torch.no_grad():
        maker.weight.div_(scale.view(-1, *([1] * (maker.weight.dim() - 1))))
        if maker.bias is not None:
            maker.bias.div_(scale)
        shape = (-1, *([1] * (weight.dim() - 1))) if depthwise else (1, -1, *([1] * (weight.dim() - 2)))
        second.weight.mul_(scale.view(shape))
    before, after = ranges[ranges > 0], (ranges / scale)[ranges > 0]
    gain = float(before.max() / before.median() / (after.max() / after.median()))
    return Site(site.first, site.norm, site.second, site.between, int((scale != 1).sum()), gain)
