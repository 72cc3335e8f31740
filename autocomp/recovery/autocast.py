"""Training in 16 bits: what multiplies in them, the scale of gradients, and the layers that do not bear it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autocomp.graph.batches import Batch
from autocomp.layers.convolution import Layers
from autocomp.layers.hooks import hooked

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of a layer's outputs, root mean square: what 16 bits may change them by. bfloat16 rounds a number by up to 0.4 %. Chosen by hand, not measured.
SENSITIVE = 0.02


class Autocast:
    """The precision that a training computes in; ``off`` leaves all as it is.

    fp16 has gradients scaled, by more and more until one overflows (torch's GradScaler): small ones would vanish.
    """

    def __init__(self, kind: Literal["off", "bf16", "fp16"]) -> None:
        self.dtype = DTYPES.get(kind)
        self.scaler = torch.amp.GradScaler("cpu", enabled=self.dtype == torch.float16)
        self.kept: dict[str, nn.Module] = {}  # what is kept in fp32

    def __call__(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None else torch.autocast("cpu", self.dtype)

    def protect(self, form: nn.Module, calibration: Sequence[Batch]) -> list[str]:
        """Keep the layers of a model in fp32 that a batch finds sensitive; their names."""
        if self.dtype is None:
            return []
        self.kept = {name: form.get_submodule(name) for name in sensitive(form, calibration[0], self.dtype)}
        for module in self.kept.values():
            _keep(module)
        return list(self.kept)

    def release(self) -> None:
        """Give the layers that were kept back their own way to compute, so that copies of them have it."""
        for module in self.kept.values():
            del module.__dict__["forward"]

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Have gradients be what they are, before they are looked at."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of the optimizer, left out where a scaled gradient overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dict(self.scaler.state_dict())

    def take_up(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)


def sensitive(form: nn.Module, batch: Batch, dtype: torch.dtype) -> list[str]:
    """The float layers whose outputs for a batch are changed by 16 bits by more than `SENSITIVE`, or do not fit into them (65504 in fp16)."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            with torch.autocast("cpu", dtype):
                rounded = module.forward(*given).float()  # not through this hook again
            error = (rounded - output).square().mean().sqrt()
            if not bool(torch.isfinite(rounded).all()) or bool(error > SENSITIVE * output.square().mean().sqrt()):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name)) for name, module in form.named_modules() if isinstance(module, Layers)
    ]
    was = form.training
    try:
        with hooked(handles), torch.no_grad():
            form.eval()(*batch)
    finally:
        form.train(was)
    return list(dict.fromkeys(found))


def _keep(module: nn.Module) -> None:
    """Have a layer compute in fp32, whatever is around it."""
    compute = module.forward

    def forward(*given: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return compute(*(one.float() if one.is_floating_point() else one for one in given))

    module.forward = forward
