"""Training batches of ``speech``: voices, speeds, noises, microphones and masks drawn anew for every utterance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autocomp.tasks.speech.audio import WINDOW, Audio, Samples, as_float, in_window
from autocomp.tasks.speech.corpus import JOINED_WORDS, SEEDS, drawn, spoken
from autocomp.tasks.speech.features import BANDS, STEPS, log_mel, mel_filters
from autocomp.tasks.speech.noise import Noises, Random, joined, noisy
from autocomp.tasks.speech.recordings import Bank, banks
from autocomp.tasks.speech.voices import ACCENTS, FLITE, FOREIGN_ACCENTS, PEOPLE, variants
from autocomp.tasks.speech.words import BLANK, encoded, frames_needed

SHARES = {"people": 0.25, "flite": 0.2}  # of utterances; the rest are espeak-ng's. Without recordings all are
SPEEDS = ((9, 10), (1, 1), (11, 10))  # speed perturbation (Ko et al. 2015)
WIDER = (
    (4, 5),
    (9, 10),
    (1, 1),
    (11, 10),
    (6, 5),
)  # speed moves pitch and resonances, too: few speakers sound like more
FOREIGN = 0.2  # of espeak-ng's utterances
WARPS = (0.88, 0.91, 0.94, 0.97, 1.0, 1.03, 1.06, 1.09, 1.12)  # vocal tracts of other lengths
NOISELESS = 0.25  # the share without noise; the others have a ratio to it of
SNR = (-3.0, 25.0)  # dB
GAIN = 6.0  # dB either way of a smooth curve over the bands: another microphone
TIME_MASKS, LONGEST_MASK = 2, 20  # SpecAugment (Park et al. 2019, arXiv:1904.08779): frames, and
BAND_MASKS, WIDEST_MASK = 2, 7  # bands that are silenced


@dataclass(frozen=True)
class Augmentation:
    """What is changed about an utterance: its speed, the speaker's vocal tract, stretches that are silenced, the surroundings."""

    speed: bool = True
    warp: bool = True
    masks: bool = True
    noise: bool = True
    microphone: bool = True


ALL = Augmentation()


@dataclass(frozen=True)
class Voices:
    """Who and what is heard in training."""

    synthetic: list[tuple[str, Samples]]
    recorded: dict[str, list[Bank]]  # by the names of `SHARES`
    noises: Noises


def voices(utterances: int, seed: int) -> Voices:
    """Return the voices of the training split, with about ``utterances`` of espeak-ng's: some do not fit."""
    known = banks()
    speakers = {"people": PEOPLE["training"], "flite": FLITE["training"]}
    recorded = {name: [known[one] for one in some if one in known] for name, some in speakers.items()}
    random, foreign = np.random.default_rng((SEEDS["training"], seed)), round(utterances * FOREIGN)
    orders = drawn(utterances - foreign, variants("training"), ACCENTS, random)
    orders += drawn(foreign, variants("training"), FOREIGN_ACCENTS, random)
    return Voices(spoken(orders), recorded, Noises("training", known.get("noise-training")))


class SpeechBatches:
    """Batches ``((frames,), characters)``: frames ``[N, 200, 40]``, classes ``[N, longest]`` filled up with blanks.

    Passes differ from each other, but a fresh object of the same seed gives the same passes again. Voices are synthesised when the first
    batch is asked for, and once in a cache folder. Noise and masks come in bit by bit over the first ``gentle`` batches: with all of them
    from the start CTC did not leave its plateau (one character for all) in 650 steps, without them it did in 150.
    """

    def __init__(
        self, utterances: int, batch: int, length: int, seed: int, augmentation: Augmentation = ALL, gentle: int = 0
    ) -> None:
        self.utterances = utterances
        self.gentle = gentle
        self._batches = 0
        self.batch = batch
        self.length = length
        self.augmentation = augmentation
        self.seed = seed
        self._random = np.random.default_rng((4, seed))
        self._voices: Voices | None = None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for _ in range(self.length):
            yield self._drawn()

    def state(self) -> dict[str, Any]:
        """Return where the drawing is: what `restored` goes on from."""
        return {"random": self._random.bit_generator.state, "batches": self._batches}

    def restored(self, state: dict[str, Any]) -> None:
        self._random.bit_generator.state = state["random"]
        self._batches = state["batches"]

    def _drawn(self) -> tuple[tuple[Tensor, ...], Tensor]:
        if self._voices is None:
            self._voices = voices(self.utterances, self.seed)
        random, augmentation = self._random, self.augmentation
        hard = 1.0 if self._batches >= self.gentle else self._batches / self.gentle
        self._batches += 1
        texts: list[str] = []
        windows: list[Audio] = []
        while len(windows) < self.batch:
            text, audio, speeds = self._utterance(self._voices)
            if augmentation.speed:
                audio = faster(audio, *speeds[int(random.integers(len(speeds)))])
            if len(audio) > WINDOW or frames_needed(encoded(text)) > STEPS:
                continue
            window = in_window(audio, "an utterance", int(random.integers(WINDOW - len(audio) + 1)))
            if augmentation.noise and random.random() < (1 - NOISELESS) * hard:
                number = int(random.integers(len(self._voices.noises.kinds)))
                window = noisy(window, self._voices.noises.drawn(random, number), random.uniform(*SNR))
            texts.append(text)
            windows.append(window)
        warps = random.choice(WARPS, self.batch) if augmentation.warp else np.ones(self.batch)
        filters = torch.stack([mel_filters(float(warp)) for warp in warps])
        gain = gains(self.batch, random) if augmentation.microphone else None
        frames = log_mel(torch.from_numpy(np.stack(windows)), gain, filters)
        if augmentation.masks:
            mask(frames, random, hard)
        return (frames,), padded([encoded(text) for text in texts])

    def _utterance(self, heard: Voices) -> tuple[str, Audio, Sequence[tuple[int, int]]]:
        """Return a text, how it sounds, and the speeds that it may have."""
        random, at = self._random, self._random.random()
        for name, share in SHARES.items():
            if at < share and (speakers := heard.recorded[name]):
                bank = speakers[int(random.integers(len(speakers)))]
                words = list(random.choice(list(bank), int(random.integers(1, JOINED_WORDS, endpoint=True))))
                clips = [bank[word][int(random.integers(len(bank[word])))] for word in words]
                return " ".join(words), joined(clips, random), WIDER
            at -= share
        text, samples = heard.synthetic[int(random.integers(len(heard.synthetic)))]
        return text, as_float(samples, text), SPEEDS


def faster(audio: Audio, up: int, down: int) -> Audio:
    """Return audio at ``up / down`` times the speed."""
    from scipy.signal import resample_poly

    return audio if up == down else np.asarray(resample_poly(audio, down, up), np.float32)


def gains(count: int, random: Random) -> Tensor:
    """Return a smooth random gain of energy for each band ``[N, 1, 40]``: three cosines, within 6 dB either way together."""
    place = np.arange(BANDS) / BANDS
    waves = np.stack([np.cos(np.pi * (k + 1) * place) for k in range(3)])  # [3, bands]
    decibels = random.uniform(-GAIN / 3, GAIN / 3, (count, 3)) @ waves
    return torch.from_numpy(10 ** (decibels / 10)).float()[:, None]


def mask(frames: Tensor, random: Random, share: float = 1.0) -> None:
    """Silence stretches of time and of bands in place, other ones for each utterance, of a ``share`` of them."""
    for one in frames:
        if random.random() >= share:
            continue
        for _ in range(TIME_MASKS):
            width = int(random.integers(LONGEST_MASK))
            start = int(random.integers(len(one) - width))
            one[start : start + width] = -1
        for _ in range(BAND_MASKS):
            width = int(random.integers(WIDEST_MASK))
            start = int(random.integers(BANDS - width))
            one[:, start : start + width] = -1


def padded(classes: Sequence[Sequence[int]]) -> Tensor:
    """Return sequences of classes as one tensor, the shorter ones filled up with blanks."""
    longest = max(map(len, classes))
    return torch.tensor([[*some, *[BLANK] * (longest - len(some))] for some in classes])
