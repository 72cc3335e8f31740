"""A recurrent layer's loop over time as a module: what the inputs add to the gates comes in, the recurrent weight is a linear layer of its own.

So both weights of a recurrent layer are linear layers, found, calibrated and narrowed as others are. The CPU implementations of
``autocomp::lstm`` and ``autocomp::rnn`` ARE the specification; the compiler's loops are held to them. With ``s = hidden(h)``, the gates
in torch's order and everything elementwise, a step is

    lstm    i, f, g, o = x[t] + s;  c = sigmoid(f) * c + sigmoid(i) * tanh(g);  h = sigmoid(o) * tanh(c)
    gru     r, z = sigmoid(x[t] + s);  n = tanh(x_n[t] + r * s_n);  h = (1 - z) * n + z * h
    rnn_*   h = tanh(x[t] + s), or relu

``autocomp::lstm_w8a8`` is an LSTM's loop in 8 bits: with q - zp and the weight's integers as in `layers.w8a8`,
``s = float32(sum((q(h) - zp) * w)) * scale``, and the bias is added to x before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.layers.part import Stored
from autocomp.layers.w8a8 import FLOAT32_EXACT, QuantLinear, largest_sum, quantise_centred
from autocomp.records.recurrent import GATES, IN_8_BITS, Kind

States = tuple[Tensor, ...]  # the hidden state [N, H], and an LSTM's cell


@torch.library.custom_op(
    "autocomp::lstm",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor gates, Tensor? h, Tensor? c, Tensor w, Tensor? bias, bool reverse, bool batch_first) -> (Tensor, Tensor, Tensor)",
)
def lstm(
    gates: Tensor, h: Tensor | None, c: Tensor | None, w: Tensor, bias: Tensor | None, reverse: bool, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates [N, T, 4 H] (or [T, N, 4 H]), states [N, H] (None: zeros), weight [4 H, H], bias [4 H] to outputs [N, T, H] and last states."""
    y, (h, c) = _loop(
        "lstm", gates, first_states("lstm", gates, w, batch_first, h, c), _share(w, bias), reverse, batch_first
    )
    return y, h.clone(), c.clone()


@torch.library.custom_op(
    "autocomp::rnn",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor gates, Tensor? h, Tensor w, Tensor? bias, str kind, bool reverse, bool batch_first) -> (Tensor, Tensor)",
)
def rnn(
    gates: Tensor, h: Tensor | None, w: Tensor, bias: Tensor | None, kind: str, reverse: bool, batch_first: bool
) -> tuple[Tensor, Tensor]:
    """As ``autocomp::lstm`` for the kinds without a cell: outputs and the last state."""
    y, (h,) = _loop(kind, gates, first_states(kind, gates, w, batch_first, h), _share(w, bias), reverse, batch_first)
    return y, h.clone()


@torch.library.custom_op(
    "autocomp::lstm_w8a8",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor gates, Tensor? h, Tensor? c, Tensor w, Tensor scale, Tensor bias, float inv_xs, int zp, bool reverse, bool batch_first) "
    "-> (Tensor, Tensor, Tensor)",
)
def lstm_w8a8(
    gates: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    inv_xs: float,
    zp: int,
    reverse: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``autocomp::lstm`` with an int8 weight [4 H, H]; ``scale`` and ``bias`` [4 H] are float32."""
    exact = torch.float32 if largest_sum(w, zp) < FLOAT32_EXACT else torch.float64
    weight = w.to(exact).T.contiguous()

    def share(state: Tensor) -> Tensor:
        return torch.mm(quantise_centred(state, inv_xs, zp).to(exact), weight).float().mul_(scale)

    y, (h, c) = _loop(
        "lstm", gates + bias, first_states("lstm", gates, w, batch_first, h, c), share, reverse, batch_first
    )
    return y, h.clone(), c.clone()


def _lstm_results(gates: Tensor, h: Tensor | None, c: Tensor | None, w: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return outputs_like(gates, w.shape[1], 2, rest[-1])


lstm.register_fake(_lstm_results)
lstm_w8a8.register_fake(_lstm_results)


@rnn.register_fake
def _(gates: Tensor, h: Tensor | None, w: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return outputs_like(gates, w.shape[1], 1, rest[-1])


def outputs_like(x: Tensor, hidden: int, states: int, batch_first: bool) -> tuple[Tensor, ...]:
    """Empty outputs and last states for an input of this layout."""
    batch = x.shape[0 if batch_first else 1]
    return (x.new_empty((*x.shape[:2], hidden)), *(x.new_empty((batch, hidden)) for _ in range(states)))


class Recurrence(nn.Module):
    """Runs one recurrent layer in one direction over ``gates``, what its inputs (and their bias) add to each gate at each step.

    ``hidden`` is the recurrent weight: a linear layer [gates * H, H], in any form that its weights are stored in; sums are in integers
    where it is a `QuantLinear`, else in float32. ``projection`` names the linear layer that makes the gates and
    that nothing else reads.
    """

    hidden: nn.Module

    def __init__(self, kind: Kind, width: int, bias: bool, reverse: bool, batch_first: bool) -> None:
        super().__init__()
        assert kind in get_args(Kind)
        self.kind, self.reverse, self.batch_first = kind, reverse, batch_first
        self.hidden = nn.Linear(width, GATES[kind] * width, bias)
        self.projection = ""

    def forward(self, gates: Tensor, *states: Tensor | None) -> tuple[Tensor, ...]:
        """Gates [N, T, gates * H] (or [T, N, gates * H]) and states [N, H] (None or left out: zeros) to outputs and the last states."""
        given = [None if state is None else state.detach() for state in states]
        given += [None] * (state_count(self.kind) - len(given))
        weight, bias = weights_of(self.hidden)
        layout = self.reverse, self.batch_first
        if isinstance(self.hidden, QuantLinear):
            q = self.hidden
            assert self.kind in IN_8_BITS
            outputs: tuple[Tensor, ...] = lstm_w8a8(
                gates.detach(), *given, q.weight, q.scale, q.bias, q.inv_xs, q.zp, *layout
            )
        elif self.kind == "lstm":
            outputs = lstm(gates.detach(), *given, weight, bias, *layout)
        else:
            outputs = rnn(gates.detach(), *given, weight, bias, self.kind, *layout)
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return outputs
        return self._with_gradients(
            gates, first_states(self.kind, gates, weight, self.batch_first, *states), outputs[0], weight
        )

    def _with_gradients(self, gates: Tensor, states: States, outputs: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """The same values and the gradients of the loop, with the recurrent layer called once, on the states of all steps.

        So hooks on it see all that it reads and makes in one call, and its gradient is that of back-propagation through time.
        """
        time = 1 if self.batch_first else 0
        first = states[0].detach().unsqueeze(time)
        others = outputs.narrow(time, 1 if self.reverse else 0, outputs.shape[time] - 1)
        before = torch.cat((others, first) if self.reverse else (first, others), time)
        shares = iter(_steps(self.hidden(before), self.reverse, time))

        def share(h: Tensor) -> Tensor:
            known: Tensor = _KnownShare.apply(next(shares), h, weight)
            return known

        y, last = _loop(self.kind, gates, states, share, self.reverse, self.batch_first)
        return y, *last

    def extra_repr(self) -> str:
        return f"{self.kind}, reverse={self.reverse}, batch_first={self.batch_first}"


class _KnownShare(torch.autograd.Function):
    """A state's share of the gates, which is known already: the layer's gradients are those of the value, the state's those of the product."""

    @staticmethod
    def forward(ctx: Any, known: Tensor, _state: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return known.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient, gradient @ weight, None


def weights_of(hidden: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight [gates * H, H] and bias that a recurrent layer's linear layer multiplies by, in float32. TypeError if it is none."""
    if isinstance(hidden, nn.Linear):
        return hidden.weight.detach(), None if hidden.bias is None else hidden.bias.detach()
    if isinstance(hidden, Stored):
        return hidden.float_weight(), hidden.bias
    raise TypeError(f"a loop over time has no form with a {type(hidden).__name__}")


def state_count(kind: str) -> int:
    return 2 if kind == "lstm" else 1


def first_states(kind: str, gates: Tensor, weight: Tensor, batch_first: bool, *states: Tensor | None) -> States:
    """The states [N, H] that a loop begins with: those given, zeros for others."""
    given = [*states, *[None] * (state_count(kind) - len(states))]
    zeros = gates.new_zeros((gates.shape[0 if batch_first else 1], weight.shape[1]))
    return tuple(zeros if state is None else state for state in given)


def _share(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda state: functional.linear(state, weight, bias)


def cell(kind: str, x: Tensor, share: Tensor, states: States) -> States:
    """One step: what inputs and hidden state add to the gates, and the states before, to those after."""
    if kind == "lstm":
        take, forget, new, out = (x + share).chunk(4, -1)
        c = forget.sigmoid() * states[1] + take.sigmoid() * new.tanh()
        return out.sigmoid() * c.tanh(), c
    if kind == "gru":
        width = states[0].shape[-1]
        reset, update = (x[..., : 2 * width] + share[..., : 2 * width]).sigmoid().chunk(2, -1)
        new = (x[..., 2 * width :] + reset * share[..., 2 * width :]).tanh()
        return (new + update * (states[0] - new),)
    total = x + share
    return (total.tanh() if kind == "rnn_tanh" else total.relu(),)


def _steps(x: Tensor, reverse: bool, time: int) -> tuple[Tensor, ...]:
    steps: tuple[Tensor, ...] = x.unbind(time)
    return steps[::-1] if reverse else steps


def _loop(
    kind: str, gates: Tensor, states: States, share: Callable[[Tensor], Tensor], reverse: bool, batch_first: bool
) -> tuple[Tensor, States]:
    time = 1 if batch_first else 0
    found = []
    for x in _steps(gates, reverse, time):
        states = cell(kind, x, share(states[0]), states)
        found.append(states[0])
    return torch.stack(found[::-1] if reverse else found, time), states
