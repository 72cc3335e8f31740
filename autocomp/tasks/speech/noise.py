"""What is heard beside the speech: coloured noise, babble of other voices, and clips of keys and chimes, each split its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from autocomp.tasks.speech.audio import RATE, WINDOW, Audio, Samples, as_float
from autocomp.tasks.speech.espeak import Order, synthesised
from autocomp.tasks.speech.recordings import Bank
from autocomp.tasks.speech.voices import BABBLE, Split

Random = np.random.Generator
Floats = npt.NDArray[np.float64]

CHATTER: Mapping[Split, Sequence[str]] = {  # what is said in the background
    "training": (
        "we moved the table closer to the window last week",
        "nobody remembers who ordered all of this bread",
        "the ferry leaves at half past and it never waits",
    ),
    "validation": (
        "my sister keeps her bicycle under the stairs",
        "there was snow on the hills until the end of may",
        "please turn the radio down while I am reading",
    ),
    "test": (
        "he painted the fence green because it was cheaper",
        "the museum is closed on the first day of the month",
        "those shoes were much too small for walking home",
    ),
}
TALKERS = (3, 6)  # at once, in babble
PAUSE = (0.03, 0.15)  # seconds between words that are joined
CLIPS = (2, 7)  # in a window of two seconds
STEEPEST = 2.0  # power falls with frequency to this power at most: 0 is white, 1 pink, 2 brown noise


class Noises:
    """Noise of a split, two seconds at a time: ``clips`` are its bank of recordings, without which there are two kinds, not three."""

    def __init__(self, split: Split, clips: Bank | None) -> None:
        orders = [
            Order(f"gmw/en+{voice}", text, rate, pitch)
            for voice in BABBLE[split]
            for text in CHATTER[split]
            for rate, pitch in ((150, 40), (190, 60))
        ]
        self.chatter = [as_float(said, "chatter") for said in synthesised(orders)]
        self.clips = [as_float(clip, "a clip") for some in (clips or {}).values() for clip in some]
        self.kinds = [self.coloured, self.babble, *([self.clicks] if self.clips else [])]

    def drawn(self, random: Random, number: int) -> Floats:
        """Return noise of one kind; numbers go through all kinds in turn."""
        return self.kinds[number % len(self.kinds)](random)

    def coloured(self, random: Random) -> Floats:
        spectrum = np.fft.rfft(random.standard_normal(WINDOW))
        fall = np.arange(1, len(spectrum) + 1) ** (-random.uniform(0, STEEPEST) / 2)
        return np.fft.irfft(spectrum * fall, WINDOW)

    def babble(self, random: Random) -> Floats:
        mixed = np.zeros(WINDOW)
        for index in random.choice(len(self.chatter), int(random.integers(*TALKERS, endpoint=True)), replace=False):
            said = np.resize(self.chatter[index], WINDOW)  # over and over
            mixed += np.roll(said, int(random.integers(WINDOW))) / power(said) ** 0.5
        return mixed

    def clicks(self, random: Random) -> Floats:
        mixed = np.zeros(WINDOW)
        for _ in range(int(random.integers(*CLIPS, endpoint=True))):
            clip = self.clips[int(random.integers(len(self.clips)))][:WINDOW]
            start = int(random.integers(WINDOW - len(clip) + 1))
            mixed[start : start + len(clip)] += clip
        return mixed


def noisy(speech: Audio, noise: Floats, decibels: float) -> Audio:
    """Return speech with noise at a signal-to-noise ratio: that of the speech where it sounds, and of the noise in the whole window."""
    sounding = np.flatnonzero(speech)
    wanted = power(speech[sounding[0] : sounding[-1] + 1]) / 10 ** (decibels / 10)
    return np.asarray(speech + noise * (wanted / power(noise)) ** 0.5, np.float32)


def power(x: Audio | Floats) -> float:
    return max(float(np.square(x, dtype=np.float64).mean()), 1e-12)


def joined(words: Sequence[Samples], random: Random) -> Audio:
    """Return recordings of single words one after the other, evened in loudness within 3 dB, with pauses of 30 to 150 ms."""
    parts: list[npt.NDArray[np.floating]] = []
    for word in words:
        if parts:
            parts.append(np.zeros(int(random.uniform(*PAUSE) * RATE), np.float32))
        x = as_float(word, "a recording")
        parts.append(x * (0.05 / power(x) ** 0.5 * 10 ** (random.uniform(-3, 3) / 20)))
    return np.concatenate(parts).astype(np.float32)
