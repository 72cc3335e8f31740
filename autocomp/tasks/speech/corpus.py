"""The utterances of ``speech``: synthetic ones made to order, and those joined from recordings of single words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autocomp.progress import Progress
from autocomp.tasks.speech.audio import WINDOW, Audio, Samples, as_float, in_window
from autocomp.tasks.speech.espeak import Order, synthesised
from autocomp.tasks.speech.features import STEPS, log_mel
from autocomp.tasks.speech.noise import Noises, Random, joined, noisy
from autocomp.tasks.speech.recordings import SET_UP, Bank, banks
from autocomp.tasks.speech.voices import ACCENTS, FLITE, HELD_OUT_ACCENTS, PEOPLE, Split, variants
from autocomp.tasks.speech.words import LONGEST, WORDS, encoded, frames_needed

FASTEST, SLOWEST = 260, 120  # words a minute
LOWEST, HIGHEST = 20, 80  # pitch, of 0 to 99
SHORTEST = 1600  # samples: what is shorter was not said
CONDITIONS: dict[str, float | None] = {"clean": None, "10 dB": 10.0, "0 dB": 0.0}
SEEDS: dict[Split, int] = {"training": 3, "validation": 1, "test": 2}
COUNTS = {"human": 60, "synthetic": 80, "accent": 60}  # utterances of a held-out split
KINDS = ("human", "synthetic", "accent")
JOINED_WORDS = 3  # at most, of people: five do not fit into two seconds


@dataclass(frozen=True)
class Utterance:
    """What is said, by what kind of speaker, and its window of audio."""

    text: str
    kind: str
    audio: Audio


@dataclass(frozen=True)
class HeldOut:
    """Utterances of a held-out split: frames ``[N, 200, 40]`` under each condition; ``kinds`` says who speaks."""

    texts: list[str]
    kinds: list[str]
    frames: dict[str, Tensor]

    def described(self) -> str:
        return ", ".join(f"{self.kinds.count(kind)} utterances {kind}" for kind in KINDS if kind in self.kinds)


def held_out(split: Split, counts: Mapping[str, int], progress: Progress) -> HeldOut:
    """Return the validation or the test split, the same every time: ``counts`` utterances of each kind.

    Where recordings are missing the slice of people is, and `progress` is told.
    """
    random = np.random.default_rng(SEEDS[split])
    known = banks()
    utterances = []
    for kind, accents in (("synthetic", ACCENTS), ("accent", HELD_OUT_ACCENTS[split])):
        orders = drawn(2 * counts[kind], variants(split), accents, random)
        for text, said in spoken(orders)[: counts[kind]]:
            utterances.append(Utterance(text, kind, _placed(as_float(said, text), random)))
    people = [known[name] for name in PEOPLE[split] if name in known]
    if people:
        utterances += from_banks(people, counts["human"], "human", random)
    else:
        progress.warn(f"no recordings of people for {split}: its slice 'human' is left out; `{SET_UP}` gets them")
    if voices := [known[name] for name in FLITE[split] if name in known]:
        utterances += from_banks(voices, len(WORDS), "synthetic", random)
    noises = Noises(split, known.get(f"noise-{split}"))
    frames = {}
    for condition, decibels in CONDITIONS.items():
        audio = [one.audio for one in utterances]
        if decibels is not None:
            audio = [noisy(clean, noises.drawn(random, n), decibels) for n, clean in enumerate(audio)]
        frames[condition] = log_mel(torch.from_numpy(np.stack(audio)))
    return HeldOut([u.text for u in utterances], [u.kind for u in utterances], frames)


def drawn(count: int, names: Sequence[str], accents: Sequence[str], random: Random) -> list[Order]:
    """Return orders of one to five words, by any of the variants and accents, at any speed and pitch."""
    orders = []
    for _ in range(count):
        text = " ".join(random.choice(WORDS, int(random.integers(1, LONGEST, endpoint=True))))
        voice = f"{random.choice(accents)}+{random.choice(names)}"
        rate = int(random.integers(SLOWEST, FASTEST))
        orders.append(Order(voice, text, rate, int(random.integers(LOWEST, HIGHEST))))
    return orders


def spoken(orders: Sequence[Order]) -> list[tuple[str, Samples]]:
    """Return what was said of each order and how it sounds, without those that do not fit into a window, that CTC has too few frames for, or of
    which nothing was heard."""
    said = zip([order.text for order in orders], synthesised(orders), strict=True)
    return [
        (text, audio)
        for text, audio in said
        if SHORTEST <= len(audio) <= WINDOW and frames_needed(encoded(text)) <= STEPS
    ]


def from_banks(speakers: Sequence[Bank], count: int, kind: str, random: Random) -> list[Utterance]:
    """Return every recording by itself, then utterances of two or three of one speaker, up to ``count``."""
    found = [
        Utterance(word, kind, _placed(joined([clip], random), random))
        for bank in speakers
        for word, clips in bank.items()
        for clip in clips
    ]
    while len(found) < count:
        bank = speakers[int(random.integers(len(speakers)))]
        words = list(random.choice(list(bank), int(random.integers(2, JOINED_WORDS, endpoint=True))))
        audio = joined([bank[word][int(random.integers(len(bank[word])))] for word in words], random)
        if len(audio) <= WINDOW:
            found.append(Utterance(" ".join(words), kind, _placed(audio, random)))
    return found


def _placed(audio: Audio, random: Random) -> Audio:
    return in_window(audio, "an utterance", int(random.integers(WINDOW - len(audio) + 1)))
