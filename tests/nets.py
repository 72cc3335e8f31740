"""Small networks of the tests: random weights, BatchNorm statistics drawn at random so that folding has work to do."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A basic residual block; a strided 1x1 shortcut where the shape changes; depthwise-separable on request."""

    def __init__(self, channels: int, out: int, stride: int = 1, depthwise: bool = False) -> None:
        super().__init__()
        if depthwise:
            self.conv1: nn.Module = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
            hidden, kernel = channels, 1
        else:
            self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
            hidden, kernel = out, 3
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, out, kernel, 1, kernel // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """Stem, two residual blocks (the second strided), average pool, classifier. Input [N, 1, 12, 12], output [N, 5]."""

    def __init__(self, width: int = 16, depthwise: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.block1 = Block(width, width)
        self.block2 = Block(width, 2 * width, stride=2, depthwise=depthwise)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = self.block2(self.block1(x))
        return self.head(self.pool(x).flatten(1))


class Flat(nn.Module):
    """A convolution flattened into a two-layer perceptron: one channel spreads over 16 columns of the first Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=3)
        self.hidden = nn.Linear(8 * 16, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


class Twice(nn.Module):
    """One convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Concatenated(nn.Module):
    """Two branches joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 8, 3, padding=1)
        self.right = nn.Conv2d(1, 16, 1)
        self.join = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(torch.relu(self.join(x)).mean((2, 3)))


class Odd(nn.Module):
    """What is rarer: circular padding, a convolution that reads and feeds one group, a grouped one, no norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, padding_mode="circular")
        self.loop = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.down = nn.Conv2d(32, 32, 1, stride=2)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.head = nn.Linear(32, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.down(torch.relu(x + self.loop(x))))
        return self.head(torch.relu(self.grouped(x)).mean((2, 3)))


class Branching(nn.Module):
    """Control flow that depends on the data: torch.export must refuse it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.head(x)
        return self.head(-x)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm uneven statistics and factors (some negative), in place; returns it in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            count = module.num_features
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(count, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(count, generator=generator) + 0.5)
            module.weight.data.copy_(torch.randn(count, generator=generator) * 0.3 + 0.8)
            module.bias.data.copy_(torch.randn(count, generator=generator) * 0.2)
    return model.eval()


def make(width: int = 16, depthwise: bool = False, seed: int = 0) -> nn.Module:
    """A ResidualNet with a fixed seed."""
    torch.manual_seed(seed)
    return randomise(ResidualNet(width, depthwise), seed)


def images(count: int = 32, seed: int = 1) -> Tensor:
    """Smooth random pictures [count, 1, 12, 12]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(12, 12), mode="bilinear")
