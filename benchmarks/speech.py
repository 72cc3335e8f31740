"""Where speech is sensitive: augmentation, depth, the length of windows, the place of the front end; and a second corpus.

    python benchmarks/speech.py [--part augmentation depth windows frontend] [--minutes 30] [--seeds 3] [--quick]
    python benchmarks/speech.py --corpus fillets-cs [--minutes 60]

augmentation: the model of the task trained anew for as many steps with nothing changed about its utterances, in the time domain (speed), in
the frequency domain (masks, vocal tracts), in its surroundings (noise, microphones), and with all of it. `--minutes` are those of all
trainings together.
depth: a third of the encoder compressed alone, bottom, middle or top. It has four blocks: the middle is the mean of two, each compressed alone.
windows: the compiled module for 1, 2 and 4 s, and what it hears in ten seconds of the test's speaker, cut into such windows (`runner`).
frontend: log-mel as the first layers of the compiled module, a convolution in place of the FFT, or before it in torch.
fillets-cs: see `fillets`.

Percent of the test split, greedy decoding. ± is the spread over seeds where there are several, or one standard error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import fillets
import jiwer
import numpy as np
import torch
from common import earlier, publish
from prepared import prepare
from torch import Tensor, nn
from torch.nn import functional

from autocomp.compiler.build import build
from autocomp.devices.local import LocalDevice
from autocomp.hardware.profile import load_profile
from autocomp.hardware.timing import interleaved, quiet_core
from autocomp.progress import Progress
from autocomp.records.candidate import Candidate
from autocomp.tasks.speech.audio import RATE, Audio
from autocomp.tasks.speech.batches import Augmentation, SpeechBatches
from autocomp.tasks.speech.corpus import COUNTS, held_out
from autocomp.tasks.speech.decoding import greedy
from autocomp.tasks.speech.features import BANDS, FFT, HOP, LENGTH, RANGE, log_mel, mel_filters
from autocomp.tasks.speech.metrics import error_rates
from autocomp.tasks.speech.noise import joined
from autocomp.tasks.speech.recordings import banks
from autocomp.tasks.speech.runner import Module, transcribe
from autocomp.tasks.speech.train import Recipe, train
from autocomp.tasks.speech.trained import load
from autocomp.tasks.speech.voices import PEOPLE

NOTHING = Augmentation(speed=False, warp=False, masks=False, noise=False, microphone=False)
WAYS = {
    "none": NOTHING,
    "time domain": Augmentation(warp=False, masks=False, noise=False, microphone=False),
    "frequency domain": Augmentation(speed=False, noise=False, microphone=False),
    "environment": Augmentation(speed=False, warp=False, masks=False),
    "all": Augmentation(),
}
PROBE = 8  # steps whose time says how many fit into the minutes
THIRDS = {"bottom": (0,), "middle": (1, 2), "top": (3,)}  # blocks
KINDS = {"half of the channels": (0.5, "fp32"), "a quarter of the channels": (0.25, "fp32"), "8 bits": (1.0, "w8a8")}
SECONDS = (1, 2, 4)
STREAMS, WORDS_IN_STREAM = 12, 10


@dataclass(frozen=True)
class Bounds:
    """What a run may take."""

    minutes: float
    seeds: int
    repeats: int
    counts: Mapping[str, int]
    utterances: int
    samples: int


FULL = {"counts": COUNTS, "utterances": 5000, "samples": 128, "repeats": 30}
QUICK = {"counts": {"human": 6, "synthetic": 6, "accent": 4}, "utterances": 60, "samples": 16, "repeats": 3}


def percent(rates: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Mean and standard error of each error rate of characters, in percent."""
    return fillets.summary({name: values for name, values in rates.items() if name.startswith("cer")})


# Augmentation


def augmentation(bounds: Bounds) -> dict[str, Any]:
    test = held_out("test", bounds.counts, Progress())
    steps = steps_within(60 * bounds.minutes / (len(WAYS) * bounds.seeds), bounds)
    ways = {}
    for name, way in WAYS.items():
        found = [percent(error_rates(trained(way, steps, seed, bounds), test)) for seed in range(bounds.seeds)]
        ways[name] = {metric: [one[metric][0] for one in found] for metric in found[0]}
        print(f"augmentation, {name}: {np.mean(ways[name]['cer']):.1f} % after {steps} steps", flush=True)
    return {"steps": steps, "ways": ways}


def trained(way: Augmentation, steps: int, seed: int, bounds: Bounds) -> nn.Module:
    recipe = Recipe(steps=steps, utterances=bounds.utterances, gentle=round(0.15 * steps), seed=seed)
    batches = SpeechBatches(recipe.utterances, recipe.batch, steps, seed, way, recipe.gentle)
    return train(recipe, batches, Progress())


def steps_within(seconds: float, bounds: Bounds) -> int:
    """The steps of one training that fit into its share of the minutes."""
    trained(WAYS["all"], PROBE, 0, bounds)  # voices are synthesised now, and no part of what is timed
    begun = time.perf_counter()
    trained(WAYS["all"], PROBE, 0, bounds)
    return max(PROBE, int(seconds * PROBE / (time.perf_counter() - begun)))


# Depth


def depth(bounds: Bounds) -> dict[str, Any]:
    prepared = prepare("speech", samples=bounds.samples)
    dense = percent(evaluate(prepared.task, prepared.task.model))
    found: dict[str, Any] = {"dense": dense, "kinds": {}}
    for kind, (keep, precision) in KINDS.items():
        strong = prepared.space.normalise(prepared.space.uniform(keep, precision))
        found["kinds"][kind] = {}
        for third, blocks in THIRDS.items():
            rates = [
                percent(evaluate(prepared.task, prepared.stitch(only(prepared.space, strong, block))))
                for block in blocks
            ]
            found["kinds"][kind][third] = {
                metric: np.mean([one[metric] for one in rates], 0).tolist() for metric in rates[0]
            }
            print(f"depth, {kind}, {third}: {found['kinds'][kind][third]['cer'][0]:.1f} %", flush=True)
    return found


def evaluate(task: Any, model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.as_tensor(values) for name, values in task.test(model).items()}


def only(space: Any, strong: Candidate, block: int) -> Candidate:
    """The uncompressed candidate with what another does to one block."""
    dense, prefix = space.dense(), f"blocks.{block}."
    widths = {name: strong.widths[name] if name.startswith(prefix) else width for name, width in dense.widths.items()}
    methods = {
        name: strong.methods[name] if name.startswith(prefix) else method for name, method in dense.methods.items()
    }
    return space.normalise(Candidate(widths, methods))


# Windows


def windows(bounds: Bounds) -> dict[str, Any]:
    device, found = LocalDevice(load_profile("x86-host")), {}
    spoken = streams()
    for seconds in SECONDS:
        frames = seconds * RATE // HOP
        model = load(frames=frames)
        example = (torch.zeros(1, frames, BANDS),)
        compiled = build(model, example, device.profile, device.tuner)
        audio = torch.randn(1, seconds * RATE)
        with quiet_core():
            samples = interleaved(
                {"module": compiled.prepare(*example), "front end": partial(log_mel, audio)}, repeats=bounds.repeats
            )
        module = Module(frames, compiled.run)  # type: ignore[arg-type]
        rates = [jiwer.cer(text, transcribe(said, [module], greedy).text) for text, said in spoken]
        found[f"{seconds} s"] = {
            "seconds": {name: float(np.median(values)) for name, values in samples.items()},
            "memory": compiled.memory,
            "cer": [100 * float(np.mean(rates)), 100 * float(np.std(rates, ddof=1)) / len(rates) ** 0.5]
            if rates
            else None,
        }
        print(f"windows, {seconds} s: {1e3 * found[f'{seconds} s']['seconds']['module']:.2f} ms", flush=True)
    return found


def streams() -> list[tuple[str, Audio]]:
    """Recordings of the test's speakers one after the other, about ten seconds; none where they have not been fetched."""
    random, known = np.random.default_rng(0), banks()
    found = []
    for bank in [known[name] for name in PEOPLE["test"] if name in known]:
        for _ in range(STREAMS):
            words = list(random.choice(list(bank), WORDS_IN_STREAM))
            found.append(
                (" ".join(words), joined([bank[word][int(random.integers(len(bank[word])))] for word in words], random))
            )
    return found


# Front end


class LogMel(nn.Module):
    """`log_mel` of ``[N, samples]`` in layers that are compiled: a convolution with cosine and sine of each bin, products, a maximum.

    At the ends there are zeros in place of a mirror image.
    """

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        bins = FFT // 2 + 1
        angles = 2 * np.pi * np.arange(bins)[:, None] * np.arange(LENGTH) / FFT  # [bins, samples]
        waves = np.concatenate([np.cos(angles), np.sin(angles)]) * torch.hann_window(LENGTH).numpy()
        self.transform = nn.Conv1d(1, 2 * bins, LENGTH, HOP, LENGTH // 2, bias=False)
        self.transform.weight = nn.Parameter(torch.from_numpy(waves).float()[:, None], requires_grad=False)
        self.register_buffer("filters", mel_filters())

    def forward(self, x: Tensor) -> Tensor:
        parts = self.transform(x[:, None])[..., : x.shape[1] // HOP]
        real, imaginary = parts.chunk(2, 1)
        energy = (real * real + imaginary * imaginary).transpose(1, 2) @ self.filters
        loudest = functional.relu(energy.amax((1, 2), keepdim=True) - 1e-12) + 1e-12
        decades = torch.clamp(energy / loudest, min=10.0**-RANGE).log() * (1 / np.log(10))
        return decades * (2 / RANGE) + 1


def frontend(bounds: Bounds) -> dict[str, Any]:
    device = LocalDevice(load_profile("x86-host"))
    audio = 0.1 * torch.randn(1, 2 * RATE) * torch.hann_window(2 * RATE)
    model, inside = load(), nn.Sequential(LogMel(), load()).eval()
    outside = build(model, (log_mel(audio),), device.profile, device.tuner)
    whole = build(inside, (audio,), device.profile, device.tuner)
    run = outside.prepare(log_mel(audio))
    with quiet_core():
        samples = interleaved(
            {"inside": whole.prepare(audio), "model": run, "torch": partial(log_mel, audio)}, repeats=bounds.repeats
        )
    with torch.no_grad():
        difference = float((inside[0](audio) - log_mel(audio)).abs().max())
    times = {name: float(np.median(values)) for name, values in samples.items()}
    return {"seconds": times, "difference": difference, "memory": {"inside": whole.memory, "outside": outside.memory}}


# Tables


def shown(rates: Mapping[str, Sequence[float]], metric: str = "cer") -> str:
    mean, error = rates[metric][0], rates[metric][1]
    return f"{mean:.1f} ± {error:.1f}"


def slices(rates: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{name.partition('/')[2]} {shown(rates, name)}" for name in rates if "/" in name)


def over_seeds(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {
        name: [float(np.mean(some)), float(np.std(some, ddof=1)) if len(some) > 1 else 0.0]
        for name, some in values.items()
    }


def table(parts: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    rows, notes = [], []
    if about := parts.get("augmentation"):
        for name, values in about["ways"].items():
            rates = over_seeds(values)
            rows.append(["augmentation", name, shown(rates), slices(rates), "", ""])
        notes.append(f"augmentation: {about['steps']} steps, {len(next(iter(about['ways'].values()))['cer'])} seed(s).")
    if about := parts.get("depth"):
        rows.append(["depth", "dense", shown(about["dense"]), slices(about["dense"]), "", ""])
        for kind, thirds in about["kinds"].items():
            rows += [
                ["depth", f"{kind}, {third}", shown(rates), slices(rates), "", ""] for third, rates in thirds.items()
            ]
    for name, one in (parts.get("windows") or {}).items():
        work = sum(one["seconds"].values())
        cer = "" if one["cer"] is None else f"{one['cer'][0]:.1f} ± {one['cer'][1]:.1f}"
        case = f"{name}, {one['memory'] / 2**20:.1f} MiB at work"
        rows.append(["windows", case, cer, "", f"{1e3 * work:.2f}", f"{work / float(name.split()[0]):.4f}"])
    if parts.get("windows"):
        notes.append(
            "windows: CER of ten words in a row said by the test's speaker; ms are those of front end and module for a window that was heard, "
            "and the real-time factor is theirs, which doubles where windows share half."
        )
    if about := parts.get("frontend"):
        outside = about["seconds"]["model"] + about["seconds"]["torch"]
        for case, seconds in (("outside, in torch", outside), ("inside, as a convolution", about["seconds"]["inside"])):
            rows.append(["frontend", case, "", "", f"{1e3 * seconds:.2f}", f"{seconds / 2:.4f}"])
        notes.append(
            f"frontend: the largest difference of a frame inside from one outside is {about['difference']:.1e}."
        )
    if about := parts.get("fillets-cs"):
        more_rows, more_notes = fillets.table(about)
        rows, notes = rows + more_rows, notes + more_notes
    return rows, notes


PARTS: dict[str, Callable[[Bounds], dict[str, Any]]] = {
    "augmentation": augmentation, "depth": depth, "windows": windows, "frontend": frontend,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--corpus", choices=["fillets-cs"], help="this in place of the parts")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few utterances and steps, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    minutes, seeds = (0.1, 1) if options.quick else (options.minutes, options.seeds)
    bounds = Bounds(minutes=minutes, seeds=seeds, **(QUICK if options.quick else FULL))
    data = {} if options.quick else earlier("speech", "parts")
    work = {"fillets-cs": partial(fillets.measured, quick=options.quick)} if options.corpus else PARTS
    for part in ["fillets-cs"] if options.corpus else options.part:
        data[part] = work[part](bounds)
        rows, notes = table(data)
        headings = ["part", "case", ">CER", "by slice", ">ms", ">real-time factor"]
        publish("speech", headings, rows, {"parts": data}, load_profile("x86-host"), notes, not options.quick, "parts")


if __name__ == "__main__":
    main()
