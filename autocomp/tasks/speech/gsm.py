"""Recordings in GSM 06.10, telephones' compression, are decoded by the library of Debian's package libgsm1, called through ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from autocomp.errors import AutocompError
from autocomp.tasks.speech.audio import Samples

FRAME, SAMPLES = 33, 160  # bytes of a frame, and what it decodes to: 20 ms at 8 kHz


def decoded(content: bytes, library: Path) -> Samples:
    """Return a file's samples at 8 kHz. AutocompError if its bytes are no whole frames, or not of this format."""
    loaded = ctypes.CDLL(str(library))
    loaded.gsm_create.restype = ctypes.c_void_p
    state = ctypes.c_void_p(loaded.gsm_create())
    samples = np.zeros((len(content) // FRAME, SAMPLES), np.int16)
    bad = len(content) % FRAME
    for place, row in enumerate(samples):
        frame = content[place * FRAME : (place + 1) * FRAME]
        bad |= loaded.gsm_decode(state, frame, row.ctypes.data_as(ctypes.c_void_p))
    loaded.gsm_destroy(state)
    if bad:
        raise AutocompError("a recording is not in GSM 06.10: its package has changed")
    return samples.reshape(-1)
