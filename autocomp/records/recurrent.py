"""Recurrent layers by kind: how many gates each has, and which have kernels in 8 bits."""

from __future__ import annotations

from typing import Literal

Kind = Literal["lstm", "gru", "rnn_tanh", "rnn_relu"]
GATES: dict[str, int] = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
IN_8_BITS = ("lstm",)  # kinds whose loop there is in 8-bit integers too
