"""From audio of any length to text, by modules of fixed lengths: windows that overlap, seams where nothing is heard, CTC decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autocomp.tasks.speech.audio import RATE, Audio, in_window
from autocomp.tasks.speech.decoding import Decode
from autocomp.tasks.speech.features import HOP, log_mel
from autocomp.tasks.speech.words import BLANK, CHARACTERS

STRIDE = 4  # frames of the front end for each step of the output
OVERLAP = 0.5  # of a window: nothing is cut that is shorter than a quarter of it, since the seam is looked for in the middle half
SILENT = 1e-4  # of the energy of the loudest window's: one whose loudest is softer has nobody in it
SILENCE = (BLANK, 1 + CHARACTERS.index(" "))


@dataclass(frozen=True)
class Module:
    """One length: ``run`` computes logits ``[1, frames / 4, classes]`` of frames ``[1, frames, 40]``."""

    frames: int
    run: Callable[[Tensor], Tensor]

    @property
    def samples(self) -> int:
        return self.frames * HOP


@dataclass(frozen=True)
class Heard:
    """What a recording said, and what it took: seconds of audio, of work, of work until the first window was written down."""

    text: str
    audio: float
    work: float
    first: float
    windows: int
    window: float

    @property
    def real_time_factor(self) -> float:
        return self.work / self.audio


def transcribe(audio: Audio, modules: Sequence[Module], decode: Decode) -> Heard:
    """Return what is said in audio of any length at 8 kHz.

    The shortest of the modules that holds it is run once. What is too long for all is cut into windows of the longest, each of which shares
    half with the next; their logits are joined where both hear nothing (`joined`).
    """
    module = chosen(modules, len(audio))
    begun = time.perf_counter()
    starts = window_starts(len(audio), module.samples)
    parts = [audio[start : start + module.samples] for start in starts]
    least = SILENT * max(float(np.square(part).max()) for part in parts)
    found: list[Tensor] = []
    first = 0.0
    for part in parts:
        found.append(_one(module, part, least))
        if not first:
            decode(found[0])
            first = time.perf_counter() - begun
    step = HOP * STRIDE
    text = decode(joined(found, [start // step for start in starts]))
    work = time.perf_counter() - begun
    return Heard(text, len(audio) / RATE, work, first, len(starts), module.samples / RATE)


def chosen(modules: Sequence[Module], samples: int) -> Module:
    """Return the shortest module that holds so many samples, or the longest of all."""
    return min(
        modules, key=lambda one: (one.samples < samples, one.samples if one.samples >= samples else -one.samples)
    )


def window_starts(samples: int, window: int) -> list[int]:
    """Return where windows begin, on whole steps of the output, so that all samples are in one and neighbours overlap by half or more."""
    step = HOP * STRIDE
    hop = int(window * (1 - OVERLAP)) // step * step
    return [0, *range(hop, samples - window + hop, hop)] if samples > window else [0]


def _one(module: Module, audio: Audio, least: float) -> Tensor:
    """Return the logits ``[steps, classes]`` of one window; where nobody speaks, of blanks alone."""
    if float(np.square(audio).max()) < least:
        logits = torch.zeros(module.frames // STRIDE, 1 + len(CHARACTERS))
        logits[:, BLANK] = 20.0
        return logits
    window = in_window(audio, "a window", window=module.samples)
    return module.run(log_mel(torch.from_numpy(window)[None]))[0]


def joined(parts: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """Join logits ``[steps, classes]`` that begin at ``starts``, each where it and the one before hear nothing for longest.

    The seam is looked for in the middle half of what two share: at the edges a word may be cut.
    """
    whole = parts[0]
    for part, start in zip(parts[1:], starts[1:], strict=True):
        shared = len(whole) - start
        quiet = quiet_steps(whole[start:]) & quiet_steps(part[:shared])
        margin = shared // 4
        seam = margin + longest_middle(quiet[margin : shared - margin].tolist())
        whole = torch.cat([whole[: start + seam], part[seam:]])
    return whole


def quiet_steps(logits: Tensor) -> Tensor:
    best = logits.argmax(-1)
    return torch.isin(best, torch.tensor(SILENCE))


def longest_middle(quiet: Sequence[bool]) -> int:
    """Return the middle of the longest stretch that is true, of the whole where none is.

    Examples:
        >>> longest_middle([True, False, True, True, True, False])
        3
    """
    best, begun = (0, len(quiet) // 2), 0
    for place, one in enumerate([*quiet, False]):
        if not one:
            best = max(best, (place - begun, (place + begun) // 2), key=lambda found: found[0])
            begun = place + 1
    return best[1]
