"""Set-up of ``speech``: recordings of people, flite's voices and noises, out of Debian's packages into the cache.

    python -m autocomp.tasks.speech.fetch

Nothing is installed: packages are downloaded with ``apt-get download`` and unpacked into a temporary folder. What cannot be had is said,
and left out. Licences and attributions: NOTICE.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autocomp.errors import AutocompError, UsageError
from autocomp.tasks.speech.audio import RATE, Audio, as_float, centred, resampled, to_int16, trimmed
from autocomp.tasks.speech.gsm import decoded
from autocomp.tasks.speech.recordings import path, write
from autocomp.tasks.speech.voices import FLITE
from autocomp.tasks.speech.words import DIGITS, LETTERS, WORDS

SOUNDS = "usr/share/asterisk/sounds"
BY_LETTER = {word[0]: word for word in LETTERS}


@dataclass(frozen=True)
class Source:
    """Files of one speaker in a package: where they lie, by the word that each says."""

    speaker: str
    package: str
    files: Mapping[str, str]
    softest: float = 40.0  # dB below the loudest: the speaker's silence is softer


def _phonetic(
    folder: str, letters: str = "abcdefghijklmnopqrstuvwxyz", under: str = "phonetic", ending: str = "wav"
) -> dict[str, str]:
    return {f"{SOUNDS}/{folder}/{under}/{letter}_p.{ending}": BY_LETTER[letter] for letter in letters}


# What each file says stands in the packages asterisk-core-sounds-XX, in core-sounds-XX.txt. Left out are words that differ from
# those of the English alphabet by more than their accent: Spanish Carlos, Francia, Gato, ... and Russian Noyabr, Rentgen,
# Dzhulyetta, Uniforma. For Menardi and Armelle there is no such list: the files lie in folders named ICAO and phonetic.
SOURCES = (
    Source("june", "asterisk-core-sounds-fr-wav", _phonetic("fr_CA_f_June")),
    Source("russian", "asterisk-core-sounds-ru-wav", _phonetic("ru_RU_f_IvrvoiceRU", "abcdefghiklmopqrstvwyz")),
    Source("menardi", "asterisk-prompt-it-menardi-wav", _phonetic("it_IT_f_Menardi", under="phonetic/ICAO")),
    Source("armelle", "asterisk-prompt-fr-armelle", _phonetic("fr", ending="gsm"), softest=24.0),
    Source(
        "allison",
        "asterisk-core-sounds-en-wav",
        _phonetic("en_US_f_Allison")
        | {f"{SOUNDS}/en_US_f_Allison/digits/{digit}.wav": word for digit, word in enumerate(DIGITS)},
    ),
    Source("allison", "asterisk-core-sounds-es-wav", _phonetic("es_MX_f_Allison", "abdehikloprtvwxyz")),
)
NOISES = {"bucklespring-data": "usr/share/buckle/wav", "sound-icons": "usr/share/sounds/sound-icons"}
LOWEST_OF_GSM = 150.0  # Hz; telephones pass 300 Hz and more
CLICK = RATE // 20
STRETCHES = ("0.8", "1.0", "1.25")  # how slowly flite speaks

Clips = dict[str, list[Audio]]


def main() -> int:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise UsageError(
            f"the recordings come in Debian's packages, and {' and '.join(missing)} is not there: run this on Debian or Ubuntu, and copy "
            f"{path()} from there; without it the task has no slice 'human'"
        )
    found: Clips = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        gsm = unpacked("libgsm1", folder)
        for source in SOURCES:
            if not gsm and any(name.endswith(".gsm") for name in source.files):
                continue  # that the decoder cannot be had was said
            if unpacked(source.package, folder):
                for name, word in source.files.items():
                    said = _read_gsm(folder, name) if name.endswith(".gsm") else _read(folder / name)
                    clip = trimmed(said, source.softest)
                    found.setdefault(f"{source.speaker}/{word}", []).append(clip)
        if unpacked("flite", folder) and unpacked("libflite1", folder):
            for voice, word, clip in _flite(folder):
                found.setdefault(f"{voice}/{word}", []).append(trimmed(clip))
        for package, where in NOISES.items():
            if unpacked(package, folder):
                files = sorted(file for file in (folder / where).glob("*.wav") if not file.is_symlink())
                for index, file in enumerate(files):  # different clips for training, validation and test
                    split = ("training", "training", "validation", "test")[index % 4]
                    found.setdefault(f"noise-{split}/{package}", []).append(_read(file))
    if not found:
        raise AutocompError("none of the packages could be had: see what apt-get said above")
    write({key: [to_int16(clip) for clip in clips] for key, clips in found.items()})
    print(f"{sum(map(len, found.values()))} recordings in {path()}")
    return 0


def unpacked(package: str, folder: Path) -> bool:
    """Download a package and unpack it; say so and return False if it cannot be had."""
    for command in (["apt-get", "download", package], ["dpkg-deb", "-x", f"{package}_*.deb", "."]):
        if "*" in command[2]:
            command[2] = next(folder.glob(command[2])).name
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no word why"])[-1]
            print(f"{package} cannot be had, what it holds is left out: {said}", file=sys.stderr)
            return False
    return True


def _read(file: Path) -> Audio:
    from scipy.io import wavfile

    rate, samples = wavfile.read(file)
    x = as_float(samples, str(file))
    return resampled(centred(x if x.ndim == 1 else np.asarray(x.mean(1))), rate)


def _read_gsm(folder: Path, name: str) -> Audio:
    """Return a recording of Armelle's, without the click at its start and the hum, which are louder than her voice. The library is not installed
    either: it lies in the folder."""
    from scipy.signal import butter, sosfiltfilt

    samples = decoded((folder / name).read_bytes(), next(folder.glob("usr/lib/*/libgsm.so.1")))
    clean = sosfiltfilt(butter(4, LOWEST_OF_GSM, "high", fs=RATE, output="sos"), as_float(samples, name))
    return centred(np.asarray(clean[CLICK:], np.float32))


def _flite(folder: Path) -> Iterator[tuple[str, str, Audio]]:
    """Yield each voice's words. The program is not installed: it is told where its libraries are."""
    libraries = next(folder.glob("usr/lib/*/libflite.so.1")).parent
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    for split, voices in FLITE.items():
        for voice in voices:
            for stretch in STRETCHES if split == "training" else ("1.0",):
                for word in WORDS:
                    said = folder / "said.wav"
                    text = "x-ray" if word == "xray" else word
                    command = [str(folder / "usr/bin/flite"), "-voice", voice, "-t", text, "-o", str(said)]
                    command += ["--setf", f"duration_stretch={stretch}"]
                    subprocess.run(command, env=environment, check=True)
                    yield voice, word, _read(said)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AutocompError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
