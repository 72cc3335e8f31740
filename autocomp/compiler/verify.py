"""Does what was compiled or exported compute what torch computes? One rule, asked before any time of it counts.

Of every output three errors are read: the *typical* one (root of the squared differences over that of the squared values), the *tail*
(99.9 % of the differences, over the output's range) and the *worst*; and how many *decisions* differ (the largest of a row of values)
though torch's own was clear. A wrong border, a wrong channel or a wrong scale shows in one of them, however large the output is; a few values
that rounded the other way show in none.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from autocomp.errors import ExportError, MismatchError
from autocomp.records.precisions import ARITHMETICS, FLOAT32, Arithmetic
from autocomp.records.tolerance import Errors

if TYPE_CHECKING:
    import torch

_TAIL = 0.999  # quantile of the differences; of a thousand values or fewer that is about the worst
# Float operations in another order change a value by some parts in 1e7. What a model makes of parts in a million, in its weights and
# its inputs, no two ways to compute it agree better on.
_NUDGE = 1e-6
_NUDGES = 4  # a value at the edge of a jump is moved over it by some of them
_SLACK = 2.0  # times what a nudge moves


# A chaotic model, whose own output moves by more than that when it is nudged, is allowed twice the movement, up to here: past it nothing
# could be told right from wrong.
CHAOTIC = Errors(5e-2, 0.1, 0.25, 5e-2)
_WRONG = Errors(*[float("inf")] * 4)


@dataclass(frozen=True)
class Agreement:
    """What a comparison that succeeded found: the errors of all inputs together, and why more was allowed ("": it was not)."""

    errors: Errors
    note: str = ""


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value; infinite if shapes differ or a value is not finite."""
    import torch

    if value.shape != reference.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    value, reference = value.detach().double(), reference.detach().double()  # booleans and whole numbers, too
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    return float((value - reference).abs().max()) / (scale or 1.0) if reference.numel() else 0.0


def coarsest(model: torch.nn.Module) -> Arithmetic:
    """The coarsest arithmetic of a model's layers, whose tolerance all of the model is held to."""
    from autocomp.layers.part import Stored

    used = {module.family.arithmetic for module in model.modules() if isinstance(module, Stored)}
    return [each for each in ARITHMETICS.values() if each in used or each is FLOAT32][-1]


def tolerance(model: torch.nn.Module) -> float:
    """The relative error that is usual for a model's arithmetic: 1e-3, 1e-2 where it has 16-bit layers, 2e-2 where 8-bit ones."""
    return coarsest(model).tolerance.typical


def check_outputs(
    model: torch.nn.Module, run: Callable[..., object], inputs: Sequence[tuple[torch.Tensor, ...]], what: str
) -> float:
    """Compare ``run`` with ``model`` as `compare` does, and return the largest relative error of any value."""
    return compare(model, run, inputs, what).errors.worst


def compare(
    model: torch.nn.Module, run: Callable[..., object], inputs: Sequence[tuple[torch.Tensor, ...]], what: str
) -> Agreement:
    """Compare the outputs of ``run`` with ``model``'s on every input tuple.

    The typical error of the median input is held to the tolerance of the model's precision, tail, worst and decisions over all inputs.
    MismatchError says what is beyond it, and whether the model is chaotic.
    """
    import torch

    references = [reference_outputs(model, arguments) for arguments in inputs]
    _refuse_not_numbers(references, what)
    allowed = coarsest(model).tolerance
    with torch.no_grad():
        found = _together([_errors(run(*a), expected, allowed) for a, expected in zip(inputs, references, strict=True)])
    if found.within(allowed):
        return Agreement(found)
    if found != _WRONG and (moved := _movement(model, inputs, references, allowed)) is not None:
        raised = Errors(
            *(max(limit, min(_SLACK * own, most)) for limit, own, most in _columns(allowed, moved, CHAOTIC))
        )
        if raised != allowed:
            said = f"the model is chaotic: parts in a million of its inputs and weights move its own output by {_text(moved)}"
            if found.within(raised):
                return Agreement(found, said)
            raise MismatchError(f"{what} differs from torch by {_text(found)} (allowed: {_text(raised)}); {said}")
    raise MismatchError(f"{what} differs from torch by {_text(found)} (allowed: {_text(allowed)})")


def output_error(value: object, reference: list[torch.Tensor]) -> float:
    """The largest relative error of the outputs; infinite where their number differs."""
    values = _flat(value)
    if len(values) != len(reference):
        return float("inf")
    return max((relative_error(a, b) for a, b in zip(values, reference, strict=True)), default=0.0)


def reference_outputs(model: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What torch computes; the model gets inputs of its own, which it may write to."""
    import torch

    with torch.no_grad():
        return [output.clone() for output in _flat(model.eval()(*(tensor.clone() for tensor in arguments)))]


def _errors(value: object, reference: list[torch.Tensor], limits: Errors) -> Errors:
    values = _flat(value)
    if len(values) != len(reference):
        return _WRONG
    return _largest([_errors_of(a, b, limits) for a, b in zip(values, reference, strict=True)])


def _errors_of(value: torch.Tensor, reference: torch.Tensor, limits: Errors) -> Errors:
    """Errors of one output; infinite where the shape differs, or a value is infinite or no number that should be another."""
    import torch

    value, reference = value.detach(), reference.detach()
    if value.shape != reference.shape:
        return _WRONG
    if not reference.numel():
        return Errors()
    if not reference.is_floating_point():
        return Errors(decisions=float((value != reference).float().mean()))
    finite = torch.isfinite(reference)
    if (
        not torch.equal(value[~finite].to(reference.dtype), reference[~finite])
        or not torch.isfinite(value[finite]).all()
    ):
        return _WRONG
    if not finite.any():
        return Errors()
    values, expected = value[finite].double(), reference[finite].double()
    differences = (values - expected).abs()
    scale = float(expected.abs().max()) or 1.0
    tail = differences.kthvalue(math.ceil(_TAIL * differences.numel())).values
    return Errors(
        float(differences.norm() / (expected.norm() or 1.0)),
        float(tail) / scale,
        float(differences.max()) / scale,
        _decisions(value, reference, 2 * limits.tail * scale),
    )


def _decisions(value: torch.Tensor, reference: torch.Tensor, unclear: float) -> float:
    """The share of rows whose largest value is another one, though in the reference it is larger than that one by over ``unclear``.

    A row runs over the channels of a map [N, C, H, W], else over the last axis.
    """
    axis = 1 if reference.dim() >= 4 else reference.dim() - 1
    if reference.dim() < 2 or reference.shape[axis] < 2:
        return 0.0
    other = reference.gather(axis, value.argmax(axis, keepdim=True))
    return float((reference.amax(axis, keepdim=True) - other > unclear).float().mean())


def _movement(
    model: torch.nn.Module,
    inputs: Sequence[tuple[torch.Tensor, ...]],
    references: Sequence[list[torch.Tensor]],
    limits: Errors,
) -> Errors | None:
    """How far torch's own outputs move when all its floating-point inputs and weights change by a millionth, up or down at random:
    the most of some draws.

    None where the model cannot be called with other weights than its own.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def nudged(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.dtype) * 2 - 1
        return tensor.detach() * (1 + _NUDGE * signs)

    draws = []
    try:
        with torch.no_grad():
            for _ in range(_NUDGES):
                state = {name: nudged(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
                moved = [
                    torch.func.functional_call(model, state, tuple(nudged(tensor) for tensor in arguments))
                    for arguments in inputs
                ]
                draws.append(_together([_errors(a, b, limits) for a, b in zip(moved, references, strict=True)]))
    except Exception:  # the mismatch that was found must not be hidden by the search for an excuse
        return None
    return _largest(draws)


def _together(found: Sequence[Errors]) -> Errors:
    """Of several inputs: the median typical error, the share of all decisions, and the largest of the others."""
    largest = _largest(found)
    if largest == _WRONG:
        return largest
    typical = statistics.median(errors.typical for errors in found)
    return Errors(typical, largest.tail, largest.worst, statistics.mean(errors.decisions for errors in found))


def _largest(found: Sequence[Errors]) -> Errors:
    return Errors(*(max(column) for column in _columns(Errors(), *found)))


def _columns(*rows: Errors) -> list[tuple[float, ...]]:
    return [tuple(getattr(row, field.name) for row in rows) for field in fields(Errors)]


def _text(errors: Errors) -> str:
    if errors == _WRONG:
        return "its shapes, or values that are not finite"
    decisions = f", {errors.decisions:.1%} of the decisions" if errors.decisions else ""
    return f"{errors.worst:.1e} of the output's range (typically {errors.typical:.1e}, 99.9 % within {errors.tail:.1e}{decisions})"


def _refuse_not_numbers(references: Sequence[list[torch.Tensor]], what: str) -> None:
    import torch

    for outputs in references:
        for index, output in enumerate(outputs):
            if output.is_floating_point() and bool(torch.isnan(output).any()):
                raise MismatchError(
                    f"{what} cannot be compared: torch's own output {index} holds values that are not numbers"
                )


def _flat(value: object) -> list[torch.Tensor]:
    """The tensors of a model's output: of tuples, mappings and dataclasses (``ModelOutput``) in their order, without what is None."""
    import torch
    from torch.utils._pytree import tree_leaves

    tensors: list[torch.Tensor] = []
    for leaf in tree_leaves(value):  # which knows the containers that torch.export knows, a decoder's cache among them
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, Mapping):
            tensors += [tensor for item in leaf.values() for tensor in _flat(item)]
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            tensors += [tensor for field in dataclasses.fields(leaf) for tensor in _flat(getattr(leaf, field.name))]
    if not tensors:
        raise ExportError(
            f"a model must return tensors, in tuples, mappings or dataclasses if there are several, not {type(value).__name__}"
        )
    return tensors  # constants and objects that hold no tensors are left out, as the compiled module leaves them out


def first_differing_layer(
    model: torch.nn.Module,
    compile_model: Callable[[torch.nn.Module], Callable[..., object]],
    arguments: tuple[torch.Tensor, ...],
) -> str:
    """Name the first layer whose compiled output differs from torch; an empty string if none does when looked at one by one.

    The model is compiled again with every layer's output as an output of its own, so nothing is fused across them.
    """
    import torch

    names = [name for name, module in model.named_modules() if name and not list(module.children())]
    probe, seen = _probe(model, names)
    with torch.no_grad():
        reference = probe(*arguments)
    try:
        values = _flat(compile_model(probe)(*arguments))
    except Exception:  # the search for the culprit must not hide the mismatch that was found
        return ""
    limits = coarsest(model).tolerance
    for name, value, expected in zip(seen, values, reference, strict=False):
        if not _errors_of(value, expected, limits).within(limits):
            return name
    return ""


def _probe(model: torch.nn.Module, names: list[str]) -> tuple[torch.nn.Module, list[str]]:
    """A model that returns the output of each of its named layers, and the list it keeps of their names, in order of execution."""
    import torch

    from autocomp.layers.hooks import hooked

    seen: list[str] = []

    class Probe(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            outputs: list[torch.Tensor] = []
            seen.clear()

            def hook_for(name: str) -> Callable[..., None]:
                def hook(_module: torch.nn.Module, _inputs: object, output: object) -> None:
                    if isinstance(output, torch.Tensor):
                        outputs.append(output)
                        seen.append(name)

                return hook

            with hooked(self.model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names):
                self.model(*arguments)
            return tuple(outputs)

    return Probe(), seen
