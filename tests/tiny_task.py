"""A task that is ready at once: gratings in four directions, a residual CNN of random features, its head solved for.

``CALLS`` records every reading of a split, in order, so that a test can say who read what and when.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from autocomp import Task

torch.set_num_threads(1)

CLASSES = 4
SIZE = 8
CALLS: list[str] = []


class TinyNet(nn.Module):
    """Stem, one residual block, pool, classifier. Input [N, 1, 8, 8], output [N, 4]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy gratings [count, 1, 8, 8] of random phase, and which of four directions each has."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    angle = labels * torch.pi / CLASSES
    phase = torch.rand(count, generator=generator) * 2 * torch.pi
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = angle.cos()[:, None, None] * columns + angle.sin()[:, None, None] * rows
    noise = torch.randn(count, SIZE, SIZE, generator=generator)
    return (torch.sin(1.6 * along + phase[:, None, None]) + 0.8 * noise)[:, None], labels


@cache
def weights() -> dict[str, Tensor]:
    """State of the net: random features, BatchNorm statistics of training data, and the head by ridge regression."""
    torch.manual_seed(0)
    net = TinyNet()
    inputs, labels = data(512, seed=1)
    with torch.no_grad():
        for _ in range(20):
            net.train()(inputs)
        features = net.eval().features(inputs)
        mean, spread = features.mean(0), features.std(0) + 1e-3
        rows = torch.cat([(features - mean) / spread, torch.ones(len(features), 1)], 1)
        targets = 8.0 * (nn.functional.one_hot(labels, CLASSES) - 1 / CLASSES)
        solved = torch.linalg.solve(rows.T @ rows + torch.eye(rows.shape[1]), rows.T @ targets)
        net.head.weight.copy_((solved[:-1] / spread[:, None]).T)
        net.head.bias.copy_(solved[-1] - (mean / spread) @ solved[:-1])
    return net.state_dict()


def model() -> TinyNet:
    net = TinyNet()
    net.load_state_dict(weights())
    return net.eval()


def task() -> Task:
    """The task; ``TINY_SLEEP`` in the environment makes each reading of the validation split take that many seconds."""
    return Task(
        model=model(),
        example_inputs=(data(1, seed=2)[0],),
        calibration=[(data(64, seed=1)[0],)],
        evaluate=_reader("validation", seed=3),
        test=_reader("test", seed=4),
        unit="%",
        name="tiny",
    )


class Batches:
    """Training data with labels: six batches, the same at each pass."""

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for seed in range(100, 106):
            inputs, labels = data(64, seed)
            yield (inputs,), labels


def learning() -> Task:
    """The task with data to train with, and a metric that shows every bit that training regains: the mean likelihood of the right answer."""

    def reader(split: str, seed: int) -> Callable[[nn.Module], dict[str, Tensor]]:
        inputs, labels = data(200, seed)

        def read(net: nn.Module) -> dict[str, Tensor]:
            CALLS.append(split)
            with torch.no_grad():
                return {"likelihood": net(inputs).softmax(1)[torch.arange(200), labels]}

        return read

    made = task()
    made.evaluate, made.test = reader("validation", 3), reader("test", 4)
    made.train, made.loss, made.name = Batches(), nn.functional.cross_entropy, "learning"
    return made


def broken() -> Task:
    """A task whose metric is not a number, from the first reading on."""
    bare = task()
    bare.evaluate = lambda net: {"accuracy": float("nan")}
    return bare


def _reader(split: str, seed: int) -> Callable[[nn.Module], dict[str, float]]:
    inputs, labels = data(200, seed)

    def read(net: nn.Module) -> dict[str, float]:
        CALLS.append(split)
        time.sleep(float(os.environ.get("TINY_SLEEP", "0")))
        with torch.no_grad():
            right = net(inputs).argmax(1) == labels
        return {"accuracy": float(right.float().mean()), "accuracy/upright": float(right[labels == 0].float().mean())}

    return read
