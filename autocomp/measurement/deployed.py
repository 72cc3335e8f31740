"""A compiled module behind the face of the model it was made of, so that a task's own metric can be read from what is deployed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from autocomp.errors import AutocompError, UsageError, last_line
from autocomp.graph.batches import shape_of
from autocomp.graph.program import CanonicalModel, in_pieces
from autocomp.records.run import Deployed
from autocomp.tasks.reading import NOTHING, SAME, Metrics
from autocomp.tasks.task import evaluate_task

if TYPE_CHECKING:
    from autocomp.records.evaluation import Evaluation
    from autocomp.tasks.task import Task

SECONDS = 60.0  # that reading the metric of one file may take; chosen by hand, not measured
NOISE = 2.0  # standard errors of a difference, within which none is claimed

Run = Callable[..., object]


class TooSlow(AutocompError):
    """The time that a metric may take to be read is up."""


class DeployedModel(nn.Module):
    """``run``, compiled for the shapes of ``example``, called like ``model``: with any number of samples, its outputs in the same structure.

    A batch is cut into such as ``run`` takes, the last one filled up with its last sample. UsageError for samples of other shapes;
    TooSlow once its calls have taken ``seconds``.
    """

    def __init__(self, model: CanonicalModel, run: Run, example: tuple[Tensor, ...], seconds: float) -> None:
        super().__init__()
        self._names, self._returns, self._batch = model.code.parameters, model.code.returns, model.code.batch
        self._order: Callable[..., tuple[Tensor, ...]] = model._in_order
        self._run, self._example, self._left = run, example, seconds
        with torch.no_grad():
            self._leaves = _pytree.tree_flatten(model(*example))[0]
        self.eval()

    def __deepcopy__(self, _memo: Any) -> DeployedModel:
        return self  # a compiled module keeps no state

    def forward(self, *inputs: Tensor, **named: Any) -> Any:
        given = self._order(inputs, named)
        axes = self._batch.inputs
        if shape_of(given, axes) != shape_of(self._example, axes):
            shapes, known = ([list(tensor.shape) for tensor in batch] for batch in (given, self._example))
            raise UsageError(f"it was called with inputs of the shapes {shapes}, and is compiled for {known}")
        size = next((t.shape[a] for t, a in zip(self._example, axes, strict=True) if a is not None), 0)
        return _pytree.tree_unflatten(list(in_pieces(self._timed, size, given, self._batch)), self._returns)

    def _timed(self, *inputs: Tensor) -> list[Any]:
        """The outputs in a row, as the model has them: what is no tensor among them is the same each time."""
        began = time.monotonic()
        result = self._run(*inputs)
        self._left -= time.monotonic() - began
        if self._left < 0:
            raise TooSlow("reading the metric takes too long")
        waiting = iter(result if isinstance(result, tuple | list) else [result])
        return [next(waiting) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]


def read_deployed(
    task: Task, evaluation: Evaluation, model: nn.Module, run: Run, file: str, seconds: float = SECONDS
) -> Deployed:
    """The validation metrics of ``model`` as ``run``, the deployed ``file``, computes it; or why they could not be read.

    Where the metric is a mean over samples and the two differ, torch is read once more, for the standard error of their difference.
    """
    if not isinstance(model, CanonicalModel):
        return Deployed(file, note="the model is not in canonical form")
    deployed = DeployedModel(model, run, task.example_inputs, seconds)
    try:
        found = evaluate_task(task, deployed, names=tuple(evaluation.metrics))
        errors = found.drop_errors(evaluate_task(task, model)) if _differing(found, evaluation.metrics, {}) else {}
    except Exception as error:
        late = deployed._left < 0
        return Deployed(file, note=f"not read in {seconds:.0f} s" if late else f"not read: {last_line(error)}")
    return Deployed(file, dict(found), errors, tuple(_differing(found, evaluation.metrics, errors)))


def _differing(now: Metrics, torchs: Mapping[str, float], errors: Mapping[str, float]) -> list[str]:
    """Metrics that differ from torch's by more than two standard errors of the difference; by more than rounding, where none is known."""
    far = {name: abs(value - torchs[name]) for name, value in now.items()}
    return [
        name
        for name, difference in far.items()
        if difference > max(SAME * abs(torchs[name]), NOTHING) and difference > NOISE * errors.get(name, 0.0)
    ]
