"""The front end of ``speech``: a window of audio becomes 200 frames of 40 log-mel bands. It is not part of the compiled module."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from autocomp.tasks.speech.audio import RATE, WINDOW

BANDS = 40
FFT = 256
LENGTH = RATE // 40  # 25 ms are looked at
HOP = RATE // 100  # every 10 ms
FRAMES = WINDOW // HOP
STEPS = FRAMES // 4  # what the model's subsampling leaves of them: a character each, at most
LOWEST, HIGHEST = 60.0, 3800.0  # Hz
BEND = 3000.0
RANGE = 6.0  # powers of ten of energy that are told apart, 60 dB: what is softer counts as silence


def log_mel(audio: Tensor, gain: Tensor | None = None, filters: Tensor | None = None) -> Tensor:
    """Return frames ``[N, T, 40]`` between -1 and 1 of windows of audio ``[N, 80 T]``.

    They are relative to the loudest of the window, so that it does not matter how loud a recording is. ``gain [N, 1, 40]`` multiplies
    energies first: another microphone or room. ``filters [N, bins, 40]`` take the place of `mel_filters`: others for each window.
    """
    spectrum = torch.stft(audio, FFT, HOP, LENGTH, torch.hann_window(LENGTH), return_complex=True)
    power = spectrum[..., : audio.shape[-1] // HOP].abs().square().transpose(1, 2)  # [N, frames, bins]
    energy = power @ (mel_filters() if filters is None else filters)
    if gain is not None:
        energy = energy * gain
    loudest = energy.amax((1, 2), keepdim=True).clamp(min=1e-12)
    decades = (energy / loudest).clamp(min=10.0**-RANGE).log10()
    return decades / (RANGE / 2) + 1


@cache
def mel_filters(warp: float = 1.0) -> Tensor:
    """Return triangles ``[bins, 40]`` evenly spaced on the mel scale (O'Shaughnessy's formula, 2595 log10(1 + f/700)).

    Filters are looked for ``warp`` times higher, so that resonances seem as much lower: those of a longer vocal tract (Jaitly & Hinton 2013).
    What is above `BEND` Hz is squeezed or stretched so that 4 kHz stays.
    """

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    corners = 700 * (10 ** (torch.linspace(mel(LOWEST), mel(HIGHEST), BANDS + 2) / 2595) - 1)
    bend, top = BEND * min(warp, 1) / warp, RATE / 2
    above = top - (top - BEND * min(warp, 1)) / (top - bend) * (top - corners)
    corners = torch.where(corners <= bend, corners * warp, above)
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    bins = torch.linspace(0, RATE / 2, FFT // 2 + 1)[:, None]
    return torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)
