"""One small trained task for each kind of output, with the metric its users would read: is the proxy of accuracy any good there?

Each is ready in about a second: Adam on little data. ``make`` returns the model, calibration samples and the metric (larger is better).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.compress.batchnorm import reestimate_batchnorm

Metric = Callable[[nn.Module], float]
SIZE = 8


@dataclass(frozen=True)
class Made:
    model: nn.Module
    calibration: tuple[tuple[Tensor, ...], ...]
    metric: Metric


def net(last: int = 32) -> nn.Sequential:
    """A convolutional trunk, [N, 1, 8, 8] to [N, last, 8, 8]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, last, 3, padding=1, bias=False), nn.BatchNorm2d(last), nn.ReLU(),
    )  # fmt: skip


class Regressor(nn.Module):
    """How far apart two spots are: one column."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = net(), nn.Sequential(nn.Linear(32 * 4, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.avg_pool2d(self.trunk(x), 4).flatten(1))


class Segmenter(nn.Module):
    """The direction of the stripes at each pixel: [N, 4, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = net(), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


class TwoHeads(nn.Module):
    """The direction of stripes, and how wide they are, as a dict; with a map of integers, and None beside."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = net()
        self.hidden = nn.Linear(32, 32)
        self.scores, self.width = nn.Linear(32, 4), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        hidden = torch.relu(self.hidden(self.trunk(x).mean((2, 3))))
        scores = self.scores(hidden)
        return {"decided": scores.argmax(1), "scores": scores, "width": self.width(hidden), "loss": None}


class Embedder(nn.Module):
    """A vector of length one for each picture; those of one direction and width lie together."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = net(), nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(self.head(self.trunk(x).mean((2, 3))), dim=-1)


class Sequence(nn.Module):
    """Frames to scores of symbols, the first of them blank: [N, 12, T] to [N, T, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv1d(12, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 32, 5, padding=2), nn.ReLU()
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).transpose(1, 2))


class Decided(Segmenter):
    """The decisions first, then the scores they come from."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(x)
        return scores.argmax(1), scores


class Deciding(Segmenter):
    """Decisions alone; scores while it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else super().forward(x).argmax(1)


class Detector(Segmenter):
    """Whether stripes of each direction are there: four chances."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).amax((2, 3)).sigmoid()


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy gratings [count, 1, 8, 8], their direction (of 4) and wave number."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    wave = 0.8 + 1.2 * torch.rand(count, generator=generator)
    angle, phase = labels * torch.pi / 4, torch.rand(count, generator=generator) * 6.28
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = angle.cos()[:, None, None] * columns + angle.sin()[:, None, None] * rows
    clean = torch.sin(wave[:, None, None] * along + phase[:, None, None])
    return (clean + 0.8 * torch.randn(clean.shape, generator=generator))[:, None], labels, wave


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures whose left part is striped one way and the right another; the direction at each pixel."""
    generator = torch.Generator().manual_seed(seed)
    (one, first, _), (two, second, _) = stripes(count, seed), stripes(count, seed + 1000)
    border = torch.randint(2, 7, (count, 1, 1), generator=generator)
    left = torch.arange(SIZE).expand(count, SIZE, SIZE) < border
    return torch.where(left[:, None], one, two), torch.where(left, first[:, None, None], second[:, None, None])


def spots(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two spots in noise, and their distance [count, 1]."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(count, 2, 2, generator=generator) * (SIZE - 1)
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"), -1).float()
    far = (grid[None, None] - places[:, :, None, None]).square().sum(-1)
    maps = torch.exp(-far / 1.5).sum(1) + 0.1 * torch.randn(count, SIZE, SIZE, generator=generator)
    return maps[:, None], (places[:, 0] - places[:, 1]).norm(dim=1, keepdim=True)


def spoken(count: int, seed: int, length: int = 32) -> tuple[Tensor, Tensor]:
    """Frames [count, 12, length] of four symbols, each some frames long, with silence between; the symbol at its middle, else 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randn(5, 12, generator=torch.Generator().manual_seed(5))
    shapes[0] = 0
    frames, target = torch.zeros(count, length, dtype=torch.long), torch.zeros(count, length, dtype=torch.long)
    for row in range(count):
        at = int(torch.randint(0, 4, (), generator=generator))
        while at + 5 <= length:
            symbol, long = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 5), (3, 6)))
            frames[row, at : at + long] = symbol
            target[row, at + long // 2] = symbol
            at += long + int(torch.randint(1, 4, (), generator=generator))
    x = shapes[frames] + 0.8 * torch.randn(count, length, 12, generator=generator)
    return x.transpose(1, 2), target


def trained(
    model: nn.Module, inputs: Tensor, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], steps: int
) -> nn.Module:
    """The model after some steps of Adam; ``loss(model, inputs, indices)``."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(0, len(inputs), (64,), generator=generator)
        optimizer.zero_grad()
        loss(model, inputs[chosen], chosen).backward()
        optimizer.step()
    reestimate_batchnorm(model.eval(), [(inputs,)])  # so short a training leaves statistics that lag behind
    return model


def make(kind: str) -> Made:
    torch.manual_seed(0)
    if kind == "sequence":
        return sequence()
    if kind == "regression":
        return regression()
    x, labels, wave = stripes(768, seed=1)
    test, right, width = stripes(1000, seed=2)
    pixels, at_pixels = halves(768, seed=1)
    test_pixels, right_pixels = halves(300, seed=2)
    if kind == "segmentation":
        model = trained(Segmenter(), pixels, lambda m, x, i: functional.cross_entropy(m(x), at_pixels[i]), 60)
        return Made(model, ((pixels[:128],),), lambda m: overlap(m(test_pixels).argmax(1), right_pixels))
    if kind == "decided first":
        model = trained(Decided(), pixels, lambda m, x, i: functional.cross_entropy(m(x)[1], at_pixels[i]), 60)
        return Made(model, ((pixels[:128],),), lambda m: overlap(m(test_pixels)[0], right_pixels))
    if kind == "decisions":
        model = trained(Deciding(), pixels, lambda m, x, i: functional.cross_entropy(m(x), at_pixels[i]), 60)
        return Made(model, ((pixels[:128],),), lambda m: overlap(m(test_pixels), right_pixels))
    if kind == "heads":

        def loss(model: nn.Module, x: Tensor, i: Tensor) -> Tensor:
            answers = model(x)
            return functional.cross_entropy(answers["scores"], labels[i]) + functional.mse_loss(
                answers["width"][:, 0], wave[i]
            )

        def metric(model: nn.Module) -> float:
            answers = model(test)
            return float((answers["decided"] == right).float().mean()) + explained(answers["width"][:, 0], width)

        return Made(trained(TwoHeads(), x, loss, 60), ((x[:128],),), metric)
    if kind == "chances":
        there = torch.stack([(at_pixels == k).flatten(1).any(1) for k in range(4)], 1).float()
        test_there = torch.stack([(right_pixels == k).flatten(1).any(1) for k in range(4)], 1)
        model = trained(Detector(), pixels, lambda m, x, i: functional.binary_cross_entropy(m(x), there[i]), 60)
        return Made(model, ((pixels[:128],),), lambda m: float(((m(test_pixels) > 0.5) == test_there).float().mean()))
    group = labels * 3 + ((wave - 0.8) / 0.4).long().clamp(0, 2)
    test_group = right * 3 + ((width - 0.8) / 0.4).long().clamp(0, 2)

    def contrast(model: nn.Module, x: Tensor, i: Tensor) -> Tensor:
        vectors = model(x)
        close = (10 * vectors @ vectors.T).masked_fill(torch.eye(len(i), dtype=torch.bool), -1e9).log_softmax(1)
        same = (group[i][:, None] == group[i]) & ~torch.eye(len(i), dtype=torch.bool)
        return -(close * same).sum() / same.sum()

    def retrieved(model: nn.Module) -> float:
        vectors = model(test)
        nearest = (vectors @ vectors.T).fill_diagonal_(-2).topk(5, dim=1).indices
        return float((test_group[nearest] == test_group[:, None]).float().mean())

    return Made(trained(Embedder(), x, contrast, 80), ((x[:128],),), retrieved)


def regression() -> Made:
    (x, far), (test, right) = spots(768, seed=1), spots(1000, seed=2)
    model = trained(Regressor(), x, lambda m, x, i: functional.mse_loss(m(x), far[i]), 80)
    return Made(model, ((x[:128],),), lambda m: explained(m(test), right))


def sequence() -> Made:
    (x, target), (test, right) = spoken(256, seed=1), spoken(150, seed=2)
    weight = torch.tensor([0.3, 1, 1, 1, 1])
    model = trained(
        Sequence(), x, lambda m, x, i: functional.cross_entropy(m(x).transpose(1, 2), target[i], weight), 80
    )
    # Lengths vary, from batch to batch and from the example's.
    calibration = tuple((spoken(16, seed=3 + length, length=length)[0],) for length in range(24, 52, 4))
    return Made(model, calibration, lambda m: -sum(map(edits, read(m(test)), right.tolist())) / int((right > 0).sum()))


def explained(found: Tensor, right: Tensor) -> float:
    """R^2."""
    return 1 - float((found - right).square().mean() / right.var(correction=0))


def overlap(found: Tensor, right: Tensor) -> float:
    """Mean intersection over union of four classes."""
    shares = [((found == k) & (right == k)).sum() / ((found == k) | (right == k)).sum().clamp_min(1) for k in range(4)]
    return float(torch.stack(shares).mean())


def read(scores: Tensor) -> list[list[int]]:
    """Greedy CTC: the best symbol of each frame, repeats and blanks dropped."""
    best = scores.argmax(-1)
    kept = (best > 0) & torch.cat([torch.ones_like(best[:, :1]), (best[:, 1:] != best[:, :-1]).long()], 1).bool()
    return [row[mask].tolist() for row, mask in zip(best, kept, strict=True)]


def edits(found: list[int], frames: list[int]) -> int:
    """Levenshtein distance to the symbols of a target."""
    wanted = [symbol for symbol in frames if symbol]
    line = list(range(len(wanted) + 1))
    for i, one in enumerate(found, 1):
        last, line[0] = line[0], i
        for j, other in enumerate(wanted, 1):
            last, line[j] = line[j], min(line[j] + 1, line[j - 1] + 1, last + (one != other))
    return line[-1]


# What each is found to be compared by.
KINDS = {
    "regression": ["regression"],
    "segmentation": ["classes@1"],
    "heads": ["ignored", "classes@1", "regression"],
    "embedding": ["embedding@1"],
    "sequence": ["classes@2"],
    "decided first": ["ignored", "classes@1"],
    "decisions": ["decisions"],
    "chances": ["binary-probabilities@1"],
}
