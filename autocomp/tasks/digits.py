"""The built-in task ``digits``: real handwritten digits, a residual CNN trained here, three slices of conditions.

Data: scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set (1,797 images of 8x8),
enlarged to 16x16. Splits: 997 training, 400 validation (the search reads it), 400 test (read once, by the last report).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.progress import Progress
from autocomp.tasks.resnet import ResNet
from autocomp.tasks.task import Task
from autocomp.tasks.training import Recipe, trained

if TYPE_CHECKING:
    from collections.abc import Mapping

CLASSES = 10
SIDE = 16
HELD_OUT = 400  # images in each of the validation and the test split
SPLIT_SEED = 0
NOISE = 0.5  # standard deviation of the slice "noisy"; pixels lie between 0 and 1
DEGREES = 40.0  # largest rotation, either way, of the slice "rotated"
SHIFT = 0.125  # largest shift in training, of half the image's side: one pixel of 16
CALIBRATION_BATCH = 64

# 30 epochs take about 32 s of one core and end at 99.5 % on clean validation images.
RECIPE = Recipe(
    task="digits", version=2, epochs=30, batch=64, learning_rate=4.5e-3, weight_decay=0.02, label_smoothing=0.05
)


@dataclass(frozen=True)
class Split:
    """Images ``[N, 1, 16, 16]`` float32 in 0..1 and their digits ``[N]``."""

    images: Tensor
    targets: Tensor


def load_digits_task(
    epochs: int | None = None, cache: bool = True, seed: int = 0, progress: Progress | None = None
) -> Task:
    """Return the task, training its model first (about half a minute) unless it is in the user's cache.

    ``epochs`` other than the default is for tests: fewer epochs give a worse model sooner.
    """
    return digits_task(new_model, RECIPE.with_(epochs=epochs, seed=seed), "a residual CNN", cache, progress)


def digits_task(
    new_model: Callable[[], nn.Module], recipe: Recipe, described: str, cache: bool, progress: Progress | None
) -> Task:
    """Return the task of classifying the digits by any network that takes ``[N, 1, 16, 16]``, trained by a recipe."""
    training, validation, test = load_splits()
    seed = recipe.seed
    train = AugmentedBatches(training, recipe.batch, seed)
    model = trained(new_model, recipe, train, cache=cache, progress=progress or Progress())
    return Task(
        model=model,
        example_inputs=(training.images[:1].clone(),),
        calibration=calibration_batches(training, seed),
        evaluate=partial(accuracy, slices=slices(validation, seed=1)),
        test=partial(accuracy, slices=slices(test, seed=2)),
        train=train,
        loss=functional.cross_entropy,
        objective="accuracy",
        unit="%",
        name=recipe.task,
        description=(
            f"Handwritten digits (UCI, 1,797 images brought to 16x16), classified by {described}; "
            f"slices: clean, noisy (standard deviation {NOISE}), rotated (up to {DEGREES:.0f} degrees)"
        ),
    )


def new_model() -> ResNet:
    """Return the untrained network: 400,618 parameters, 21.6 million multiply-accumulates an image."""
    return ResNet(inputs=1, classes=CLASSES, widths=(32, 64, 128), blocks=(2, 2, 1))


def load_splits() -> tuple[Split, Split, Split]:
    """Return training, validation and test images; the same every time, each with all digits in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16  # pixels are counts from 0 to 16
    images = functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    targets = torch.tensor(data.target, dtype=torch.long)
    split = partial(train_test_split, test_size=HELD_OUT, random_state=SPLIT_SEED)
    rest, test = split(range(len(targets)), stratify=data.target)
    training, validation = split(rest, stratify=data.target[rest])
    first, second, third = (Split(images[index], targets[index]) for index in (training, validation, test))
    return first, second, third


def slices(split: Split, seed: int) -> dict[str, Split]:
    """Return the split under each condition; noise and angles are drawn once: every model meets the same images."""
    generator = torch.Generator().manual_seed(seed)
    count = len(split.targets)
    noisy = split.images + NOISE * torch.randn(split.images.shape, generator=generator)
    angles = _uniform(count, DEGREES, generator)
    return {
        "clean": split,
        "noisy": Split(noisy, split.targets),
        "rotated": Split(rotate(split.images, angles, torch.zeros(count, 2)), split.targets),
    }


def rotate(images: Tensor, degrees: Tensor, shift: Tensor) -> Tensor:
    """Rotate each image by its angle ``[N]`` and move it by ``shift [N, 2]`` (halves of the side); outside is black."""
    radians = torch.deg2rad(degrees)
    cos, sin = radians.cos(), radians.sin()
    matrix = torch.stack((torch.stack((cos, -sin), 1), torch.stack((sin, cos), 1)), 1)
    theta = torch.cat((matrix, shift[:, :, None]), dim=2)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def accuracy(model: nn.Module, slices: Mapping[str, Split]) -> dict[str, Tensor]:
    """Return which images are answered right, over all slices together, then by slice; the model's mode is left as it was.

    An image stands in every slice, so over all slices its share of right answers is one sample.
    """
    was_training = model.training
    model.eval()
    right = {}
    with torch.inference_mode():
        for name, split in slices.items():
            answers = torch.cat([model(images).argmax(1) for images in split.images.split(200)])
            right[name] = (answers == split.targets).double()
    model.train(was_training)
    by_slice = {f"accuracy/{name}": answered for name, answered in right.items()}
    return {"accuracy": torch.stack(list(right.values())).mean(0), **by_slice}


def calibration_batches(training: Split, seed: int) -> list[tuple[Tensor, ...]]:
    """Return training images of all three conditions, mixed, so that activations range as they will in use."""
    generator = torch.Generator().manual_seed(seed)
    conditions = [split.images for split in slices(training, seed=seed + 3).values()]
    count = len(training.targets)
    order = torch.randperm(count, generator=generator)
    which = torch.arange(count) % len(conditions)
    mixed = torch.stack(conditions)[which, order]
    return [(batch,) for batch in mixed.split(CALIBRATION_BATCH) if len(batch) == CALIBRATION_BATCH]


class AugmentedBatches:
    """Training batches ``((images,), targets)``: shuffled, rotated, shifted and made noisy anew on every pass.

    Passes differ from each other, but a fresh object of the same seed gives the same passes again.
    """

    def __init__(self, split: Split, batch: int, seed: int) -> None:
        self.split = split
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.split.targets) // self.batch

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        order = torch.randperm(len(self.split.targets), generator=self.generator)
        for index in order[: len(self) * self.batch].split(self.batch):
            yield (self._augment(self.split.images[index]),), self.split.targets[index]

    def _augment(self, images: Tensor) -> Tensor:
        count = len(images)
        angles = _uniform(count, DEGREES, self.generator)
        shift = torch.stack((_uniform(count, SHIFT, self.generator), _uniform(count, SHIFT, self.generator)), 1)
        strength = NOISE * torch.rand(count, 1, 1, 1, generator=self.generator)
        noise = strength * torch.randn(images.shape, generator=self.generator)
        return rotate(images, angles, shift) + noise


def _uniform(count: int, limit: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(count, generator=generator) - 1) * limit
