"""How the cost of one inference grows with the batch, the image and the threads, ours and ONNX Runtime's.

python benchmarks/growth.py [--models resnet18,mobilenet_v2] [--repeats 15]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import publish, ratio
from reference import onnx_fp32
from zoo import ZOO

from autocomp.devices.local import LocalDevice
from autocomp.hardware.profile import Profile, load_profile
from autocomp.hardware.timing import interleaved, quiet_core

BATCHES = (1, 2, 4, 8)
IMAGES = (96, 160, 224, 288, 384)
THREADS = (1, 2)


def measure(name: str, profile: Profile, repeats: int, *, batch: int = 1, image: int = 224) -> dict[str, Any]:
    model, inputs = ZOO[name](batch=batch, image=image)
    theirs = onnx_fp32(model, inputs, profile.cores)
    compiled = LocalDevice(profile).compile(model, [inputs])
    with quiet_core(profile.cores):
        samples = interleaved({"ours": compiled.prepare(*inputs), "theirs": theirs.run}, repeats=repeats)
    return {
        "model": name, "batch": batch, "image": image, "threads": profile.cores, "samples": samples,
        "ratio": ratio(samples["ours"], samples["theirs"]),
        "milliseconds": {side: 1e3 * float(np.median(values)) for side, values in samples.items()},
    }  # fmt: skip


def with_threads(profile: Profile, threads: int) -> Profile:
    return replace(profile, cores=threads, target={**profile.target, "num-cores": threads})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet18,mobilenet_v2")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    profile = load_profile("x86-host")
    results, rows = [], []
    for name in options.models.split(","):
        runs = [
            *((profile, {"batch": batch}) for batch in BATCHES),
            *((profile, {"image": image}) for image in IMAGES if image != 224),
            *((with_threads(profile, threads), {}) for threads in THREADS if threads > 1),
        ]
        first: dict[str, Any] | None = None
        for target, sizes in runs:
            result = measure(name, target, options.repeats, **sizes)
            first = first or result
            results.append(result)
            work = result["batch"] * (result["image"] / first["image"]) ** 2
            middle, low, high = result["ratio"]
            grown = [
                result["milliseconds"][side] * result["threads"] / work / first["milliseconds"][side]
                for side in ("ours", "theirs")
            ]
            rows.append([
                name, str(result["batch"]), str(result["image"]), str(result["threads"]), f"{result['milliseconds']['ours']:.2f}",
                f"{result['milliseconds']['theirs']:.2f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{grown[0]:.2f}", f"{grown[1]:.2f}",
            ])  # fmt: skip
            print(*rows[-1], flush=True)
    headings = [
        "model", ">batch", ">image", ">threads", ">ours ms", ">ORT ms", ">ours/ORT", "quartiles", ">ours, core time per pixel", ">ORT's",
    ]  # fmt: skip
    note = "Core time per pixel: milliseconds x threads / (batch x pixels), over that of the first row; 1 is linear growth."
    publish("growth", headings, rows, {"runs": results}, profile, [note])


if __name__ == "__main__":
    main()
