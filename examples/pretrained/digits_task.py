"""digit-recognizer-py: a CNN for MNIST digits, on scikit-learn's handwritten digits drawn at 28 x 28 (accuracy).

autocomp check digits_task:task
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from packages import folder, part
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import autocomp

BATCH = 1  # latency is measured for one image
SPLITS = {"calibration": slice(0, 256), "validation": slice(256, 856), "test": slice(856, 1797)}


def pretrained() -> nn.Module:
    model: nn.Module = part("digit_recognizer", "model").CNN()
    weights = folder("digit_recognizer") / "models" / "handwriting_model.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu"))
    return model.eval()


@cache
def data(split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] as MNIST has them (centred by their mass, its mean and deviation), and labels [N]."""
    pixels, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(labels))[SPLITS[split]]
    images = torch.tensor(pixels[chosen] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    images = functional.interpolate(images, (18, 18), mode="bicubic", align_corners=False).clamp(0, 1)
    images = torch.stack([_centred(image) for image in functional.pad(images, (5, 5, 5, 5))])
    return (images - 0.1307) / 0.3081, torch.tensor(labels[chosen])


def outcomes(model: nn.Module, split: str) -> np.ndarray:
    """One row a sample: 1 where the answer is right."""
    images, labels = data(split)
    with torch.inference_mode():
        answers = torch.cat([model(batch).argmax(1) for batch in images.split(64)])
    return (answers == labels).numpy()[:, None].astype(float)


def metric(rows: np.ndarray, chosen: Any = slice(None)) -> float:
    return float(rows[chosen].mean())


def task() -> autocomp.Task:
    images, _ = data("calibration")
    return autocomp.Task(
        model=pretrained(),
        example_inputs=(images[:BATCH],),
        calibration=[(batch,) for batch in images.split(64)],
        evaluate=lambda model: {"accuracy": metric(outcomes(model, "validation"))},
        test=lambda model: {"accuracy": metric(outcomes(model, "test"))},
        unit="%",
        name="digit-recognizer-py",
        description="Handwritten digits, one 28 x 28 image",
    )


def _centred(image: Tensor) -> Tensor:
    """Move an image [1, 28, 28] so that its centre of mass is in the middle."""
    mass, steps = image[0], torch.arange(28.0)
    row, column = (float((mass.sum(axis) * steps).sum() / mass.sum()) for axis in (1, 0))
    return torch.roll(image, (round(13.5 - row), round(13.5 - column)), (1, 2))
