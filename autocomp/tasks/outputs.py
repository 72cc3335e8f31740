"""What a model's outputs are, and so by what they are compared: stated by the task, or guessed from the dense model's own answers.

`Task.outputs` states it in a small notation: a kind, and after ``@`` the axis it lies along (of the whole tensor, samples included; negative
from the end). ``"classes@1"`` for one output; a sequence of such texts, one for each output tensor in order; or a mapping from the names of
outputs (keys of a dict or fields of a dataclass; places in a tuple: ``"0"``, ``"1.2"``) to such texts, where outputs that are not named
do not count. Kinds:

``classes``               scores of classes, of which one is right: logits or log-probabilities (also for every token, frame or pixel)
``probabilities``         the same after a softmax
``binary``                logits of yes and no, each by itself
``binary-probabilities``  the same after a sigmoid
``regression``            numbers; along the axis are quantities with a scale each
``embedding``             vectors compared by their cosine
``decisions``             integers or booleans: class numbers, masks
``ignored``               does not count
``auto``                  to be guessed
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from autocomp.errors import UsageError, suggest

Kind = Literal[
    "classes", "probabilities", "binary", "binary-probabilities", "regression", "embedding", "decisions", "ignored"
]
Stated = str | Sequence[str] | Mapping[str, str]

KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Output:
    """One tensor among a model's outputs. ``axis`` is that of its classes, quantities or vectors (None: each value by itself).

    ``samples`` is the axis along which samples lie; it may hold several rows a sample, side by side. ``why`` says where this is known from,
    ``shape`` that of the tensor for the samples looked at.
    """

    name: str
    kind: Kind
    axis: int | None = None
    samples: int | None = 0
    why: str = "stated"
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.kind if self.axis is None else f"{self.kind}@{self.axis}"


def leaves(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's output with their names: of tuples, mappings and dataclasses, in order. Others are passed over."""
    if isinstance(output, Tensor):
        yield name or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(output, tuple | list):
        names = getattr(output, "_fields", range(len(output)))
        for key, value in zip(names, output, strict=True):
            yield from leaves(value, f"{name}.{key}" if name else str(key))
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from leaves(getattr(output, field.name), f"{name}.{field.name}" if name else field.name)


def parse(stated: Stated | None) -> Stated | None:
    """Return what a task states, once each text in it reads as one of the notation. UsageError otherwise."""
    if stated is None:
        return None
    if isinstance(stated, str):
        texts: list[object] = [stated]
    elif isinstance(stated, Mapping):
        texts = list(stated.values())
    elif isinstance(stated, Sequence):
        texts, stated = list(stated), tuple(stated)
    else:
        raise UsageError(
            "Task.outputs must be a text such as 'classes@1', a sequence of them, or a mapping from names of outputs, "
            f"got a value of type {type(stated).__name__}"
        )
    if not texts:
        raise UsageError("Task.outputs is empty: state at least one output, or leave it out to have all guessed")
    for text in texts:
        read(text)
    return stated


def read(text: object) -> tuple[str, int | None]:
    """Return the kind and the axis that one text states. UsageError if it is none of the notation."""
    if not isinstance(text, str):
        raise UsageError(f"Task.outputs must state each output by a text such as 'classes@1', got {text!r}")
    kind, at, axis = text.partition("@")
    if kind not in (*KINDS, "auto"):
        raise UsageError(
            f"Task.outputs: {kind!r} is no kind of output.{suggest(kind, KINDS)} Kinds: {', '.join(KINDS)}, auto"
        )
    if at and not re.fullmatch(r"-?\d+", axis):
        raise UsageError(f"Task.outputs: after @ stands the number of an axis, as in classes@1; got {text!r}")
    return kind, int(axis) if at else None
