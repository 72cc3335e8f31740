"""The built-in task ``digits-mobile``: the digits of ``digits``, told by a small MobileNetV2 of depthwise convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from autocomp.progress import Progress
from autocomp.tasks import digits
from autocomp.tasks.task import Task
from autocomp.tasks.training import Recipe

RECIPE = Recipe(
    task="digits-mobile", version=1, epochs=30, batch=64, learning_rate=6e-3, weight_decay=0.02, label_smoothing=0.05
)


def load_digits_mobile_task(
    epochs: int | None = None, cache: bool = True, seed: int = 0, progress: Progress | None = None
) -> Task:
    """Return the task, training its model first unless it is in the user's cache; see ``load_digits_task``."""
    recipe = RECIPE.with_(epochs=epochs, seed=seed)
    return digits.digits_task(new_model, recipe, "a MobileNetV2 of depthwise convolutions", cache, progress)


class InvertedResidual(nn.Module):
    """Widen by a 1x1, a 3x3 on each channel, narrow by a 1x1 without activation (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = convolution(inputs, hidden, 1)
        self.depthwise = convolution(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        result: Tensor = x + y if self.adds else y
        return result


class MobileNet(nn.Module):
    """Stem, inverted residuals as (outputs, stride) each, 1x1 head, mean over positions, classifier.

    Takes ``[N, inputs, H, W]``, returns logits ``[N, classes]``.
    """

    def __init__(
        self, inputs: int, classes: int, stem: int, blocks: tuple[tuple[int, int], ...], expansion: int, head: int
    ) -> None:
        super().__init__()
        self.stem = convolution(inputs, stem, 3)
        layers, channels = [], stem
        for outputs, stride in blocks:
            layers.append(InvertedResidual(channels, outputs, stride, expansion))
            channels = outputs
        self.blocks = nn.Sequential(*layers)
        self.head = convolution(channels, head, 1)
        self.classifier = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.blocks(self.stem(x)))
        result: Tensor = self.classifier(y.mean((2, 3)))
        return result


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the size (but for the stride), its BatchNorm, and ReLU6."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


def new_model() -> MobileNet:
    """Return the untrained network."""
    blocks = ((32, 1), (48, 2), (48, 1), (64, 2), (64, 1), (64, 1))
    return MobileNet(inputs=1, classes=digits.CLASSES, stem=32, blocks=blocks, expansion=4, head=256)
