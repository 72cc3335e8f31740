"""`torch.export`, quietly, and what it says when it refuses a model."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from autocomp.errors import ExportError
from autocomp.processes import interrupt

_OWN = {"exporting.py", "canonical.py", "samples.py", "analyse.py", "program.py"}


def exported(
    model: nn.Module, inputs: Sequence[Tensor], free: Sequence[dict[int, Any]] | None = None
) -> torch.export.ExportedProgram:
    """Run `torch.export`; ExportError names the operation it stumbled over and the line of the model.

    ``free`` says of each input which axes stay symbols.
    """
    try:
        with quiet(), torch.no_grad(), _written_out(), _shapes_of_recurrences(), plain_outputs(model):
            return torch.export.export(model, tuple(inputs), dynamic_shapes=_spec(model, free))
    except BaseException as error:  # torch.export lets any exception of the user's code through
        if interrupt.is_stop(error):
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = ""
        if "data-dependent" in first or "DataDependent" in type(error).__name__:
            hint = "; control flow that depends on values of tensors must be written with torch.where or torch.cond"
        raise ExportError(
            f"the model cannot be exported: {_where(error)}torch.export says: {first} ({type(error).__name__}){hint}"
        ) from error


def _spec(model: nn.Module, free: Sequence[dict[int, Any]] | None) -> Any:
    """The free axes as torch.export wants them: in the structure of forward's parameters, variadic ones as a tuple."""
    import inspect

    if free is None:
        return None
    axes = [dict(one) or None for one in free]
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    variadic = inspect.Parameter.VAR_POSITIONAL
    if variadic in kinds:
        plain = kinds.index(variadic)
        return (*axes[:plain], tuple(axes[plain:])) if len(axes) > plain else tuple(axes)
    return tuple(axes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.export logs and prints whole graphs before it raises; its message says what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _written_out() -> Iterator[None]:
    """torch's own Transformer layers take one fused operation in inference, in which no layer can be seen: not while exporting."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _shapes_of_recurrences() -> Iterator[None]:
    """While a model is exported, the shapes of a recurrent layer's outputs are made at once.

    Else torch follows every step of every layer by itself, though the layer is one operation of the exported graph: seconds a layer.
    """
    keys = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)
    aten = torch.ops.aten
    operations = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
    before = [dict(operation.py_kernels) for operation in operations]
    for operation in operations:
        operation.py_kernels.update(dict.fromkeys(keys, _shapes))
        operation._dispatch_cache.clear()
    try:
        yield
    finally:
        for operation, kernels in zip(operations, before, strict=True):
            operation.py_kernels.clear()
            operation.py_kernels.update(kernels)
            operation._dispatch_cache.clear()


def _shapes(x: Tensor, states: Any, parameters: Sequence[Tensor], biases: bool, layers: int,
            dropout: float, training: bool, bidirectional: bool, batch_first: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """Outputs of ``aten.lstm.input`` and its kin, by their shapes alone; last states are shaped as the first ones are."""
    given = list(states) if isinstance(states, list | tuple) else [states]
    width = given[0].shape[-1] * (2 if bidirectional else 1)  # a projected one's is that of its projection
    return x.new_empty((*x.shape[:2], width)), *(state.new_empty(state.shape) for state in given)


@contextlib.contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """Leave out of a model's output what is no tensor and no number (a cache object, say): nothing can be exported of it."""
    forward = model.forward

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return _pytree.tree_map(
            lambda leaf: leaf if isinstance(leaf, Tensor | int | float) or leaf is None else None,
            forward(*args, **kwargs),
        )

    own = "forward" in vars(model)
    model.forward = plain
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward


def _where(error: BaseException) -> str:
    """Name the last line of the traceback that lies outside torch and this package: the user's own."""
    own, here = Path(torch.__file__).parent, Path(__file__).parent.parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        ours = here in path.parents and path.name in _OWN
        if own not in path.parents and not ours and frame.name != "<module>" and frame.line:
            return f"at {path.name}:{frame.lineno} in {frame.name}, `{frame.line}`: "
    return ""
