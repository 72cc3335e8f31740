"""Does what was compiled or exported compute what torch computes? Asked before any time of it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autocomp.errors import ExportError, MismatchError

if TYPE_CHECKING:
    import torch

FP32_TOLERANCE = 1e-3
# Where a float layer feeds a quantised one, sums in another order can move a value over a rounding step: a few
# activations then differ by one level of 255, and now and then an output by a percent. Integer layers themselves are exact.
INT8_TOLERANCE = 1e-2  # of most inputs: the median is held to this
INT8_WORST = 5e-2  # of any input, ties included
HALF_TOLERANCE = 1e-2  # operands of 11 bits, and kernels may sum in them
# A deep model of float and 8-bit layers in turn (a ViT) amplifies such flips. No two summation orders agree better on it than torch does
# with itself when the input is scaled by this; twice that movement is allowed too.
_NUDGE = 1 + 1e-6


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value; infinite if shapes differ or a value is not finite."""
    import torch

    if value.shape != reference.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    value, reference = value.detach(), reference.detach()
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    return float((value - reference).abs().max()) / (scale or 1.0) if reference.numel() else 0.0


def tolerance(model: torch.nn.Module) -> float:
    """The error allowed of a model: 1e-3, or 1e-2 where it has 8- or 16-bit layers."""
    if _has_integers(model):
        return INT8_TOLERANCE
    from autocomp.compress.half import HalfConv2d, HalfLinear

    return HALF_TOLERANCE if any(isinstance(m, HalfConv2d | HalfLinear) for m in model.modules()) else FP32_TOLERANCE


def _has_integers(model: torch.nn.Module) -> bool:
    from autocomp.compress.quantize import QuantConv2d, QuantLinear

    return any(isinstance(m, QuantConv2d | QuantLinear) for m in model.modules())


def check_outputs(
    model: torch.nn.Module, run: Callable[..., object], inputs: Sequence[tuple[torch.Tensor, ...]], what: str
) -> float:
    """Compare ``run`` with ``model`` on every input tuple and return the largest relative error.

    MismatchError if it is above 1e-3; for a model with quantised layers, if the median is above 1e-2 or any above 5e-2, and above twice
    what torch's own output moves when its inputs are scaled by 1 + 1e-6.
    """
    import statistics

    references = [reference_outputs(model, arguments) for arguments in inputs]
    errors = [output_error(run(*arguments), expected) for arguments, expected in zip(inputs, references, strict=True)]
    worst, middle, allowed = max(errors), statistics.median(errors), tolerance(model)
    if _has_integers(model) and worst > allowed:
        moved = [_movement(model, arguments, expected) for arguments, expected in zip(inputs, references, strict=True)]
        if middle <= max(allowed, 2 * statistics.median(moved)):
            allowed = max(INT8_WORST, 2 * max(moved))
    if not worst <= allowed:
        raise MismatchError(f"{what} differs from torch by {worst:.2e} of the output's range (allowed: {allowed:.0e})")
    return worst


def _movement(model: torch.nn.Module, arguments: tuple[torch.Tensor, ...], expected: list[torch.Tensor]) -> float:
    """How far torch's own output moves when its floating-point inputs grow by a millionth."""
    nudged = tuple(tensor * _NUDGE if tensor.is_floating_point() else tensor for tensor in arguments)
    return output_error(tuple(reference_outputs(model, nudged)), expected)


def reference_outputs(model: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    import torch

    with torch.no_grad():
        return _flat(model.eval()(*arguments))


def output_error(value: object, reference: list[torch.Tensor]) -> float:
    values = _flat(value)
    if len(values) != len(reference):
        return float("inf")
    return max((relative_error(a, b) for a, b in zip(values, reference, strict=True)), default=0.0)


def _flat(value: object) -> list[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _flat(item)]
    raise ExportError(f"a model must return a tensor or a tuple of tensors, not {type(value).__name__}")


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
    for name, value, expected in zip(seen, values, reference, strict=False):
        if relative_error(value, expected) > tolerance(model):
            return name
    return ""


def _probe(model: torch.nn.Module, names: list[str]) -> tuple[torch.nn.Module, list[str]]:
    """A model that returns the output of each of its named layers, and the list it keeps of their names, in order of execution."""
    import torch

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

            handles = [self.model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
            try:
                self.model(*arguments)
            finally:
                for handle in handles:
                    handle.remove()
            return tuple(outputs)

    return Probe(), seen
