"""From a WAV file to text with what a search delivered: windows that overlap, a compiled module or ONNX file, and CTC decoding.

Nothing here needs the voices or recordings that the task itself is made of.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autocomp.errors import UsageError, last_line
from autocomp.tasks.speech.audio import RATE, Audio, in_window
from autocomp.tasks.speech.decoding import Decode
from autocomp.tasks.speech.features import BANDS, HOP, log_mel
from autocomp.tasks.speech.words import BLANK, CHARACTERS

STRIDE = 4  # frames of the front end for each step of the output
OVERLAP = 0.5  # of a window: nothing is cut that is shorter than a quarter of it, since the seam is looked for in the middle half
SILENT = 1e-4  # of the energy of the loudest window's: one whose loudest is softer has nobody in it
SILENCE = (BLANK, 1 + CHARACTERS.index(" "))


@dataclass(frozen=True)
class Module:
    """One exported length: ``run`` computes logits ``[1, frames / 4, classes]`` of frames ``[1, frames, 40]``."""

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


def opened(folder: Path, onnx: bool = False) -> Module:
    """Open the ``model.so`` (or ``model.onnx``) of an exported point, ``RUN/models/ID``.

    UsageError if the folder is none, or its model reads no log-mel frames, or a package is missing.
    """
    manifest = folder / "manifest.json"
    try:
        shapes = [tuple(one["shape"]) for one in json.loads(manifest.read_text())["inputs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} is no exported model, give RUN/models/ID: {last_line(error)}") from error
    match shapes:
        case [(1, int(frames), bands)] if bands == BANDS and frames % STRIDE == 0:
            pass
        case _:
            raise UsageError(
                f"a recogniser reads frames of the shape (1, frames, {BANDS}), the model in {folder} reads {shapes}: give one that "
                "`autocomp search speech` wrote"
            )
    path = folder / ("model.onnx" if onnx else "model.so")
    if not path.exists():
        raise UsageError(f"there is no {path.name} in {folder}: its manifest.json says why it was not written")
    return Module(frames, _onnx(path) if onnx else _compiled(path))


def _onnx(path: Path) -> Callable[[Tensor], Tensor]:
    if find_spec("onnxruntime") is None:
        raise UsageError(f"{path.name} is run by ONNX Runtime, which is not installed: pip install onnxruntime")
    from autocomp.export.onnx import onnx_runner

    try:
        run = onnx_runner(path)
    except Exception as error:  # ONNX Runtime has many kinds
        raise UsageError(f"{path} cannot be opened by ONNX Runtime: {last_line(error)}") from error
    return lambda frames: _logits(run(frames))


def _compiled(path: Path) -> Callable[[Tensor], Tensor]:
    if find_spec("tvm") is None:
        raise UsageError(
            f"{path.name} is run by Apache TVM, which is not installed: pip install autocomp, or run model.onnx"
        )
    from autocomp.compiler.build import CompiledModel
    from autocomp.hardware.profile import load_profile

    run = CompiledModel.load(path, load_profile("x86-host")).run
    return lambda frames: _logits(run(frames))


def _logits(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]


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
