"""What a compressed model learns from: the uncompressed model's answers, the labels, and the outputs of the layers both have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from autocomp.errors import UsageError, last_line
from autocomp.layers.hooks import hooked
from autocomp.tasks.divergence import Comparison

if TYPE_CHECKING:
    from autocomp.graph.graph import Graph, Layer

STEADY = 1e-4  # of a channel's mean square: the least that its variance counts for


def distillation_loss(
    comparison: Comparison, expected: Sequence[Tensor], actual: Sequence[Tensor], at: float
) -> Tensor:
    """Return the divergence of rows of outputs from the teacher's, a mean over samples and places.

    Of classes it is T^2 KL(teacher / T || student / T) at the temperature ``at`` (Hinton et al. 2015, arXiv:1503.02531).
    """
    terms = comparison.terms(expected, actual, at)
    return torch.stack([term.mean() for term in terms if term.requires_grad] or [torch.zeros(())]).sum()


def labels_loss(loss: Callable[[Any, Any], Any], answer: Any, target: Any) -> Tensor:
    """What `Task.loss` says of an answer. UsageError if it raises, or returns anything but a scalar that gradients go through."""
    try:
        found = loss(answer, target)
    except Exception as error:
        given = (
            f"targets of shape {list(target.shape)}"
            if isinstance(target, Tensor)
            else f"targets of type {type(target).__name__}"
        )
        raise UsageError(
            f"Task.loss raised {type(error).__name__} for {given}: {last_line(error)}; it is called as loss(model(*inputs), target)"
        ) from error
    if not isinstance(found, Tensor) or found.dim() or not found.is_floating_point():
        what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise UsageError(f"Task.loss must return a scalar tensor, such as the mean over samples; it returned {what}")
    if torch.is_grad_enabled() and not found.requires_grad:
        raise UsageError(
            "Task.loss must be differentiable: what it returned depends on no output of the model through torch's operations"
        )
    return found


def sureness(comparison: Comparison, expected: Sequence[Tensor]) -> float:
    """How sure the teacher is: 1 less the mean entropy of its classes over the largest there can be; 1 where there are no classes."""
    found = []
    for output, rows in zip(comparison.counted, expected, strict=True):
        if output.kind == "classes" and rows.shape[-1] > 1:
            logs = functional.log_softmax(rows.float(), -1)
            entropy = -(logs.exp() * logs).sum(-1).mean()
            found.append(1.0 - float(entropy / torch.tensor(float(rows.shape[-1])).log()))
    return sum(found) / len(found) if found else 1.0


def shared_layers(graph: Graph, rows: Callable[[Layer], Tensor | None]) -> dict[str, Tensor | None]:
    """The layers whose outputs teacher and student share, all but the last, as `Features` takes them; ``rows`` gives what a layer kept."""
    layers = list(graph.layers.values())[:-1]
    return {layer.name: None if layer.out_group is None else rows(layer) for layer in layers}


class Features:
    """The outputs of layers that teacher and student share: ``shared`` has, by the layer's name, the teacher's channels that the student
    kept (None: all), along axis 1 of convolutions and the last of others."""

    def __init__(self, teacher: nn.Module, shared: Mapping[str, Tensor | None]) -> None:
        self.teacher, self.shared = teacher, shared

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """What each shared layer of a model returns while this is open."""
        seen: dict[str, Tensor] = {}

        def record(name: str) -> RemovableHandle:
            def hook(_module: nn.Module, _given: tuple[Tensor, ...], output: Tensor) -> None:
                seen[name] = output

            return model.get_submodule(name).register_forward_hook(hook)

        with hooked(map(record, self.shared)):
            yield seen

    def loss(self, expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> Tensor:
        """The squared error over the variance of each channel, a mean over layers, channels and places."""
        terms = []
        for name, kept in self.shared.items():
            if name not in expected or name not in actual:
                continue
            one, other = expected[name], actual[name]
            axis = 1 if one.dim() > 3 else -1
            if kept is not None:
                one = one.index_select(axis, kept)
            if one.shape != other.shape:
                continue
            one, other = one.movedim(axis, -1).flatten(0, -2), other.movedim(axis, -1).flatten(0, -2)
            variance = torch.maximum(one.var(0, correction=0), STEADY * one.square().mean(0)).clamp_min(1e-12)
            terms.append(((one - other).square() / variance).mean())
        return torch.stack(terms).mean() if terms else torch.zeros(())
