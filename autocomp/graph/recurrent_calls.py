"""Recurrent layers and cells with constant weights → linear layers, and for a layer a loop over time for each direction.

The inputs' share of the gates is one linear layer over all steps. The recurrent weight is a linear layer too: of a cell as it is, of a
layer within its `Recurrence`. So whatever finds, prunes or quantises linear layers does so here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx, nn

from autocomp.graph.layer_calls import Call, Constant
from autocomp.layers.recurrent import Recurrence
from autocomp.records.recurrent import GATES, Kind

aten = torch.ops.aten


class Builder(Protocol):
    """What an expansion may add to the canonical graph, in the place of ``node``."""

    def layer(self, call: Call, node: fx.Node) -> fx.Node: ...
    def operation(self, target: Any, args: tuple[Any, ...], node: fx.Node) -> fx.Node: ...


Expansion = Callable[[Builder, fx.Node, list[Any]], Any]


def _layer(kind: Kind) -> Expansion:
    def expand(builder: Builder, node: fx.Node, args: list[Any]) -> Any:
        """The outputs of a recurrent layer; None where its weights depend on the input, or its states are projected."""
        value, states, parameters, biases, count, _dropout, training, bidirectional, batch_first = args
        each, directions = 4 if biases else 2, 2 if bidirectional else 1
        constant = all(_is_weight(parameter) for parameter in parameters)
        if training or not constant or len(parameters) != each * count * directions or not isinstance(value, fx.Node):
            return None
        states = list(states) if kind == "lstm" else [states]
        last: list[list[fx.Node]] = [[] for _ in states]
        for index in range(count):
            outputs = []
            for direction in range(directions):
                number = index * directions + direction
                own = parameters[number * each : (number + 1) * each]
                place = f"l{index}" + ("_reverse" if direction else "")
                begin = tuple(_state(builder, node, state, number) for state in states)
                layout = ("reverse", direction == 1), ("batch_first", bool(batch_first))
                loop = _loop(builder, node, kind, value, own, place, begin, layout)
                outputs.append(builder.operation(_ITEM, (loop, 0), node))
                for kept, item in zip(last, range(1, 3), strict=False):
                    kept.append(builder.operation(_ITEM, (loop, item), node))
            value = outputs[0] if directions == 1 else builder.operation(aten.cat.default, (outputs, 2), node)
        return (value, *(builder.operation(aten.stack.default, (ends, 0), node) for ends in last))

    return expand


def _loop(
    builder: Builder, node: fx.Node, kind: Kind, value: fx.Node, own: Sequence[Constant], place: str,
    begin: tuple[Any, ...], layout: tuple[tuple[str, Any], ...],
) -> fx.Node:  # fmt: skip
    gates = builder.layer(_linear(value, own[0], own[2] if len(own) > 2 else None, _name(own[0], f"ih_{place}")), node)
    tensors = {"hidden.weight": own[1].value, "hidden.bias": own[3].value if len(own) > 2 else None}
    settings = (("kind", kind), ("width", own[1].value.shape[1]), ("bias", len(own) > 2), *layout)
    while begin and begin[-1] is None:
        begin = begin[:-1]
    return builder.layer(Call(Recurrence, settings, tensors, gates, _name(own[1], f"hh_{place}"), others=begin), node)


def _linear(source: Any, weight: Constant, bias: Constant | None, path: str) -> Call:
    settings = (("in_features", weight.value.shape[1]), ("out_features", len(weight.value)), ("bias", bias is not None))
    tensors = {"weight": weight.value, "bias": None if bias is None else bias.value}
    return Call(nn.Linear, settings, tensors, source, path)


def _cell(kind: Kind) -> Expansion:
    def expand(builder: Builder, node: fx.Node, args: list[Any]) -> Any:
        """The new state or states of a cell; None where its weights depend on the input."""
        value, states, *parameters = args
        own = [*parameters, None, None][:4]
        states = list(states) if kind == "lstm" else [states]
        if not all(parameter is None or _is_weight(parameter) for parameter in own):
            return None
        if not isinstance(value, fx.Node) or not isinstance(states[0], fx.Node):
            return None

        def call(target: Any, *arguments: Any) -> fx.Node:
            return builder.operation(target, arguments, node)

        x = builder.layer(_linear(value, own[0], own[2], _name(own[0], "ih")), node)
        s = builder.layer(_linear(states[0], own[1], own[3], _name(own[1], "hh")), node)
        count = GATES[kind]

        def parts(whole: fx.Node) -> list[fx.Node]:
            chunks = call(aten.chunk.default, whole, count, -1)
            return [call(_ITEM, chunks, index) for index in range(count)]

        if kind == "lstm":
            take, forget, new, out = parts(call(aten.add.Tensor, x, s))
            take, forget, out = (call(aten.sigmoid.default, gate) for gate in (take, forget, out))
            kept = call(aten.mul.Tensor, forget, states[1])
            c = call(aten.add.Tensor, kept, call(aten.mul.Tensor, take, call(aten.tanh.default, new)))
            return call(aten.mul.Tensor, out, call(aten.tanh.default, c)), c
        if kind == "gru":
            (xr, xz, xn), (sr, sz, sn) = parts(x), parts(s)
            reset = call(aten.sigmoid.default, call(aten.add.Tensor, xr, sr))
            update = call(aten.sigmoid.default, call(aten.add.Tensor, xz, sz))
            new = call(aten.tanh.default, call(aten.add.Tensor, xn, call(aten.mul.Tensor, reset, sn)))
            change = call(aten.mul.Tensor, update, call(aten.sub.Tensor, states[0], new))
            return call(aten.add.Tensor, new, change)
        total = call(aten.add.Tensor, x, s)
        return call(aten.tanh.default if kind == "rnn_tanh" else aten.relu.default, total)

    return expand


def _state(builder: Builder, node: fx.Node, states: Any, index: int) -> fx.Node | None:
    """The initial state ``[N, H]`` of one layer and direction; None if it is zero."""
    if isinstance(states, Constant):
        zero = not bool(states.value.any())
    else:
        zero = isinstance(states, fx.Node) and states.op == "call_function" and states.target in _ZEROS
    return None if zero else builder.operation(aten.select.int, (states, 0, index), node)


def _is_weight(value: Any) -> bool:
    return isinstance(value, Constant) and value.value.dtype == torch.float32


def _name(weight: Constant, else_named: str) -> str:
    """``rnn.weight_ih_l0`` → ``rnn.ih_l0``; of a computed weight the second, in the module that it stands in."""
    owner, dot, last = weight.path.rpartition(".")
    if last.startswith("weight_"):
        return f"{owner}{dot}{last.removeprefix('weight_')}"
    return weight.path or f".{else_named}"


_ITEM = operator.getitem
_ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
_KINDS: Mapping[str, Kind] = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "rnn_tanh", "rnn_relu": "rnn_relu"}

EXPANSIONS: Mapping[str, Expansion] = {
    **{f"aten.{name}.input": _layer(kind) for name, kind in _KINDS.items()},
    "aten.lstm_cell.default": _cell("lstm"),
    **{f"aten.{name}_cell.default": _cell(kind) for name, kind in _KINDS.items() if name != "lstm"},
}
