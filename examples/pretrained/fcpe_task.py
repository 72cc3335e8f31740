"""torchfcpe: the pitch of every 10 ms of noisy, gliding tones, by Conformer convolutions (share of frames within 50 cents).

autocomp check fcpe_task:task
"""

from __future__ import annotations

import contextlib
import io
from functools import cache
from typing import Any

import numpy as np
import torch
from packages import part
from tones import RATE, tones, within
from torch import Tensor, nn

import autocomp

FRAMES = 100  # of 10 ms: one second
HOP = 160
SPLITS = {"calibration": (64, 1), "validation": (50, 2), "test": (150, 3)}  # sounds of one second, seed
UNUSED = (
    "torchaudio",
    "torchaudio.transforms",
    "einops",
    "local_attention",
)  # resampling, attention: not in this network


@cache
def bundle() -> nn.Module:
    """The package's model with its mel spectrogram."""
    with contextlib.redirect_stdout(io.StringIO()):
        model: nn.Module = part("torchfcpe", "models_infer", absent=UNUSED).spawn_bundled_infer_model("cpu")
    return model.eval()


@cache
def data(split: str) -> tuple[Tensor, np.ndarray]:
    """Mel spectrograms [N, 100, 128] and the pitch in Hz of each frame [N, 100]."""
    count, seed = SPLITS[split]
    sounds, pitch = tones(count, FRAMES * HOP, seed, (-12.0, 6.0), glide=0.5)
    mel = bundle().wav2mel(torch.tensor(sounds, dtype=torch.float32)[..., None], RATE)[:, :FRAMES]
    return mel, pitch[:, HOP // 2 :: HOP]


def outcomes(model: nn.Module, split: str) -> np.ndarray:
    """One row a sound: the share of its frames within 50 cents."""
    mels, truth = data(split)
    with torch.inference_mode():
        latent = torch.cat([model(batch) for batch in mels.split(10)])
        network = bundle().model
        found = network.cent_to_f0(network.latent2cents_local_decoder(latent, mask=False))[..., 0]
    return within(found.numpy(), truth).mean(1, keepdims=True)


def metric(rows: np.ndarray, chosen: Any = slice(None)) -> float:
    return float(rows[chosen].mean())


def task() -> autocomp.Task:
    mels, _ = data("calibration")
    return autocomp.Task(
        model=bundle().model,
        example_inputs=(mels[:1],),
        calibration=[(batch,) for batch in mels.split(16)],
        evaluate=lambda model: {"within 50 cents": metric(outcomes(model, "validation"))},
        test=lambda model: {"within 50 cents": metric(outcomes(model, "test"))},
        outputs="binary-probabilities",  # each of 360 bins by itself
        unit="%",
        name="torchfcpe",
        description="Pitch of one second of sound, every 10 ms",
    )
