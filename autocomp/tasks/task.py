"""What the user brings: a model, data to calibrate on, and how to judge it."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autocomp.errors import AutocompError, UsageError, last_line, shown, suggest
from autocomp.graph.batches import count
from autocomp.processes import interrupt
from autocomp.progress import Progress
from autocomp.tasks import BUILT_IN
from autocomp.tasks.reading import Metrics, Samples, values_of

if TYPE_CHECKING:
    from torch import Tensor, nn

LONGEST_UNIT = 20
FUSION = "fusion.json"  # in a folder whose name is a task: that of several models in one
Evaluate = Callable[["nn.Module"], Mapping[str, Any]]


@dataclass(frozen=True)
class GivenModel:
    """A model as its user gave it, and the canonical form that was made of it."""

    model: nn.Module
    canonical: nn.Module


@dataclass
class Task:
    """A model to compress and how to judge what comes out.

    ``example_inputs`` is one batch as ``model(*example_inputs)`` takes it; its shapes are what latency is measured at.
    ``calibration`` is a sequence of such batches from training data (any batch size; about 256 samples in all). ``evaluate`` reads the
    validation split and returns metrics by name, the objective first (or the one named by ``objective``); metrics of slices are
    named ``metric/slice``. A metric may be a number, or the values of samples of which it is the mean (a tensor, array or list: right or
    wrong for each image, in an order that no model changes), and then its standard error is known. ``test`` does the same on data nothing else
    has seen: the final report calls it once for each front point. ``train`` yields ``(inputs, target)`` pairs, ``inputs`` a tuple of
    tensors, afresh each time it is iterated; ``loss(output, target)`` is the scalar to minimise: compressed models are trained with them where
    a search may (``recover``). Without ``train`` they learn from the calibration data, changed anew by ``augment`` (a batch to a batch like it)
    where that is given. ``unit`` is how the objective is shown:
    ``"%"`` says that it is a share between 0 and 1, shown in percent and points, anything else (``"dB"``) stands behind its values as they are.

    ``batch_axes`` says along which axis of each input samples lie, None for an input that has none (a table); by default it is found by
    running two samples at once. Samples may vary in their other sizes from one calibration batch to the next.
    ``outputs`` says what the outputs of the model are, and so how compressed models are compared with it: ``"classes@1"``, a sequence of such
    texts, or a mapping by name; `autocomp.tasks.outputs` has the notation. By default it is guessed; ``autocomp check`` says how.

    ``model`` then is the canonical form of the model given (`graph.canonical`): it computes the same, holds its weights under their names,
    and can be called, but has none of the methods of its class. The model given is left alone.

    Raises:
        UsageError: A part cannot be used; it says which and why.
        ExportError: The model cannot be exported.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> inputs, targets = torch.zeros(64, 4), torch.zeros(64)
        >>> task = Task(
        ...     model=model.eval(),
        ...     example_inputs=(inputs[:1],),
        ...     calibration=[(inputs,)],
        ...     evaluate=lambda model: {"accuracy": float((model(inputs).argmax(1) == targets).float().mean())},
        ...     unit="%",
        ...     outputs="classes@1",
        ... )
        >>> task.batch_axes
        (0,)

        A part that cannot be used is named:

        >>> Task(model=model, example_inputs=inputs, calibration=[(inputs,)], evaluate=len)
        Traceback (most recent call last):
        autocomp.errors.UsageError: Task.example_inputs must be a tuple of tensors, one for each input; got one tensor: write (tensor,)
    """

    model: nn.Module
    example_inputs: tuple[Tensor, ...]
    calibration: Sequence[tuple[Tensor, ...]]
    evaluate: Evaluate
    test: Evaluate | None = None
    train: Iterable[tuple[tuple[Tensor, ...], Tensor]] | None = None
    loss: Callable[[Any, Tensor], Tensor] | None = None
    objective: str | None = None
    higher_is_better: bool = True
    unit: str = ""
    name: str = "task"
    description: str = ""
    outputs: str | Sequence[str] | Mapping[str, str] | None = None
    batch_axes: tuple[int | None, ...] | None = None
    augment: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    converted: tuple[str, ...] = ()  # written by the Task: how model and inputs differ from those given (`plain`)
    given: GivenModel | None = None  # written by the Task

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every part, and bring the model into its canonical form; UsageError names the part that is wrong."""
        from torch import nn

        from autocomp.graph.canonical import canonical
        from autocomp.graph.plain import PlainBatches, plain, refuse_another
        from autocomp.tasks.outputs import parse

        if not isinstance(self.model, nn.Module):
            raise UsageError(f"Task.model must be a torch.nn.Module, got {_kind(self.model)}")
        inputs, given = checked_batch(self.example_inputs, "Task.example_inputs"), self.model
        self.model, self.example_inputs, notes = plain(self.model, inputs, "Task.model", "Task.example_inputs")
        self.converted += tuple(notes)
        if notes:
            refuse_another(given, inputs, self.model, self.example_inputs, "Task.model")
        self.batch_axes = self._checked_axes()
        self.calibration = self._checked_calibration()
        self.outputs = parse(self.outputs)
        for name, optional in (("evaluate", False), ("test", True), ("loss", True), ("augment", True)):
            value = getattr(self, name)
            if not (callable(value) or (optional and value is None)):
                raise UsageError(f"Task.{name} must be a function, got {_kind(value)}")
        if self.train is not None and not isinstance(self.train, Iterable):
            raise UsageError(f"Task.train must be an iterable of (inputs, target), got {_kind(self.train)}")
        if isinstance(self.train, Iterator):
            raise UsageError(
                f"Task.train is gone through many times, and a {type(self.train).__name__} can be once: give a list, a DataLoader, or an object "
                "whose __iter__ begins afresh"
            )
        if self.train is not None and notes:
            self.train = PlainBatches(self.train)
        if not isinstance(self.unit, str) or len(self.unit) > LONGEST_UNIT:
            raise UsageError(f"Task.unit must be a text of at most {LONGEST_UNIT} characters, got {shown(self.unit)}")
        if not isinstance(self.name, str) or not self.name:
            raise UsageError(f"Task.name must be a non-empty text, got {self.name!r}")
        rule = "a trained model has only finite weights"
        for name, parameter in self.model.named_parameters():
            _refuse_non_finite(parameter, f"parameter {name!r} of Task.model", rule)
        for name, buffer in self.model.named_buffers():  # minus infinity is what a mask of attention is made of
            finite = buffer.masked_fill(buffer == -math.inf, 0) if buffer.is_floating_point() else buffer
            _refuse_non_finite(finite, f"buffer {name!r} of Task.model", rule)
        self.model = canonical(self.model, self.example_inputs, self.calibration, self.batch_axes)
        if given is not self.model:
            self.given = GivenModel(given, self.model)
        found = self.model.code.batch.inputs
        if self.batch_axes is None and any(axis is not None for axis in found):
            self.batch_axes = found

    @property
    def given_model(self) -> nn.Module | None:
        """The model as its user gave it; None where ``model`` is not the form that was made of it."""
        return self.given.model if self.given is not None and self.given.canonical is self.model else None

    def _checked_axes(self) -> tuple[int | None, ...] | None:
        if self.batch_axes is None:
            return None
        given, inputs = self.batch_axes, self.example_inputs
        if not isinstance(given, tuple | list) or len(given) != len(inputs):
            raise UsageError(
                f"Task.batch_axes must be a tuple of {len(inputs)}, an axis or None for each input, got {given!r}"
            )
        for index, (axis, tensor) in enumerate(zip(given, inputs, strict=True)):
            if axis is not None and not (type(axis) is int and -tensor.dim() <= axis < tensor.dim()):
                raise UsageError(
                    f"Task.batch_axes[{index}] must be an axis of Task.example_inputs[{index}] {list(tensor.shape)}, or None; got {axis!r}"
                )
        if all(axis is None for axis in given):
            raise UsageError("Task.batch_axes must name an axis of samples in at least one input")
        axes = tuple(axis if axis is None else axis % t.dim() for axis, t in zip(given, inputs, strict=True))
        _samples(inputs, axes, "Task.example_inputs")
        return axes

    def _checked_calibration(self) -> list[tuple[Tensor, ...]]:
        from autocomp.graph.plain import plain_tensor

        if isinstance(self.calibration, str | bytes) or not isinstance(self.calibration, Sequence):
            raise UsageError(
                f"Task.calibration must be a sequence of batches (tuples of tensors), got {_kind(self.calibration)}; "
                "a loader can be given as list(loader)"
            )
        batches = [checked_batch(batch, f"Task.calibration[{index}]") for index, batch in enumerate(self.calibration)]
        if not batches:
            raise UsageError("Task.calibration is empty: give at least one batch, better 256 samples in all")
        batches = [tuple(map(plain_tensor, batch)) for batch in batches]
        for index, batch in enumerate(batches):
            _refuse_unlike(batch, self.example_inputs, f"Task.calibration[{index}]")
            if self.batch_axes is not None:
                _samples(batch, self.batch_axes, f"Task.calibration[{index}]")
        return batches


def load_task(spec: str, progress: Progress | None = None) -> Task:
    """Load a task: a built-in name (``digits``), ``package.module:function``, a function without arguments, or a folder `autocomp.fuse` wrote.

    The working folder is searched for modules too. Built-in tasks may train their model first and show it in ``progress``.

    Raises:
        UsageError: There is no such task, the module does not import, the function fails, or it returns anything but a `Task`.

    Examples:
        >>> load_task("digit")
        Traceback (most recent call last):
        autocomp.errors.UsageError: unknown task 'digit'. Did you mean 'digits'? Built in: digits, digits-mobile, speech, tokens; ...
    """
    path = os.sep in spec or (":" not in spec and spec not in BUILT_IN)  # what names a task otherwise is that task
    if path and os.path.isfile(os.path.join(spec, FUSION)):
        fused: Task = _resolve("autocomp.fusion.stored:load_fused")(spec, progress)
        return fused
    if ":" not in spec:
        if spec not in BUILT_IN:
            raise UsageError(
                f"unknown task {spec!r}.{suggest(spec, BUILT_IN)} Built in: {', '.join(sorted(BUILT_IN))}; "
                "your own is named package.module:function"
            )
        task: Task = _resolve(BUILT_IN[spec])(progress=progress)
        return task
    function = _resolve(spec)
    try:
        task = function()
    except AutocompError as error:
        raise type(error)(f"task {spec!r}: {error}") from error
    except BaseException as error:
        if interrupt.is_stop(error):
            raise
        raise UsageError(f"task {spec!r}: the function raised {type(error).__name__}: {last_line(error)}") from error
    if not isinstance(task, Task):
        raise UsageError(f"task {spec!r}: the function must return an autocomp.Task, it returned {_kind(task)}")
    if task.name == "task":  # not named by its author
        task.name = spec.rpartition(":")[2]
    return task


def evaluate_task(
    task: Task,
    model: nn.Module,
    split: str = "validation",
    names: Iterable[str] | None = None,
    as_given: bool = False,
) -> Metrics:
    """Return the task's metrics of ``model`` on a split (``validation`` or ``test``), objective first, all finite.

    ``as_given``: the model is the user's own, read in evaluation mode, and takes the user's inputs as they are.

    One that is given as the values of samples is their mean, and its standard error is known.

    The function is given a copy, with which it may do what it likes. UsageError if it raises anything, writes to the task's own data, or
    returns no mapping of names to numbers, a metric that is not finite, no objective, or other metrics than ``names`` (None: whatever it
    returns).
    """
    from autocomp.graph.plain import taking_any
    from autocomp.tasks.untouched import keep_its_place, process_kept, unwritten

    function, where = {"validation": (task.evaluate, "Task.evaluate"), "test": (task.test, "Task.test")}[split]
    if function is None:
        raise UsageError("this task has no held-out test: Task.test is None")
    # without gradients: those of weights that were rounded are nothing to go by
    model = copy.deepcopy(model).requires_grad_(False).eval()
    with unwritten(where, task.example_inputs, task.calibration):
        try:
            with process_kept(), taking_any(model) if task.converted and not as_given else nullcontext():
                returned = function(model)
        except BaseException as error:
            if interrupt.is_stop(error):
                raise
            traceback.print_exc()  # into the run's log: the message alone does not say where
            raise UsageError(f"{where} raised {type(error).__name__}: {last_line(error)}") from error
    keep_its_place(model)
    if not isinstance(returned, Mapping) or not returned:
        raise UsageError(f"{where} must return a mapping {{metric: value}} with an entry, got {_kind(returned)}")
    metrics: dict[str, float] = {}
    samples: dict[str, Samples] = {}
    for name, value in returned.items():
        if not isinstance(name, str):
            raise UsageError(f"{where} must name its metrics by text, got the key {name!r}")
        try:
            if (values := values_of(value)) is not None:
                samples[name], value = values, values.mean()
            number = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UsageError(
                f"{where} must return numbers, or values of samples (a list, an array or a tensor) of which the metric is the mean, but "
                f"{name!r} is {_kind(value)}"
            ) from None
        if not math.isfinite(number):
            raise UsageError(f"{where} must return finite metrics, but {name!r} is {number}")
        metrics[name] = number
    objective = objective_of(task, metrics)
    if names is not None and set(names) != set(metrics):
        raise UsageError(
            f"{where} must return the metrics of the uncompressed model ({', '.join(names)}), got {', '.join(metrics)}"
        )
    return Metrics({objective: metrics.pop(objective), **metrics}, samples)


def within(task: Task, seconds: float) -> Task:
    """The task with a limit on the seconds that ``evaluate`` and ``test`` may take for one model; past it they fail as if they had raised."""

    def hurried(function: Evaluate) -> Evaluate:
        @functools.wraps(function)
        def hurry(model: nn.Module) -> Mapping[str, Any]:
            with interrupt.limited(seconds):
                return function(model)

        return hurry

    return replace(task, evaluate=hurried(task.evaluate), test=None if task.test is None else hurried(task.test))


def objective_of(task: Task, metrics: Mapping[str, float]) -> str:
    """Return the name of the metric the search improves: the one the task names, else the first."""
    if task.objective is None:
        return next(iter(metrics))
    if task.objective not in metrics:
        known = ", ".join(metrics)
        raise UsageError(
            f"Task.objective is {task.objective!r}, but the metrics are: {known}.{suggest(task.objective, metrics)}"
        )
    return task.objective


def _resolve(spec: str) -> Callable[..., Any]:
    """Import ``package.module:function``; UsageError says which half is wrong."""
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name or not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError(f"a task is named package.module:function, got {spec!r}")
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:  # a console script does not look where the user stands
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        hint = f"it was looked for on the Python path and in {folder}"
        if not (module_name + ".").startswith(missing + "."):
            hint = f"module {module_name!r} needs it: install it"
        raise UsageError(f"task {spec!r}: there is no module {missing!r}; {hint}") from error
    except BaseException as error:
        if interrupt.is_stop(error):
            raise
        raise UsageError(
            f"task {spec!r}: importing {module_name!r} raised {type(error).__name__}: {last_line(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(f"task {spec!r}: {module_name!r} has no {function_name!r}.{suggest(function_name, names)}")
    if not callable(function):
        raise UsageError(f"task {spec!r}: {function_name!r} must be a function, it is {_kind(function)}")
    result: Callable[..., Any] = function
    return result


def checked_batch(value: Any, where: str) -> tuple[Tensor, ...]:
    """A batch as a tuple of tensors. UsageError, naming ``where`` it stood, if it is none, is empty, or holds values that are not finite."""
    from torch import Tensor

    from autocomp.graph.plain import check_tensor

    if isinstance(value, Tensor):
        raise UsageError(f"{where} must be a tuple of tensors, one for each input; got one tensor: write (tensor,)")
    if not isinstance(value, tuple | list) or not value:
        raise UsageError(f"{where} must be a non-empty tuple of tensors, got {_kind(value)}")
    for index, tensor in enumerate(value):
        if not isinstance(tensor, Tensor):
            raise UsageError(f"{where}[{index}] must be a tensor, got {_kind(tensor)}")
        check_tensor(tensor, f"{where}[{index}]")
        if tensor.dim() == 0 or tensor.numel() == 0:
            raise UsageError(f"{where}[{index}] must hold samples, got the shape {tuple(tensor.shape)}")
        _refuse_non_finite(tensor, f"{where}[{index}]", "inputs must be finite")
    return tuple(value)


def _samples(batch: tuple[Tensor, ...], axes: tuple[int | None, ...], where: str) -> None:
    """The inputs of a batch must agree on the number of its samples."""
    try:
        count(batch, axes)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _refuse_unlike(batch: tuple[Tensor, ...], example: tuple[Tensor, ...], where: str) -> None:
    """A calibration batch must look like the example inputs, apart from the number of samples."""
    if len(batch) != len(example):
        raise UsageError(f"{where} must have {len(example)} tensor(s), as Task.example_inputs has; it has {len(batch)}")
    for index, (given, wanted) in enumerate(zip(batch, example, strict=True)):
        if given.dtype != wanted.dtype or given.dim() != wanted.dim():
            raise UsageError(
                f"{where}[{index}] must be like Task.example_inputs[{index}], {wanted.dtype} of {wanted.dim()} "
                f"dimensions; it is {given.dtype} of {given.dim()} dimensions"
            )


def _refuse_non_finite(tensor: Tensor, what: str, rule: str) -> None:
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    bad = int((~torch.isfinite(tensor.detach())).sum())
    if bad:
        raise UsageError(f"{what} holds {bad} value(s) that are NaN or infinite, of {tensor.numel()}: {rule}")


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"an empty {kind}" if hasattr(value, "__len__") and len(value) == 0 else f"a value of type {kind}"
