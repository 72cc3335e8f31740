"""Whole models that several files compile, and all of a model in int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocomp.compress.scales import activation_parameters, quantised


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * 3
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool, self.down, self.up = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(nn.functional.silu(self.down(self.pool(x)))))


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU6(), InvertedResidual(16, 24, 2), InvertedResidual(24, 24, 1),
        SqueezeExcite(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


def quantise_all(model: nn.Module, x: Tensor) -> nn.Module:
    """Every convolution and linear layer in int8, ranges from one batch."""
    ranges: dict[str, tuple[float, int]] = {}
    handles = [
        module.register_forward_hook(
            lambda _m, inputs, _o, name=name: ranges.update(
                {name: activation_parameters(float(inputs[0].min()), float(inputs[0].max()))}
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    for name, parameters in ranges.items():
        model.set_submodule(name, quantised(model.get_submodule(name), *parameters))
    return model
