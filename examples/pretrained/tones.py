"""Notes with a known pitch: harmonics that fall off, vibrato, and noise, from fixed seeds."""

from __future__ import annotations

import numpy as np

RATE = 16000  # samples a second


def tones(
    count: int,
    samples: int,
    seed: int,
    signal_to_noise: tuple[float, float],
    glide: float = 0.0,
    low: float = 60.0,
    high: float = 1000.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``count`` sounds [count, samples] and their pitch in Hz at each sample, both float64.

    Pitches are spread evenly over the octaves from ``low`` to ``high`` Hz and glide by up to ``glide`` octaves over the sound; the
    ratio of signal to noise is drawn from a range in dB. White and brown noise take turns.
    """
    random = np.random.default_rng(seed)
    time = np.arange(samples) / RATE
    start = np.log2(low) + random.random(count) * np.log2(high / low)
    slope = random.uniform(-glide, glide, count) / (samples / RATE)
    vibrato = random.uniform(0, 0.02, count)[:, None] * np.sin(2 * np.pi * random.uniform(4, 7, count)[:, None] * time)
    pitch = 2.0 ** (np.clip(start[:, None] + slope[:, None] * time, np.log2(low), np.log2(high)) + vibrato)
    phase = 2 * np.pi * np.cumsum(pitch, 1) / RATE
    sound = np.zeros_like(phase)
    tilt = random.uniform(0.5, 2.0, count)[:, None]  # how fast the harmonics fall off
    for harmonic in range(1, 13):
        audible = harmonic * pitch < RATE / 2
        strength = random.uniform(0.3, 1.0, count)[:, None] / harmonic**tilt
        sound += audible * strength * np.sin(harmonic * phase + random.uniform(0, 2 * np.pi, count)[:, None])
    noise = random.standard_normal((count, samples))
    brown = np.cumsum(noise, 1)
    brown -= brown.mean(1, keepdims=True)
    noise[::2] = brown[::2]
    ratio = 10 ** (random.uniform(*signal_to_noise, count)[:, None] / 20)
    sound = _unit(sound) + _unit(noise) / ratio
    return sound / np.abs(sound).max(1, keepdims=True), pitch


def within(pitch: np.ndarray, truth: np.ndarray, cents: float = 50.0) -> np.ndarray:
    """Whether a pitch is within a quarter tone (50 cents) of the truth."""
    return np.abs(1200 * np.log2(np.maximum(pitch, 1e-9) / truth)) < cents


def _unit(sound: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = sound / np.sqrt((sound**2).mean(1, keepdims=True))
    return scaled
