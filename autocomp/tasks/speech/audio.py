"""Where audio enters ``speech``: WAV files and arrays are checked, and put into windows of fixed length."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autocomp.errors import UsageError

RATE = 8000  # samples a second: telephones', and the human recordings'
SECONDS = 2.0
WINDOW = int(SECONDS * RATE)
CLIPPED = 0.01  # share of samples at the very limit from which a recording is called clipped

Audio = npt.NDArray[np.float32]
Samples = npt.NDArray[np.int16]


def read_wav(path: Path, any_rate: bool = False) -> Audio:
    """Return a mono recording at 8 kHz, between -1 and 1. UsageError says what of the file is otherwise, and how to change it.

    One of ``any_rate`` from 8 kHz on is brought to 8 kHz. There is nothing above half of a lower rate, so that it is refused.
    """
    from scipy.io import wavfile

    try:
        rate, samples = wavfile.read(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # scipy raises many kinds on bytes that are no WAV
        raise UsageError(f"{path} is no WAV file that can be read: {error}") from error
    if any_rate and rate > RATE:
        return resampled(checked(samples, RATE, str(path)), int(rate))
    return checked(samples, int(rate), str(path))


def checked(samples: npt.NDArray[np.generic], rate: int, where: str) -> Audio:
    """Return audio as float32 between -1 and 1.

    UsageError, naming ``where`` it came from, if its rate is not 8 kHz, it is not mono, empty, silent, clipped, or not finite.
    """
    if samples.ndim != 1:
        raise UsageError(
            f"audio must be mono, {where} has the shape {samples.shape}: take one channel, or the mean of them"
        )
    if rate != RATE:
        raise UsageError(f"audio must have {RATE} samples a second, {where} has {rate}: `resampled` converts it")
    if not len(samples):
        raise UsageError(f"audio must hold samples, {where} is empty")
    x = as_float(samples, where)
    if bad := int((~np.isfinite(x)).sum()):
        raise UsageError(f"audio must be finite, {where} has {bad} value(s) that are NaN or infinite, of {len(x)}")
    if not np.abs(x).max():
        raise UsageError(f"audio must hold sound, {where} is silent: all {len(x)} samples are 0")
    if float((np.abs(x) >= 0.9999).mean()) > CLIPPED:
        raise UsageError(
            f"audio must not be clipped, more than {CLIPPED:.0%} of {where} is at the limit: record it softer"
        )
    return centred(x)


def as_float(x: npt.NDArray[np.generic], where: str) -> Audio:
    """Return samples of 16 bits, or floats, as float32 between -1 and 1."""
    if x.dtype == np.int16:
        return np.asarray(x, np.float32) * np.float32(2**-15)
    if x.dtype.kind == "f":
        return x.astype(np.float32)
    raise UsageError(f"audio must be of 16 bits or floats between -1 and 1, {where} is {x.dtype}: convert it first")


def centred(x: Audio) -> Audio:
    """Return audio about zero. The recordings of one speaker are not: cut from them, a word began and ended with a click."""
    return np.asarray(x - x.mean(), np.float32)


def resampled(x: Audio, rate: int) -> Audio:
    """Return audio of any rate at 8 kHz, filtered so that nothing above 4 kHz folds back."""
    from scipy.signal import resample_poly

    shared = math.gcd(rate, RATE)
    return x if rate == RATE else np.asarray(resample_poly(x, RATE // shared, rate // shared), np.float32)


def in_window(x: Audio, where: str, start: int = 0, window: int = WINDOW) -> Audio:
    """Return a window of so many samples, two seconds, with the audio in it from ``start`` on. UsageError if it does not fit."""
    if start + len(x) > window:
        raise UsageError(
            f"audio must fit a window of {window / RATE:g} s, {where} is {len(x) / RATE:.2f} s long: cut it where nobody speaks"
        )
    return np.pad(x, (start, window - start - len(x)))


def to_int16(x: Audio) -> Samples:
    return np.round(np.clip(x, -1, 1) * 32767).astype(np.int16)


def trimmed(x: Audio, softest: float = 40.0) -> Audio:
    """Return audio without the silence around it: stretches of 10 ms more than ``softest`` dB below its loudest, but 30 ms at each end."""
    step = RATE // 100
    power = np.square(x[: len(x) // step * step].reshape(-1, step)).mean(1)
    if not len(power) or not power.max():
        return x
    loud = np.flatnonzero(power > power.max() * 10 ** (-softest / 10))
    return x[max(0, loud[0] - 3) * step : (loud[-1] + 4) * step]
