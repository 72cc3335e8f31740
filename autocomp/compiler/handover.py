"""What a compiled model is compared on before it is handed over, and what must be said of a model that the comparison proves little of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autocomp.compiler.verify import output_error, reference_outputs
from autocomp.errors import ExportError

if TYPE_CHECKING:
    import torch

VARIED = 2  # input tuples made up beside the example
_SAME = 1e-5  # of the output's range: two calls of one model differ by less, if its sums are made in parallel


def checked_inputs(model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
    """The example, input tuples like it that the model takes, and the example again: the second call must give what the first gave.

    ExportError for a model that does not repeat itself.
    """
    refuse_unrepeatable(model, example)
    made = [inputs for seed in range(VARIED) if _is_taken(model, inputs := varied(example, seed))]
    return [example, *made, example]


def varied(example: tuple[torch.Tensor, ...], seed: int) -> tuple[torch.Tensor, ...]:
    """Inputs of the same shapes whose values are drawn from the example's own range.

    Integers lie between its smallest and largest (a table is read nowhere else); other values are the example's own in another order, each
    somewhat larger or smaller; of a constant input, values about that constant.
    """
    import torch

    generator = torch.Generator().manual_seed(seed + 1)

    def one(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.reshape(-1)
        drawn = flat[torch.randint(len(flat), (len(flat),), generator=generator)]
        if tensor.is_complex() or tensor.dtype == torch.bool:
            return drawn.reshape(tensor.shape)
        if not tensor.is_floating_point():
            low, high = int(flat.min()), int(flat.max())
            return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor.dtype)
        noise = torch.randn(flat.shape, generator=generator).to(tensor.dtype)
        if bool((flat == flat[0]).all()):
            drawn = drawn + 0.1 * (drawn.abs() if float(drawn[0]) else 1.0) * noise
        else:
            drawn = (drawn * (1 + 0.1 * noise)).clamp(flat.min(), flat.max())
        return drawn.reshape(tensor.shape)

    return tuple(one(tensor) for tensor in example)


def refuse_unrepeatable(model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> None:
    """ExportError if two calls of the model on the same inputs give different outputs, saying whether chance or a state does it."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = reference_outputs(model, example)
        torch.manual_seed(1)
        second = reference_outputs(model, example)
        if _same(first, second):
            return
        torch.manual_seed(0)
        again = reference_outputs(model, example)
    if _same(first, again):
        raise ExportError(
            "the model is random: two calls on the same inputs differ with torch's seed. Take out what draws numbers at inference (dropout "
            "with training=True, torch.rand, sampling), or give the numbers as an input"
        )
    raise ExportError(
        "the model keeps a state: two calls on the same inputs differ, whatever torch's seed. What is compiled keeps none: give the state "
        "as an input and return the new one"
    )


def describe_outputs(model: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]]) -> str:
    """What must be said of the model: that it writes into its inputs, or that its outputs are the same for different ones; "" if neither.

    ExportError as `refuse_unrepeatable`.
    """
    refuse_unrepeatable(model, inputs[0])
    if said := describe_writing(model, inputs[0]):
        return said
    example = reference_outputs(model, inputs[0])
    others = [one for one in inputs[1:] if not _equal(one, inputs[0])]
    if not others:
        made = [varied(inputs[0], seed) for seed in range(VARIED)]
        others = [one for one in made if not _equal(one, inputs[0]) and _is_taken(model, one)]
    if not others or not all(output_error(tuple(reference_outputs(model, one)), example) == 0.0 for one in others):
        return ""
    return (
        f"the model's outputs are the same for {len(others) + 1} different inputs, so comparing the compiled model with torch proves "
        "nothing: check its weights and the example inputs"
    )


def describe_writing(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> str:
    """What must be said of a model that writes into its inputs; "" of one that does not."""
    import torch

    given = tuple(tensor.clone() for tensor in inputs)
    with torch.no_grad():
        model(*given)
    places = [place for place, (then, now) in enumerate(zip(inputs, given, strict=True)) if not _identical(then, now)]
    if not places:
        return ""
    return (
        f"the model writes into its input {', '.join(map(str, places))}, which a compiled module leaves as it is: where a later call reads that "
        "(a cache), return the new one and give it to the next call"
    )


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _is_taken(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> bool:
    """Whether the model computes numbers of inputs that were made up; not all models take all values."""
    import torch

    try:
        outputs = reference_outputs(model, inputs)
    except ExportError:
        raise
    except Exception:
        return False
    return not any(output.is_floating_point() and bool(torch.isnan(output).any()) for output in outputs)


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    import torch

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        a, b = a.double(), b.double()
        scale = float(a[torch.isfinite(a)].abs().max()) if bool(torch.isfinite(a).any()) else 0.0
        return torch.allclose(a, b, rtol=0.0, atol=_SAME * scale, equal_nan=True)

    return all(a.shape == b.shape and close(a, b) for a, b in zip(first, second, strict=True))


def _equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    import torch

    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
