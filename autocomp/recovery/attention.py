"""Attention maps of a model while it runs, and how far a student's are from its teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LEAST = 1e-6  # of an attention weight, so that its logarithm is one

_FUSED = (torch.ops.aten.scaled_dot_product_attention.default, functional.scaled_dot_product_attention)
_SOFTMAX = (
    torch.ops.aten.softmax.int,
    torch.ops.aten._softmax.default,
    functional.softmax,
    torch.softmax,
    Tensor.softmax,
)


class Maps(TorchFunctionMode):
    """Collects, while it is entered, what each attention looks at: ``found``, in the order of the calls, shape ``[N, T, S]``.

    A map is the mean over heads, so that a model with fewer of them can be compared. Heads that were merged with the batch before a softmax are
    not told apart: their maps have as many rows as there are heads in all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self, called: Any, types: Sequence[type], given: tuple[Any, ...] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        answer = called(*given, **(named or {}))
        if called in _FUSED:
            query, key, value, *rest = given
            # of the unit matrix, attention answers what it looks at, with every mask and scale of the call
            unit = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device).expand(*value.shape[:-1], -1)
            self._keep(called(query, key, unit, *rest, **(named or {})))
        elif called in _SOFTMAX and _over_the_last(given, named or {}):
            self._keep(answer)
        return answer

    def _keep(self, maps: Tensor) -> None:
        if maps.dim() >= 3:
            self.found.append(maps.float() if maps.dim() == 3 else maps.float().flatten(1, -3).mean(1))


def _over_the_last(given: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    axis = given[1] if len(given) > 1 else named.get("dim")
    return axis in (-1, given[0].dim() - 1)


def attention_loss(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> Tensor:
    """The divergence of a student's maps from its teacher's, in nats: a mean over the rows of each map, and over the maps.

    After Wang et al. (2020, arXiv:2012.15828), who compare relations where heads differ in number; here the mean over heads. Maps are
    matched in the order of the calls, where their shapes agree; zero where none do.
    """
    terms = [
        functional.kl_div(theirs.clamp_min(LEAST).log(), ours.clamp_min(LEAST), reduction="none").sum(-1).mean()
        for ours, theirs in zip(expected, actual, strict=False)
        if ours.shape == theirs.shape
    ]
    return torch.stack(terms).mean() if terms else torch.zeros(())
