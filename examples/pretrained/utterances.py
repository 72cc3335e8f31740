"""Speech from espeak-ng, a synthesiser: the shared library that the package ``espeakng-loader`` ships, called through ctypes.

What it says depends on all that it has said before, so `spoken` asks a fresh process: the same list gives the same sounds.
"""

from __future__ import annotations

import ctypes
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path

import numpy as np
from packages import folder
from scipy.signal import resample_poly

RATE = 16000  # samples a second
SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS of speak_lib.h: sound goes to a callback
NO_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: a missing file is an error code, not the end of the process
UTF8 = 1  # espeakCHARS_UTF8
SPEED, PITCH = 1, 3  # espeakRATE, espeakPITCH
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

SENTENCES = (
    "The boy was there when the sun rose.",
    "A rod is used to catch pink salmon.",
    "The source of the huge river is the clear spring.",
    "Kick the ball straight and follow through.",
    "Help the woman get back to her feet.",
    "A pot of tea helps to pass the evening.",
    "Smoky fires lack flame and heat.",
    "The soft cushion broke the man's fall.",
    "The salt breeze came across from the sea.",
    "The girl at the booth sold fifty bonds.",
)
"""Ten of the sentences that telephone lines are judged by (IEEE, 1969)."""


@dataclass(frozen=True)
class Utterance:
    """``voice`` as espeak-ng names it (``en+m3``), ``speed`` in words a minute, ``pitch`` from 0 to 100."""

    text: str
    voice: str
    speed: int = 170
    pitch: int = 50


def spoken(utterances: Sequence[Utterance]) -> list[np.ndarray]:
    """Sounds [samples] at 16 kHz, float32 within ±1. RuntimeError with what espeak-ng's process wrote if it fails."""
    asked = json.dumps([asdict(utterance) for utterance in utterances])
    done = subprocess.run([sys.executable, __file__], input=asked.encode(), capture_output=True)
    if done.returncode:
        raise RuntimeError(f"espeak-ng failed: {done.stderr.decode(errors='replace').strip()[-500:]}")
    with np.load(io.BytesIO(done.stdout)) as sounds:
        return [sounds[str(index)] for index in range(len(utterances))]


def variants() -> list[str]:
    """The names of espeak-ng's ways to speak, in order: ``en+NAME`` is a voice."""
    return sorted(path.name for path in (folder("espeakng_loader") / "espeak-ng-data" / "voices" / "!v").iterdir())


class Synthesiser:
    """The library, the sound it has made since it was last asked, and its sample rate."""

    def __init__(self) -> None:
        where = folder("espeakng_loader")
        self.library = ctypes.CDLL(str(where / "libespeak-ng.so"))
        self.rate = self.library.espeak_Initialize(SYNCHRONOUS, 0, str(where).encode(), NO_EXIT)
        if self.rate <= 0:
            raise OSError(f"espeak-ng found no voices in {where}")
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self.heard: list[np.ndarray] = []
        self.callback = CALLBACK(self._hear)  # kept: the library holds no reference
        self.library.espeak_SetSynthCallback(self.callback)

    def speak(self, utterance: Utterance) -> np.ndarray:
        self.heard.clear()
        if self.library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {utterance.voice!r}")
        self.library.espeak_SetParameter(SPEED, utterance.speed, 0)
        self.library.espeak_SetParameter(PITCH, utterance.pitch, 0)
        text = utterance.text.encode() + b"\0"
        self.library.espeak_Synth(text, len(text), 0, 0, 0, UTF8, None, None)
        self.library.espeak_Synchronize()
        common = gcd(RATE, self.rate)
        sound = resample_poly(np.concatenate(self.heard), RATE // common, self.rate // common)
        return sound.astype(np.float32)

    def _hear(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
        if samples and count:
            self.heard.append(np.ctypeslib.as_array(samples, (count,)) / 2**15)
        return 0


def main() -> None:
    """Read a list of utterances (JSON), write their sounds (npz)."""
    synthesiser = Synthesiser()
    sounds = {str(index): synthesiser.speak(Utterance(**item)) for index, item in enumerate(json.load(sys.stdin))}
    np.savez(sys.stdout.buffer, **sounds)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
