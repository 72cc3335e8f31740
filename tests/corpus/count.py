"""Multiplications of a model, counted on its exported graph alone: the denominator of every share in the table."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from corpus.weights import tensors


@dataclass(frozen=True)
class Count:
    """Multiplications of one inference: ``weights`` of inputs by weights (what compression can reach), ``activations`` of inputs by inputs.

    ``parameters`` and ``buffers`` are the numbers of values the model holds.
    """

    weights: int
    activations: int
    parameters: int
    buffers: int


def count(model: nn.Module, inputs: tuple[Tensor, ...]) -> Count:
    """Count the products of convolutions, linear layers and matrix products, of any operation they are written with.

    A product is one by weights if one of its factors does not depend on the model's inputs. A model that torch.export refuses counts none.
    """
    parameters, buffers = (sum(t.numel() for t in held) for held in (model.parameters(), model.buffers()))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch, of the flat weights of recurrent layers
            exported = torch.export.export(_Tensors(model), inputs).run_decompositions()
    except Exception:
        return Count(0, 0, parameters, buffers)
    given = set(exported.graph_signature.user_inputs)
    depends: set[fx.Node] = set()
    totals = {True: 0, False: 0}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in given:
                depends.add(node)
            continue
        if any(source in depends for source in node.all_input_nodes):
            depends.add(node)
        number, factors = _products(node)
        if number and any(factor in depends for factor in factors):
            totals[all(factor in depends for factor in factors)] += number
    return Count(totals[False], totals[True], parameters, buffers)


class _Tensors(nn.Module):
    """A model whose outputs are nothing but tensors: torch.export knows few of the classes that hold them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return tensors(self.model(*inputs))


def _products(node: fx.Node) -> tuple[int, tuple[fx.Node, ...]]:
    """How many multiplications a node makes, and its two factors."""
    if node.op != "call_function":
        return 0, ()
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    arguments = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"):
        first, second = arguments[-2:]
        a, b = _shape(first), _shape(second)
        columns = b[-1] if len(b) > 1 else 1
        return math.prod(a) * columns, (first, second)
    if name == "convolution":
        source, weight = arguments[:2]
        transposed, groups = bool(node.args[6]), node.args[8]
        assert isinstance(groups, int)
        channels, *kernel = _shape(weight)[1:]
        # each value of the smaller side meets the kernel once for each channel of its group on the other side
        points = math.prod(_shape(source)) if transposed else math.prod(_shape(node))
        return points * channels * math.prod(kernel), (source, weight)
    if "scaled_dot_product" in name or "_attention_" in name:
        query, key, value = arguments[:3]
        q, k, v = _shape(query), _shape(key), _shape(value)
        return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]), (query, key)
    return 0, ()


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    if isinstance(value, tuple | list):
        value = value[0]
    return tuple(int(size) for size in value.shape)
