"""Estimates for a Cortex-A76 held against what others have measured on boards that have one.

    python benchmarks/a76_published.py [--models resnet18]

No board was at hand. The kernels compared are not the same (ncnn's and the C library's against ours), so a ratio is what both the
estimate and the difference of the kernels make; it says whether the estimate is of this world, not how exact it is.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from common import publish
from reference import halve_model, quantise_model
from zoo import BENCHMARKED, ZOO, like

from autocomp.compiler.build import schedule
from autocomp.devices.estimated import EstimatedDevice, EstimatedModel
from autocomp.estimate import compile_object, core_of, estimate_kernel
from autocomp.hardware.profile import load_profile

NCNN = "https://github.com/Tencent/ncnn/blob/master/benchmark/README.md (Raspberry Pi 5, 1 thread)"
SBC = "https://github.com/ThomasKaiser/sbc-bench/blob/master/results/Au3jaA.txt (Raspberry Pi 5)"


GAPS = {
    "fp16": "ncnn transforms 3x3 convolutions (Winograd: 2.25 times fewer products), ours are direct; the estimate has no TLB",
    "w8a8": "ncnn quantises between layers in passes of their own, ours in the write-back; the estimate has no TLB",
}


@dataclass(frozen=True)
class Published:
    """A model's time on a Raspberry Pi 5, one thread, in milliseconds."""

    model: str
    precision: str
    milliseconds: float


# As of ncnn 20241226; its default on this core is fp16 arithmetic.
MODELS = (
    Published("resnet18", "fp16", 29.5),
    Published("resnet18", "w8a8", 36.3),
    Published("resnet50", "fp16", 89.0),
    Published("resnet50", "w8a8", 80.0),
)


def model_seconds(published: Published, device: EstimatedDevice) -> float:
    """Our module's estimate, from lowering to tuned kernels. What it computes is held to torch in the tests, on smaller models."""
    model, inputs = ZOO[published.model]()
    ours = halve_model(model) if published.precision == "fp16" else quantise_model(model, [like(inputs, 1)])
    scheduled = schedule(ours, inputs, device.profile, device.tuner)
    return EstimatedModel(scheduled, device.profile, device.tuner.target).time(*inputs).seconds


def copy_bytes_per_second(device: EstimatedDevice, size: int = 32 << 20) -> float:
    """Bytes a second of a copy that no cache holds, by the core's model."""
    from tvm import te

    from autocomp.kernels import templates

    source = te.placeholder((size // 16384, 4096), "float32", name="source")
    target = te.compute(source.shape, lambda *i: source[i], name="target")
    function = te.create_prim_func([source, target])
    anchor = templates.describe(function)
    scheduled = templates.apply(function, templates.tiles(anchor, device.profile)[0], anchor, device.profile)
    shape = ("float32", (size // 16384, 4096))
    estimate = estimate_kernel(compile_object(scheduled, device.tuner.target), [shape, shape], core_of(device.profile))
    return size / estimate.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet18,resnet50")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = EstimatedDevice(load_profile("cortex-a76"))
    rows, results = [], []

    def add(what: str, ours: float, theirs: float, unit: str, source: str, gap: str) -> None:
        results.append(
            {"what": what, "estimated": ours, "published": theirs, "unit": unit, "source": source, "gap": gap}
        )
        rows.append([what, f"{ours:.1f} {unit}", f"{theirs:.1f} {unit}", f"{ours / theirs:.2f}", source, gap])
        print(*rows[-1][:4], flush=True)

    for published in MODELS:
        if published.model in options.models.split(","):
            seconds = model_seconds(published, device)
            add(
                f"{BENCHMARKED[published.model]}, {published.precision}, 1 thread", seconds * 1e3, published.milliseconds, "ms",
                NCNN, GAPS[published.precision],
            )  # fmt: skip
    copy = device.profile.memory_bandwidth.get("copy", 0.0) if device.profile.memory_bandwidth else 0.0
    add(
        "copy, beyond the caches", copy_bytes_per_second(device) / 1e9, copy / 1e9, "GB/s", SBC,
        "not independent: the profile's bandwidth is this figure",
    )  # fmt: skip
    publish(
        "a76_published", ["what", ">estimated", ">published", ">ratio", "source", "gap"], rows, {"rows": results}, device.profile,
        ["Estimated (core model), Cortex-A76 @ 2.4 GHz, 1 core; nothing here was measured by this project."],
    )  # fmt: skip


if __name__ == "__main__":
    main()
