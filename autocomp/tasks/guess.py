"""What each output of a model is, where the task does not say: read off the dense model's answers to a few samples.

Evidence, strongest first: the type of the numbers; whether rows sum to one; names and shapes that say what they are (boxes beside scores, a
picture like the one put in); vectors of length one; values between 0 and 1. What is left is taken for scores of classes, along the axis
that is of no length and whose places differ most: classes differ by how frequent they are, places of a picture much less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autocomp.errors import UsageError, suggest
from autocomp.graph.batches import Axes, Batch, axes_of, count, first, part
from autocomp.tasks.outputs import Kind, Output, Stated, leaves, read

LOOKED_AT = 16  # samples a guess is made from
CLOSE = 1e-3  # how near to one a sum or a length must be
PICTURE = 4  # channels a picture has at most
VECTOR = 8  # numbers a vector of length one has at least: shorter ones are directions or quaternions

Rank = Literal[
    "counts", "inner", "decisions", "constant"
]  # the last three count only where there is nothing before them

# Words in the names of outputs that say more than values can.
_NAMED: tuple[tuple[str, Kind, Rank], ...] = (
    ("last_hidden", "embedding", "counts"),
    ("embed", "embedding", "counts"),
    ("pool", "embedding", "counts"),
    ("hidden", "embedding", "inner"),
    ("attention", "regression", "inner"),
    ("past", "regression", "inner"),
    ("cache", "regression", "inner"),
    ("state", "regression", "inner"),
    ("box", "regression", "counts"),
    ("coord", "regression", "counts"),
    ("keypoint", "regression", "counts"),
    ("depth", "regression", "counts"),
)


def describe(
    model: nn.Module, batches: Sequence[Batch], axes: Axes | None = None, stated: Stated | None = None
) -> tuple[Output, ...]:
    """Return what each output tensor of a model is, in order, from its answers to a few samples of ``batches``.

    ``axes`` says where samples lie in the inputs, ``stated`` is as ``Task.outputs``. UsageError if what is stated does not fit the outputs,
    or if nothing among these can be compared.
    """
    answers = [(batch, list(leaves(_run(model, batch)))) for batch in first(batches, LOOKED_AT, axes)]
    batch, found = answers[0]
    if not found:
        raise UsageError("the model returns no tensor: there is nothing to compare")
    texts = _texts(stated, found)
    outputs, ranks = [], []
    for index, samples in enumerate(_samples_axes(model, batch, found, axes)):
        look = _Look(index, tuple(found), samples, batch, axes_of(batch, axes), _lengths(answers, index))
        kind, axis = read(texts[index] or "auto")
        (guessed, why, rank) = look.guess() if kind == "auto" else (look.stated(kind, axis), "stated", "counts")
        outputs.append(Output(found[index][0], *guessed, samples, why, tuple(found[index][1].shape)))
        ranks.append(rank if outputs[-1].kind != "ignored" else None)
    if stated is None:
        best = next((rank for rank in ("counts", "inner", "decisions", "constant") if rank in ranks), None)
        outputs = [
            output if rank in (best, None) else replace(output, kind="ignored", axis=None)
            for output, rank in zip(outputs, ranks, strict=True)
        ]
    if all(output.kind == "ignored" for output in outputs):
        listed = "; ".join(f"{output.name} {list(output.shape)}: {output.why}" for output in outputs)
        raise UsageError(f"no output of the model is compared with the dense one's ({listed}): see Task.outputs")
    return tuple(outputs)


def _run(model: nn.Module, batch: Batch) -> Any:
    with torch.no_grad():
        return model(*(tensor.clone() for tensor in batch))


def _samples_axes(
    model: nn.Module, batch: Batch, found: Sequence[tuple[str, Tensor]], axes: Axes | None
) -> list[int | None]:
    """Along which axis of each output samples lie: the one that shrinks with their number, where the model can be asked."""
    samples, given = count(batch, axes), axes_of(batch, axes)
    if samples > 1:
        other = part(batch, 0, samples - 1, axes)
    else:  # the same sample twice
        other = tuple(t if axis is None else torch.cat([t, t], axis) for t, axis in zip(batch, given, strict=True))
    try:
        shapes = [tensor.shape for _, tensor in leaves(_run(model, other))]
    except Exception:  # a model made for one number of samples
        shapes = []
    if [len(shape) for shape in shapes] != [tensor.dim() for _, tensor in found]:
        wanted = next(axis for axis in given if axis is not None)
        return [
            next((a for a in (wanted, *range(t.dim())) if a < t.dim() and t.shape[a] == samples), None)
            for _, t in found
        ]
    others = count(other, axes)
    return [  # several rows a sample may lie side by side
        next((a for a, size in enumerate(t.shape) if size != shape[a] and size * others == shape[a] * samples), None)
        for (_, t), shape in zip(found, shapes, strict=True)
    ]


def _lengths(answers: Sequence[tuple[Batch, Sequence[tuple[str, Tensor]]]], index: int) -> frozenset[int]:
    """Axes of an output whose size is another for inputs of another shape: never those of classes."""
    shapes = [found[index][1].shape for _, found in answers if index < len(found)]
    alike = [shape for shape in shapes if len(shape) == len(shapes[0])]
    return frozenset(axis for axis in range(len(shapes[0])) if len({shape[axis] for shape in alike}) > 1)


def _texts(stated: Stated | None, found: Sequence[tuple[str, Tensor]]) -> list[str | None]:
    """What is stated of each output."""
    names = [name for name, _ in found]
    listed = ", ".join(f"{name!r} {list(tensor.shape)}" for name, tensor in found)
    if stated is None:
        return [None] * len(found)
    if isinstance(stated, str):
        stated = (stated,)
    if not isinstance(stated, Sequence):
        for name in stated:
            if name not in names:
                near = suggest(str(name), names)
                raise UsageError(
                    f"Task.outputs names {name!r}, which the model does not return.{near} It returns: {listed}"
                )
        return [stated.get(name, "ignored") for name in names]
    if len(stated) != len(found):
        raise UsageError(f"Task.outputs states {len(stated)} output(s), the model returns {len(found)}: {listed}")
    return list(stated)


@dataclass(frozen=True)
class _Look:
    """One output among all that were found, what was put in, and where samples and lengths lie in it."""

    index: int
    found: tuple[tuple[str, Tensor], ...]
    samples: int | None
    batch: Batch
    axes: Axes
    lengths: frozenset[int]

    @property
    def tensor(self) -> Tensor:
        return self.found[self.index][1]

    @property
    def floats(self) -> Tensor:
        return self.tensor.detach().double()

    def stated(self, kind: str, axis: int | None) -> tuple[Kind, int | None]:
        """The kind and the axis stated of it, if they fit."""
        name, tensor = self.found[self.index]
        what = f"Task.outputs states {kind} of {name!r}, {tensor.dtype} {list(tensor.shape)}"
        if kind == "ignored":
            return "ignored", None
        if tensor.is_floating_point() == (kind == "decisions"):
            other = "integers and booleans" if kind == "decisions" else "numbers in floats"
            raise UsageError(f"{what}: that is for {other}")
        if self.samples is None:
            raise UsageError(f"{what}: none of its axes grows with the number of samples, so it cannot be compared")
        if axis is not None:
            if not -tensor.dim() <= axis < tensor.dim():
                raise UsageError(f"{what}: there is no axis {axis}")
            axis %= tensor.dim()
            if axis == self.samples:
                raise UsageError(f"{what}: along axis {axis} lie the samples")
        elif kind in ("classes", "probabilities", "embedding"):
            axis = self._axis()
            if axis is None:
                raise UsageError(f"{what}: it has one number for each sample")
        elif kind in ("regression", "binary", "binary-probabilities"):
            axis = self._axis()
        logits = {"probabilities": "classes", "binary-probabilities": "binary"}.get(kind)
        if logits and not self._within(self.floats, 0, 1):
            raise UsageError(f"{what}: not all its values lie between 0 and 1; of logits, state {logits}")
        return kind, axis  # type: ignore[return-value]

    def guess(self) -> tuple[tuple[Kind, int | None], str, Rank]:
        """The kind and the axis, why, and how soon it counts."""
        tensor, name = self.tensor, self.found[self.index][0].lower()
        if tensor.is_complex() or tensor.numel() == 0:
            return ("ignored", None), "holds complex numbers" if tensor.is_complex() else "is empty", "constant"
        if self.samples is None:
            return ("ignored", None), "none of its axes grows with the number of samples", "constant"
        if not tensor.is_floating_point():
            return ("decisions", None), f"holds {str(tensor.dtype).removeprefix('torch.')}", "decisions"
        kind, axis, why = self._by_values()
        words = next((found for found in _NAMED if found[0] in name), None)
        rank: Rank = "counts"
        if words is not None:
            kind, why, rank = words[1], f"its name holds {words[0]!r}", words[2]
            axis = self._axis()
            if axis is None and kind == "embedding":
                kind = "regression"
        if self._constant():
            rank, why = "constant", "is the same for all samples"
        return (kind, axis), why, rank

    def _by_values(self) -> tuple[Kind, int | None, str]:
        values, choices = self.floats, self._choices()
        for at in choices:
            if bool((values >= 0).all()) and self._near_one(values.sum(at)):
                return "probabilities", at, f"sums to one along axis {at}"
            if bool((values <= CLOSE).all()) and self._near_one(values.exp().sum(at)):
                return "classes", at, f"its exponentials sum to one along axis {at}"
        axis = self._axis()
        if self._boxes():
            return "regression", values.dim() - 1, "four numbers for each row of another output"
        like = self._like_an_input()
        if like:
            return "regression", axis, like
        for at in choices:
            if values.shape[at] >= VECTOR and self._near_one(values.norm(dim=at)):
                return "embedding", at, f"vectors of length one along axis {at}"
        places = self._places()
        axis = None if places else axis
        if self._within(values, 0, 1):
            return "binary-probabilities", axis, "its values lie between 0 and 1 and do not sum to one"
        if axis is None:
            return "regression", None, places or "one number for each sample or place"
        return "classes", axis, f"scores, which differ most along axis {axis}" if len(choices) > 1 else "scores"

    @staticmethod
    def _near_one(values: Tensor) -> bool:
        return bool(((values - 1).abs() < CLOSE).all())

    @staticmethod
    def _within(values: Tensor, low: float, high: float) -> bool:
        return bool(((values >= low) & (values <= high)).all())

    def _constant(self) -> bool:
        """Whether all samples have the same values, up to rounding."""
        assert self.samples is not None
        samples = count(self.batch, self.axes)
        rows = self.floats.movedim(self.samples, 0)
        rows = rows.reshape(samples, -1) if len(rows) % samples == 0 else rows
        return len(rows) > 1 and float((rows - rows[:1]).abs().max()) <= 1e-7 * float(rows.abs().max())

    def _choices(self) -> list[int]:
        """Axes that may be of classes: the first beside the samples or the last, of fixed size, not as long as an input is there."""
        shape = self.tensor.shape
        beside = [axis for axis in range(len(shape)) if axis != self.samples]
        wide = [axis for axis in beside if shape[axis] > 1]
        one_map = len(beside) > 2 and shape[beside[0]] == 1
        one_a_place = len(beside) > 1 and shape[beside[-1]] == 1 and (wide != beside[:1] or len(beside) == 2)
        if one_map or one_a_place:
            return []
        ends = [axis for axis in dict.fromkeys(beside[:1] + beside[-1:]) if axis in wide and axis not in self.lengths]
        for places in self._known_places():
            ends = [axis for axis in ends if axis not in places] or ends
        return ends

    def _known_places(self) -> Iterator[set[int]]:
        """Axes that are of places, by one piece of evidence after the other: as long as in an input, or as in another output."""
        shape, axes = self.tensor.shape, range(self.tensor.dim())
        for tensor, samples in zip(self.batch, self.axes, strict=True):
            if samples is None or samples != self.samples:
                continue
            picture = tensor.is_floating_point() and tensor.dim() > 3
            if (
                picture and tensor.dim() == len(shape) == 4
            ):  # a map of it may be smaller or larger; its channels are first or last
                behind, before = (_same_ratio(shape[at : at + 2], tensor.shape[2:]) for at in (2, 1))
                if behind != before:
                    yield {2, 3} if behind else {1, 2}
            yield {a for a in axes if a < tensor.dim() and shape[a] == tensor.shape[a] and not (picture and a == 1)}
        for index, (_, other) in enumerate(self.found):
            if index != self.index and other.dim() == len(shape) and other.shape != shape:
                yield {axis for axis in axes if other.shape[axis] == shape[axis]}

    def _axis(self) -> int | None:
        """The axis whose places differ most in their mean, of those that may be of classes."""
        values, choices = self.floats, self._choices()
        spreads = [values.movedim(axis, 0).flatten(1).mean(1).var(correction=0) for axis in choices]
        return choices[int(torch.stack(spreads).argmax())] if choices else None

    def _boxes(self) -> bool:
        shape = self.tensor.shape
        if len(shape) < 3 or shape[-1] != 4:
            return False
        others = [tensor for index, (_, tensor) in enumerate(self.found) if index != self.index]
        return any(t.shape[: len(shape) - 1] == shape[:-1] and t.shape != shape for t in others)

    def _like_an_input(self) -> str:
        """Why the output is such a thing as an input is; empty if it is not."""
        shape = self.tensor.shape
        for index, tensor in enumerate(self.batch):
            if not tensor.is_floating_point() or len(shape) < 2:
                continue
            if tensor.shape == shape:
                return f"has the shape of input {index}"
            picture = tensor.dim() == len(shape) == 4 and shape[1] == tensor.shape[1] <= PICTURE
            if picture and shape[2] >= tensor.shape[2] and shape[3] >= tensor.shape[3]:
                return f"has the channels of input {index}, a picture"
        return ""

    def _places(self) -> str:
        """Why the output holds a number for each place of an input; empty if it does not."""
        shape = self.tensor.shape
        for index, tensor in enumerate(self.batch):
            places = self.axes[index] == 0 and len(shape) > 1 and tensor.dim() > len(shape)
            if places and tensor.is_floating_point() and tensor.shape[2:] == shape[1:]:
                return f"one number for each place of input {index}"
        return ""


def _same_ratio(sizes: Sequence[int], others: Sequence[int]) -> bool:
    """Whether two pairs of sizes are in proportion: h / H = w / W."""
    return sizes[0] * others[1] == sizes[1] * others[0]
