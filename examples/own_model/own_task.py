"""A user's own task: a trained model, inputs to calibrate on, and two functions that judge a model."""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import autocomp

BATCH = 64  # latency is measured for a batch of this size


def make_task() -> autocomp.Task:
    """Train the model (a few seconds) and say how compressed versions of it are calibrated and judged."""
    training, validation, test = load_splits()
    model = train(training)
    return autocomp.Task(
        model=model,
        example_inputs=(training[0][:BATCH],),
        # Calibration sees training data only, in batches as the model takes them.
        calibration=[(batch,) for batch in training[0].split(BATCH)],
        # The search reads the validation split as often as it likes; the final report reads the test split once.
        evaluate=lambda candidate: {"accuracy": accuracy(candidate, *validation)},
        test=lambda candidate: {"accuracy": accuracy(candidate, *test)},
        unit="%",  # a share: shown in percent and points
        name="breast-cancer",
        description="Malignant or benign, from 30 measurements of cell nuclei",
    )


def load_splits() -> list[tuple[Tensor, Tensor]]:
    """Return training, validation and test data, scaled by the mean and deviation of the training data."""
    inputs, targets = load_breast_cancer(return_X_y=True)
    rest, test = train_test_split(range(len(targets)), test_size=140, stratify=targets, random_state=0)
    training, validation = train_test_split(rest, test_size=140, stratify=targets[rest], random_state=0)
    mean, deviation = inputs[training].mean(0), inputs[training].std(0)
    scaled = torch.tensor((inputs - mean) / deviation, dtype=torch.float32)
    labels = torch.tensor(targets)
    return [(scaled[index], labels[index]) for index in (training, validation, test)]


def train(data: tuple[Tensor, Tensor], epochs: int = 60) -> nn.Module:
    """Train a network of four layers from a fixed seed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(epochs):
        for inputs, targets in zip(data[0].split(32), data[1].split(32), strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return which answers are right; their mean is the metric, and its standard error is shown. In batches as latency is measured at."""
    with torch.inference_mode():
        answers = torch.cat([model(batch).argmax(1) for batch in inputs.split(BATCH)])
    return answers == targets
