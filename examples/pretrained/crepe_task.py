"""torchcrepe (tiny): the pitch of noisy tones, as the share of frames within 50 cents.

autocomp check crepe_task:task
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from packages import folder, part
from tones import tones, within
from torch import Tensor, nn

import autocomp

WINDOW = 1024  # samples of a frame
BATCH = 1  # latency is measured for one frame
SPLITS = {"calibration": (256, 1), "validation": (800, 2), "test": (2000, 3)}  # frames, seed
CENTS = torch.arange(360) * 20.0 + 1997.3794084376191  # the pitch that each bin stands for, in cents above 10 Hz


def pretrained() -> nn.Module:
    model: nn.Module = part("torchcrepe", "model", PITCH_BINS=360).Crepe("tiny")
    model.load_state_dict(torch.load(folder("torchcrepe") / "assets" / "tiny.pth", map_location="cpu"))
    return model.eval()


@cache
def data(split: str) -> tuple[Tensor, np.ndarray]:
    """Frames [N, 1024] of mean 0 and deviation 1, and the pitch in Hz at their middle [N]."""
    count, seed = SPLITS[split]
    sounds, pitch = tones(count, WINDOW, seed, (0.0, 20.0))
    frames = torch.tensor(sounds, dtype=torch.float32)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames, pitch[:, WINDOW // 2]


def outcomes(model: nn.Module, split: str) -> np.ndarray:
    """One row a frame: 1 where the pitch is within 50 cents."""
    frames, truth = data(split)
    with torch.inference_mode():
        found = torch.cat([_pitch(model(batch)) for batch in frames.split(100)])
    return within(found.numpy(), truth)[:, None].astype(float)


def metric(rows: np.ndarray, chosen: Any = slice(None)) -> float:
    return float(rows[chosen].mean())


def task() -> autocomp.Task:
    frames, _ = data("calibration")
    return autocomp.Task(
        model=pretrained(),
        example_inputs=(frames[:BATCH],),
        calibration=[(batch,) for batch in frames.split(64)],
        evaluate=lambda model: {"within 50 cents": metric(outcomes(model, "validation"))},
        test=lambda model: {"within 50 cents": metric(outcomes(model, "test"))},
        outputs="binary-probabilities",  # each of 360 bins by itself
        unit="%",
        name="torchcrepe",
        description="Pitch of one frame of 1024 samples",
    )


def _pitch(activations: Tensor) -> Tensor:
    """Hz [N] of activations [N, 360]: the mean pitch of the nine bins about the strongest, weighted by them."""
    near = activations.argmax(1, keepdim=True) + torch.arange(-4, 5)
    inside = (near >= 0) & (near < len(CENTS))
    near = near.clamp(0, len(CENTS) - 1)
    weights = activations.gather(1, near) * inside
    cents = (CENTS[near] * weights).sum(1) / weights.sum(1)
    return 10 * 2 ** (cents / 1200)
