"""A user's model → its canonical form: exported, constants folded, layers as plain modules of torch.nn.

Decided by what the exported graph computes, never by how the model was written: a convolution by a subclass, by a function on
parameters or under a parametrisation is a convolution with a constant weight, and a BatchNorm that does more than normalise is a
``batch_norm`` and whatever follows it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from autocomp.errors import ExportError, cut
from autocomp.graph.batches import part, shape_of
from autocomp.graph.exporting import exported, plain_outputs
from autocomp.graph.program import Batch, CanonicalModel, Code, Held, source_of
from autocomp.graph.reader import Reader
from autocomp.graph.samples import Axes, doubled, find_batch, near, varying_axes
from autocomp.graph.sizes import name_sizes
from autocomp.processes import interrupt

_ONE = threading.RLock()  # torch.export keeps its state in the process: two at once spoil each other


FEW = 3  # samples of a calibration batch that the canonical form is compared on
SHAPES = 8  # of samples of the calibration data that it is compared at


def canonical(
    model: nn.Module,
    example_inputs: Sequence[Tensor],
    others: Sequence[Sequence[Tensor]] = (),
    batch_axes: Axes | None = None,
) -> CanonicalModel:
    """Bring a model, read in evaluation mode, to its canonical form; one that is in it already is returned as it is.

    ``others`` are more inputs of the model (calibration batches): axes along which they differ in size stay free, as does the batch axis,
    which is found unless ``batch_axes`` states it. The model, its buffers and the inputs are left as they are. ExportError names what cannot
    be exported, a buffer that the model writes, or an output that chance decides.
    """
    if isinstance(model, CanonicalModel) and model.code.graph is not None:
        return model
    with _ONE:
        return _canonical(model, example_inputs, others, batch_axes)


def _canonical(
    model: nn.Module, example_inputs: Sequence[Tensor], others: Sequence[Sequence[Tensor]], batch_axes: Axes | None
) -> CanonicalModel:
    inputs = tuple(tensor.detach().clone() for tensor in example_inputs)
    others = [tuple(tensor.detach() for tensor in other) for other in others]
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with plain_outputs(model):
            with _kept_state(model):
                expected = _leaves(model, inputs)
            with _kept_state(model):
                _refuse_chance(model, inputs, expected)
                batch = find_batch(model, inputs, others, batch_axes)
        return _read(model, inputs, others, batch, expected)
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)


class _kept_state:
    """Keeps a model's buffers as they are, whatever its forward writes into them. ExportError afterwards names those it wrote."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = {
            name: tensor.detach().clone() for name, tensor in self.model.named_buffers() if tensor.device.type != "meta"
        }

    def __exit__(self, kind: Any, *_: Any) -> None:
        now = dict(self.model.named_buffers())
        written = []
        for name, old in self.before.items():
            new = now.get(name)
            if new is None or (new.shape == old.shape and torch.equal(new, old)):
                continue
            with torch.no_grad():
                if new.shape != old.shape:
                    new.set_(old)  # type: ignore[call-overload]
                new.copy_(old)
            if bool((old == old).all()):  # NaN is never equal to itself
                written.append(name)
        if written and kind is None:
            raise ExportError(_WRITES.format(", ".join(repr(name) for name in written)))


_WRITES = (
    "the model writes its buffer {} when it is called: a compiled module has no memory between calls. Take the state as an input and return "
    "it as an output instead"
)


def _refuse_chance(model: nn.Module, inputs: tuple[Tensor, ...], expected: list[Any]) -> None:
    again = _leaves(model, inputs)
    for a, b in zip(expected, again, strict=False):
        if isinstance(a, Tensor) and (a.shape != b.shape or not near(b, a)):
            raise ExportError(
                "the model is random, or keeps state: its output differs between two calls on the same input in evaluation mode. What chance "
                "decides (dropout, noise, sampling) cannot be compiled or compared: make it deterministic, or its noise an input"
            )


def _leaves(model: nn.Module, inputs: Sequence[Tensor]) -> list[Any]:
    """The outputs of a model in a row. ExportError with what it raised."""
    try:
        with torch.no_grad():
            output = model(*(tensor.clone() for tensor in inputs))
    except BaseException as error:
        if interrupt.is_stop(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(
            f"the model cannot be called with the example inputs: {type(error).__name__}: {cut(first, 1000)}"
        ) from error
    leaves = list(_pytree.tree_leaves(output))
    if not any(isinstance(leaf, Tensor) and leaf.numel() for leaf in leaves):
        raise ExportError("the model's output holds no tensor with elements: there is nothing to compile or to compare")
    return leaves


def _read(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    others: Sequence[Sequence[Tensor]],
    batch: Batch | None,
    expected: list[Any],
) -> CanonicalModel:
    """The canonical form with free batch and free lengths where the model takes them; else at the sizes of the example."""
    none = Batch((None,) * len(inputs), ())
    attempts: list[tuple[Batch, list[set[int]]]] = []
    moving = varying_axes(inputs, others)
    lengths = [axes - {axis} for axes, axis in zip(moving, (batch or none).inputs, strict=True)]
    if any(lengths):
        attempts.append((batch or none, lengths))
    if batch is not None:
        attempts.append((batch, [set() for _ in inputs]))
    for found, free in attempts:
        axes = [
            {axis: torch.export.Dim.AUTO for axis in {*each, *([] if own is None else [own])}}
            for each, own in zip(free, found.inputs, strict=True)
        ]
        try:
            program = exported(model, doubled(inputs, found), axes)
            if _is_free(program, found):
                result = _assembled(model, Reader(program, model).read(), found)
                _compare(result, inputs, expected)  # at another size of the batch than it was exported at
                _compare_others(result, model, others, found)
                return result
        except ExportError:  # not with this much freedom: if it is for another reason, it comes again below
            continue
    if batch is not None:
        size = next(x.shape[axis] for x, axis in zip(inputs, batch.inputs, strict=True) if axis is not None)
        batch = batch._replace(fixed=size)
    result = _assembled(model, Reader(exported(model, inputs), model).read(), batch or none)
    _compare(result, inputs, expected)
    _compare_others(result, model, [other for other in others if _as_long(other, inputs, batch or none)], batch or none)
    return result


def _as_long(other: Sequence[Tensor], inputs: Sequence[Tensor], batch: Batch) -> bool:
    """Whether inputs have the shapes of others but for the number of samples."""
    return shape_of(tuple(other), batch.inputs) == shape_of(tuple(inputs), batch.inputs)


def _compare_others(model: CanonicalModel, given: nn.Module, others: Sequence[Sequence[Tensor]], batch: Batch) -> None:
    """ExportError if the canonical form differs at a size that the calibration has: `forward` may use sizes as numbers of Python's."""
    seen: set[Any] = set()
    for other in others:
        inputs = tuple(other)
        shapes = shape_of(inputs, batch.inputs)
        if shapes in seen or len(seen) >= SHAPES:
            continue
        seen.add(shapes)
        size = next((t.shape[a] for t, a in zip(inputs, batch.inputs, strict=True) if a is not None), None)
        few = inputs if size is None else part(inputs, 0, min(size, FEW), batch.inputs)
        with _kept_state(given), plain_outputs(given):
            expected = _leaves(given, few)
        _compare(model, few, expected)


def _is_free(program: torch.export.ExportedProgram, batch: Batch) -> bool:
    """Whether the batch axes stayed symbols: a model may fix them."""
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for name, axis in zip(names, batch.inputs, strict=True):
        value = nodes[str(name)].meta.get("val") if str(name) in nodes else None
        if axis is not None and isinstance(value, Tensor) and isinstance(value.shape[axis], int):
            return False
    return True


def _assembled(model: nn.Module, reader: Reader, batch: Batch) -> CanonicalModel:
    sizes = name_sizes(reader.graph)
    reader.graph.lint()
    code = Code(
        source_of(reader.graph),
        reader.parameters(model),
        reader.returns,
        reader.norms(),
        batch,
        reader.graph,
        reader.origins,
        Held.of(model),
    )
    return CanonicalModel(code, reader.modules, reader.tensors(), sizes)


def _compare(model: CanonicalModel, inputs: Sequence[Tensor], expected: list[Any]) -> None:
    """ExportError if the canonical form computes something else than the model."""
    actual = _leaves(model, inputs)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(b, Tensor) and not (isinstance(a, Tensor) and a.shape == b.shape and near(a, b)):
            raise ExportError(
                f"output {index} of the exported model differs from the model's own: its forward does something that torch.export does not "
                "record (a change of precision, a value kept in Python)"
            )
