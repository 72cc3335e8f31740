"""Rounding left out of a training for a while, and scales found anew when it comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from autocomp.layers.hooks import hooked
from autocomp.recovery.forms.form import Training

SAMPLE = 1 << 13  # values of each batch that a range is chosen from


def set_rounding(form: nn.Module, rounding: bool) -> None:
    """Whether training forms round as they will be delivered, or compute in floats."""
    for module in form.modules():
        if isinstance(module, Training):
            module.rounding = rounding


@contextmanager
def observed(form: nn.Module) -> Iterator[None]:
    """Keep a sample of what each form is given while this is open, for `refit`."""

    def keep(module: Training, given: tuple[Tensor, ...]) -> None:
        values = given[0].detach().flatten()
        module.seen.append(values[:: max(1, len(values) // SAMPLE)].clone())

    with hooked(m.register_forward_pre_hook(keep) for m in form.modules() if isinstance(m, Training)):
        yield


def refit(form: nn.Module) -> None:
    """Find the scales of all forms anew: of weights from these, of inputs from what was seen of them."""
    for module in form.modules():
        if isinstance(module, Training):
            module.refit()
            module.seen.clear()
