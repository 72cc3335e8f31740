"""Loops over time as ONNX's own LSTM, GRU and RNN nodes, which hold the weights of both products.

A `Recurrence` and the linear layer that makes its gates become one node. Where that layer is no plain one (quantised, factorised) it stays, and
the node's own weight for inputs is the identity. Those nodes compute in floats: a loop in 8 bits is a Scan over its own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.layers.recurrent import Recurrence, States, cell, first_states, outputs_like, state_count, weights_of
from autocomp.layers.w8a8 import QuantLinear
from autocomp.records.recurrent import GATES

# Gates in ONNX's order, by their place in torch's: LSTM input, output, forget, cell; GRU update, reset, hidden [ONNX operators].
_ORDER: dict[str, tuple[int, ...]] = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
_ACTIVATIONS = {"rnn_tanh": ["Tanh"], "rnn_relu": ["Relu"]}

torch.library.define(
    "autocomp::onnx_recurrence",
    "(Tensor x, Tensor? h, Tensor? c, Tensor w, Tensor r, Tensor b, str kind, bool reverse) -> Tensor[]",
)


@torch.library.register_fake("autocomp::onnx_recurrence")
def _(
    x: Tensor, h: Tensor | None, c: Tensor | None, w: Tensor, r: Tensor, b: Tensor, kind: str, reverse: bool
) -> list[Tensor]:
    return list(outputs_like(x, r.shape[2], state_count(kind), False))


class OnnxRecurrence(nn.Module):
    """What a `Recurrence` and its projection are exported as: x [T, N, K] (or [N, T, K]) and states to outputs and last states."""

    w: Tensor
    r: Tensor
    b: Tensor

    def __init__(self, loop: Recurrence, projection: nn.Linear | None) -> None:
        super().__init__()
        recurrent, recurrent_bias = weights_of(loop.hidden)
        weight = torch.eye(len(recurrent)) if projection is None else projection.weight.detach()
        bias = None if projection is None or projection.bias is None else projection.bias.detach()
        zeros = torch.zeros(len(recurrent))
        order = list(_ORDER[loop.kind])

        def ordered(rows: Tensor) -> Tensor:
            result: Tensor = rows.unflatten(0, (GATES[loop.kind], -1))[order].flatten(0, 1)
            return result

        biases = [ordered(zeros if value is None else value) for value in (bias, recurrent_bias)]
        self.register_buffer("w", ordered(weight)[None].contiguous())
        self.register_buffer("r", ordered(recurrent)[None].contiguous())
        self.register_buffer("b", torch.cat(biases)[None])
        self.kind, self.reverse, self.batch_first = loop.kind, loop.reverse, loop.batch_first

    def forward(self, x: Tensor, *states: Tensor | None) -> tuple[Tensor, ...]:
        h, c = [*states, None, None][:2]
        x = x.transpose(0, 1) if self.batch_first else x
        y, *last = torch.ops.autocomp.onnx_recurrence(x, h, c, self.w, self.r, self.b, self.kind, self.reverse)
        return y.transpose(0, 1) if self.batch_first else y, *last


class ScannedRecurrence(nn.Module):
    """What a `Recurrence` in 8 bits is exported as: the same call, its steps as the body of a scan."""

    def __init__(self, loop: Recurrence) -> None:
        super().__init__()
        self.hidden = loop.hidden
        self.kind, self.reverse, self.batch_first = loop.kind, loop.reverse, loop.batch_first

    def forward(self, gates: Tensor, *states: Tensor | None) -> tuple[Tensor, ...]:
        from torch._higher_order_ops.scan import scan  # it has no public name yet

        def step(states: States, x: Tensor) -> tuple[States, Tensor]:
            after = cell(self.kind, x, self.hidden(states[0]), states)
            return after, after[0].clone()

        steps = gates.transpose(0, 1) if self.batch_first else gates
        weight = self.hidden.weight
        assert isinstance(weight, Tensor)
        begin = first_states(self.kind, steps, weight, False, *states)
        last, y = scan(step, tuple(state.clone() for state in begin), steps, dim=0, reverse=self.reverse)
        return y.transpose(0, 1) if self.batch_first else y, *last


def with_onnx_recurrences(model: nn.Module) -> nn.Module:
    """Replace the loops of a model, in place, by what is exported of them; the model is returned."""
    loops = {name: loop for name, loop in model.named_modules() if isinstance(loop, Recurrence)}
    projections = {loop.projection: model.get_submodule(loop.projection) for loop in loops.values()}
    for name, loop in loops.items():
        if isinstance(loop.hidden, QuantLinear):
            model.set_submodule(name, ScannedRecurrence(loop))
            continue
        projection = projections[loop.projection]
        plain = projection if isinstance(projection, nn.Linear) else None
        model.set_submodule(name, OnnxRecurrence(loop, plain))
        if plain is not None:
            model.set_submodule(loop.projection, nn.Identity())
    return model


def translation(op: Any) -> Callable[..., Any]:
    """How the exporter writes an `OnnxRecurrence`; ``op`` are the operators of an opset."""

    def recurrence(x: Any, h: Any, c: Any, w: Any, r: Any, b: Any, kind: str, reverse: bool) -> Any:
        def ints(*values: int) -> Any:
            return op.Constant(value_ints=list(values))

        states = [None if state is None else op.Unsqueeze(state, ints(0)) for state in (h, c)]
        settings: dict[str, Any] = {"hidden_size": int(r.shape[2]), "direction": "reverse" if reverse else "forward"}
        if kind == "lstm":
            y, *last = op.LSTM(x, w, r, b, None, *states, **settings)
        elif kind == "gru":
            y, *last = op.GRU(x, w, r, b, None, states[0], linear_before_reset=1, **settings)
        else:
            y, *last = op.RNN(x, w, r, b, None, states[0], activations=_ACTIVATIONS[kind], **settings)
        return [op.Squeeze(y, ints(1)), *(op.Squeeze(state, ints(0)) for state in last)]

    return recurrence
