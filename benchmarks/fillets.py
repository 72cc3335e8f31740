"""A second corpus for `speech`: the Czech dialogues of the game Fish Fillets, from Debian's packages, unpacked and not installed.

Whole levels are held out for validation and test. The two fish speak in training; all other roles, in any level, are speakers that training
has not heard. The network of the task `speech`, for windows of five seconds and Czech letters, is trained and compressed; half of the minutes
are for each.
"""

from __future__ import annotations

import ctypes
import io
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from torch import Tensor, nn

from autocomp import api
from autocomp.cache import cache_dir, write_atomically
from autocomp.errors import AutocompError, UsageError
from autocomp.progress import Progress
from autocomp.tasks.speech import decoding
from autocomp.tasks.speech.audio import RATE, Samples, as_float, in_window, resampled, to_int16, trimmed
from autocomp.tasks.speech.batches import NOISELESS, SNR, SPEEDS, WARPS, faster, gains, mask, padded
from autocomp.tasks.speech.features import HOP, log_mel, mel_filters
from autocomp.tasks.speech.fetch import unpacked
from autocomp.tasks.speech.metrics import ctc_loss, each_rate, transcribed
from autocomp.tasks.speech.noise import Noises, noisy
from autocomp.tasks.speech.recordings import banks
from autocomp.tasks.speech.train import Recipe, train
from autocomp.tasks.speech.trained import new_model
from autocomp.tasks.speech.words import frames_needed
from autocomp.tasks.task import Task

PACKAGES = ("libogg0", "libvorbis0a", "libvorbisfile3", "fillets-ng-data", "fillets-ng-data-cs")
GAME = "usr/share/games/fillets-ng"
LETTERS = " aábcčdďeéěfghiíjklmnňoópqrřsštťuúůvwxyýzž"
greedy = partial(decoding.greedy, characters=LETTERS)
KNOWN = ("font_small", "font_big")  # the fish
EVERY = 10  # one level of so many validates, the next is of the test
SECONDS = 5
WINDOW, FRAMES = SECONDS * RATE, SECONDS * RATE // HOP
STEPS = FRAMES // 4
LINE = re.compile(
    r'dialogId\(\s*"([^"]+)"\s*,\s*"([^"]*)"\s*,.*?\)\s*dialogStr\(\s*"((?:[^"\\]|\\.)*)"\s*\)', re.DOTALL
)
BATCH, MOST = 16, 120  # utterances; of each slice of the test
PROBE = 4  # steps whose time says how many fit


@dataclass(frozen=True)
class Line:
    """What a role says in a level."""

    level: str
    role: str
    text: str
    audio: Samples


# The corpus


def lines() -> list[Line]:
    """Return the lines that fit into a window, from the cache or the packages."""
    path = cache_dir() / "tasks" / "speech" / "fillets-cs.npz"
    if not path.exists():
        _prepare(path)
    with np.load(path) as stored:
        about = json.loads(str(stored["about"]))
        return [Line(*one, stored[str(number)]) for number, one in enumerate(about)]


def _prepare(path: Path) -> None:
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise UsageError(f"the corpus comes in Debian's packages, and {' and '.join(missing)} is not there")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not all([unpacked(package, folder) for package in PACKAGES]):
            raise AutocompError("the corpus is not whole without these packages: see above")
        read = vorbis(next(folder.glob("usr/lib/*/libvorbisfile.so.3")).parent)
        found = []
        for script in sorted((folder / GAME / "script").glob("*/dialogs_cs.lua")):
            for name, role, text in LINE.findall(script.read_text("utf-8")):
                sound = folder / GAME / "sound" / script.parent.name / "cs" / f"{name}.ogg"
                said = written(text)
                if said is None or not sound.exists():
                    continue
                audio = trimmed(read(sound))
                if len(audio) <= WINDOW and frames_needed(encoded(said)) <= STEPS:
                    found.append(Line(script.parent.name, role, said, to_int16(audio)))
    file, sounds = io.BytesIO(), {str(number): line.audio for number, line in enumerate(found)}
    about = json.dumps([(line.level, line.role, line.text) for line in found])
    np.savez_compressed(file, about=np.array(about), **sounds)
    write_atomically(path, file.getvalue())


def written(text: str) -> str | None:
    """Return a line in small letters without punctuation; None where it has digits or letters that Czech has not.

    Examples:
        >>> written("Jej, už zase!"), written("Je 7 hodin.")
        ('jej už zase', None)
    """
    plain = " ".join(re.sub(r"\\.|[-!?,.:;%'’\"]", " ", text.lower()).split())
    return plain if plain and set(plain) <= set(LETTERS) else None


def encoded(text: str) -> list[int]:
    return [1 + LETTERS.index(character) for character in text]


def vorbis(libraries: Path) -> Any:
    """Return a function that decodes an Ogg Vorbis file to 8 kHz mono, by the libraries in a folder."""
    for name in ("libogg.so.0", "libvorbis.so.0"):
        ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(libraries / "libvorbisfile.so.3"))

    class Info(ctypes.Structure):  # the beginning of vorbis_info
        _fields_ = (("version", ctypes.c_int), ("channels", ctypes.c_int), ("rate", ctypes.c_long))

    library.ov_info.restype = ctypes.POINTER(Info)
    library.ov_read.restype = ctypes.c_long

    def read(path: Path) -> np.ndarray:
        file, buffer, section, parts = (
            ctypes.create_string_buffer(4096),
            ctypes.create_string_buffer(8192),
            ctypes.c_int(),
            [],
        )
        if library.ov_fopen(str(path).encode(), file):
            raise AutocompError(f"{path.name} is no Ogg Vorbis file: its package has changed")
        about = library.ov_info(file, -1).contents
        channels, rate = about.channels, about.rate
        while (count := library.ov_read(file, buffer, len(buffer), 0, 2, 1, ctypes.byref(section))) > 0:
            parts.append(buffer.raw[:count])
        library.ov_clear(file)
        samples = np.frombuffer(b"".join(parts), np.int16).reshape(-1, channels)
        return resampled(np.asarray(as_float(samples, path.name).mean(1), np.float32), rate)

    return read


def split(found: Sequence[Line]) -> dict[str, list[Line]]:
    """Training, validation, test (``known`` speakers), each in levels of its own, and ``unseen`` speakers, in any level."""
    levels = sorted({line.level for line in found})
    place = {level: n % EVERY for n, level in enumerate(levels)}
    fish = [line for line in found if line.role in KNOWN]
    return {
        "training": [line for line in fish if place[line.level] > 1],
        "validation": [line for line in fish if place[line.level] == 0],
        "known": [line for line in fish if place[line.level] == 1],
        "unseen": [line for line in found if line.role not in KNOWN],
    }


# Training, and error rates


class Batches:
    """Batches ``((frames [N, 500, 40],), characters)`` of training lines, changed as `SpeechBatches` changes utterances."""

    def __init__(self, found: Sequence[Line], length: int, seed: int) -> None:
        self.found, self.length, self.random = found, length, np.random.default_rng((5, seed))
        self.noises = Noises("training", banks().get("noise-training"))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for _ in range(self.length):
            yield self._drawn()

    def _drawn(self) -> tuple[tuple[Tensor, ...], Tensor]:
        random, texts, windows = self.random, [], []
        while len(windows) < BATCH:
            line = self.found[int(random.integers(len(self.found)))]
            audio = faster(as_float(line.audio, line.text), *SPEEDS[int(random.integers(len(SPEEDS)))])
            if len(audio) > WINDOW:
                continue
            window = in_window(audio, "a line", int(random.integers(WINDOW - len(audio) + 1)), WINDOW)
            if random.random() < 1 - NOISELESS:
                noise = self.noises.drawn(random, int(random.integers(len(self.noises.kinds))))
                window = noisy(window, np.resize(noise, WINDOW), random.uniform(*SNR))
            texts.append(encoded(line.text))
            windows.append(window)
        filters = torch.stack([mel_filters(float(warp)) for warp in random.choice(WARPS, BATCH)])
        frames = log_mel(torch.from_numpy(np.stack(windows)), gains(BATCH, random), filters)
        mask(frames, random)
        return (frames,), padded(texts)


def frames_of(found: Sequence[Line]) -> Tensor:
    windows = [in_window(as_float(line.audio, line.text), "a line", window=WINDOW) for line in found]
    return torch.cat([log_mel(torch.from_numpy(window)[None]) for window in windows])


def error_rates(model: nn.Module, texts: Sequence[str], frames: Tensor, slices: Sequence[str]) -> dict[str, Tensor]:
    """Return CER and WER of each line, over all and by slice."""
    heard = transcribed(model, frames, greedy)
    found = {}
    for name, rate in (("cer", jiwer.cer), ("wer", jiwer.wer)):
        values = found[name] = each_rate(rate, texts, heard)
        for kind in dict.fromkeys(slices):
            found[f"{name}/{kind}"] = values[torch.tensor([one == kind for one in slices])]
    return found


def measured(bounds: Any, quick: bool) -> dict[str, Any]:
    """Prepare, train, compress, and return what it came to."""
    parts = split(lines())
    training, test = parts["training"], [*parts["known"][:MOST], *parts["unseen"][:MOST]]
    if quick:
        test = [*parts["known"][:4], *parts["unseen"][:4]]
    slices = ["known" if line.role in KNOWN else "unseen" for line in test]
    rates = {
        "validation": partial(of_lines, parts["validation"][: len(test)]),
        "test": partial(error_rates, texts=[line.text for line in test], frames=frames_of(test), slices=slices),
    }
    network = partial(new_model, FRAMES, 1 + len(LETTERS))
    probe = Recipe(steps=PROBE, warm_up=0.5)
    begun = time.perf_counter()
    train(probe, Batches(training, PROBE, 0), Progress(), network=network)
    steps = max(PROBE, int(30 * bounds.minutes * PROBE / (time.perf_counter() - begun)))
    recipe = Recipe(steps=steps, warm_up=max(Recipe.warm_up, 2 / steps))
    model = train(recipe, Batches(training, steps, 1), Progress(), network=network)
    batches = list(Batches(training, 1 if quick else 4, 2))
    task = Task(
        model=model, example_inputs=(batches[0][0][0][:1],), calibration=[inputs for inputs, _ in batches], evaluate=rates["validation"],
        test=rates["test"], train=Batches(training, 30, 3), loss=ctc_loss, objective="cer", higher_is_better=False, unit="%",
        outputs="classes@2", name="fillets-cs",
    )  # fmt: skip
    dense = rates["test"](model)
    found: dict[str, Any] = {
        "steps": steps, "hours": sum(len(line.audio) for line in training) / RATE / 3600,
        "lines": {name: len(some) for name, some in parts.items()},
        "dense": summary(dense), "front": [],
    }  # fmt: skip
    print(f"fillets-cs: {found['dense']['cer'][0]:.1f} % after {steps} steps", flush=True)
    if not quick:
        with tempfile.TemporaryDirectory() as folder:
            result = api.search(
                task,
                ["x86-host"],
                trials=40,
                out=Path(folder) / "run",
                measurements=3,
                minutes=max(5.0, bounds.minutes / 2),
            )
            for point in result.front:
                found["front"].append(
                    {
                        "milliseconds": 1e3 * point.latency["x86-host"].seconds, "bytes": point.bytes,
                        "rates": {name: 100 * value for name, value in point.test_metrics.items()},
                    }
                )  # fmt: skip
    return found


def of_lines(found: Sequence[Line], model: nn.Module) -> dict[str, Tensor]:
    return error_rates(model, [line.text for line in found], frames_of(found), ["known"] * len(found))


def summary(rates: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Mean and standard error in percent."""
    return {
        name: [100 * float(values.mean()), 100 * float(values.std()) / len(values) ** 0.5]
        for name, values in rates.items()
    }


def table(about: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Rows as `speech.table` has them, and notes."""

    def by_slice(rates: Mapping[str, Any]) -> str:
        names = [name for name in rates if name != "cer"]
        return ", ".join(
            f"{name} {rates[name][0] if isinstance(rates[name], list) else rates[name]:.1f}" for name in names
        )

    mean, error = about["dense"]["cer"]
    rows = [["fillets-cs", "as trained", f"{mean:.1f} ± {error:.1f}", by_slice(about["dense"]), "", ""]]
    for point in about["front"]:
        milliseconds, rates = point["milliseconds"], point["rates"]
        case = f"compressed, {point['bytes'] / 2**20:.2f} MiB"
        rows.append(
            [
                "fillets-cs",
                case,
                f"{rates['cer']:.1f}",
                by_slice(rates),
                f"{milliseconds:.2f}",
                f"{milliseconds / 1e3 / SECONDS:.4f}",
            ]
        )
    counts = ", ".join(f"{count} {name}" for name, count in about["lines"].items())
    notes = [f"fillets-cs: {about['steps']} steps of {BATCH} lines out of {about['hours']:.2f} hours; lines: {counts}."]
    return rows, notes
