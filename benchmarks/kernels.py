"""Single kernels of real models against the machine's measured peak and against ONNX Runtime's own kernels.

    python benchmarks/kernels.py [--only resnet18] [--precision fp32] [--repeats 15]

Ours is a module of one layer, channels last inside and out, as it would be in the middle of a model. ONNX Runtime runs a model of the same
single operator; what counts is the time of its nodes as its profiler gives it, without the transposes and reorders that bring such a
lone operator to its inner layout and back. Both quantise their input and return floats in W8A8. The two take turns.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from common import geometric_mean, publish, ratio
from reference import ProfiledSession, quantise_model
from torch import Tensor, nn
from zoo.inputs import smooth_noise

from autocomp.compiler.build import build
from autocomp.compiler.verify import check_outputs
from autocomp.devices.local import LocalDevice
from autocomp.hardware.profile import load_profile

Make = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Case:
    model: str
    name: str
    make: Make
    quantisable: bool = True


class _ChannelsLast(nn.Module):
    """A convolution that takes and returns its channels last; the compiler cancels the permutations."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.first = (0, 3, 1, 2) if isinstance(layer, nn.Conv2d) else (0, 2, 1)
        self.last = (0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else (0, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(self.first)).permute(self.last)


class _MatMul(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


def _conv(inputs: int, outputs: int, kernel: int, stride: int, size: int, groups: int = 1, pad: bool = True) -> Any:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 if pad else 0, groups=groups)
    return _ChannelsLast(layer), (smooth_noise(1, size, size, inputs),)


def _conv1d(inputs: int, outputs: int, kernel: int, stride: int, length: int, groups: int = 1) -> Any:
    return _ChannelsLast(nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)), (
        smooth_noise(1, length, inputs),
    )


def one_dense(rows: int, inputs: int, outputs: int) -> Any:
    return nn.Sequential(nn.Linear(inputs, outputs)), (smooth_noise(1, rows, inputs),)


def _matmul(batch: int, rows: int, depth: int, columns: int) -> Any:
    return _MatMul(), (smooth_noise(batch, rows, depth), smooth_noise(batch, depth, columns))


def conv(model: str, *shapes: tuple[int, int, int, int, int]) -> list[Case]:
    """Of (inputs, outputs, kernel, stride, size) each."""
    return [
        Case(model, f"conv {k}x{k}/{s} {i}->{o} @{size}", partial(_conv, i, o, k, s, size))
        for i, o, k, s, size in shapes
    ]


def depthwise(model: str, *shapes: tuple[int, int, int, int]) -> list[Case]:
    """Of (channels, kernel, stride, size) each."""
    return [
        Case(model, f"depthwise {k}x{k}/{s} {c} @{size}", partial(_conv, c, c, k, s, size, c))
        for c, k, s, size in shapes
    ]


def dense(model: str, *shapes: tuple[int, int, int]) -> list[Case]:
    """Of (rows, inputs, outputs) each."""
    return [Case(model, f"dense {rows}x{i}->{o}", partial(one_dense, rows, i, o)) for rows, i, o in shapes]


def matmul(model: str, *shapes: tuple[int, int, int, int]) -> list[Case]:
    """Of (batch, rows, depth, columns) each."""
    return [Case(model, f"matmul {'x'.join(map(str, s))}", partial(_matmul, *s), quantisable=False) for s in shapes]


RESNET18 = conv(
    "resnet18", (3, 64, 7, 2, 224), (64, 64, 3, 1, 56), (64, 128, 3, 2, 56), (64, 128, 1, 2, 56), (128, 128, 3, 1, 28),
    (256, 256, 3, 1, 14), (512, 512, 3, 1, 7),
)  # fmt: skip
LONG_DEPTHWISE = Case("conformer_s", "depthwise 31/1 144 @99", partial(_conv1d, 144, 144, 31, 1, 99, 144))
CASES = (
    *RESNET18,
    *conv(
        "resnet50", (64, 256, 1, 1, 56), (256, 64, 1, 1, 56), (512, 128, 1, 1, 28), (256, 256, 3, 2, 28), (256, 1024, 1, 1, 14),
        (2048, 512, 1, 1, 7),
    ),
    *dense("resnet50", (1, 2048, 1000)),
    *conv("mobilenet_v2", (16, 96, 1, 1, 112), (24, 144, 1, 1, 56), (384, 64, 1, 1, 14), (960, 320, 1, 1, 7)),
    *depthwise("mobilenet_v2", (96, 3, 2, 112), (144, 3, 1, 56), (384, 3, 1, 14)),
    *conv("mobilenet_v3", (40, 120, 1, 1, 28)),
    *depthwise("mobilenet_v3", (72, 5, 2, 56), (120, 5, 1, 28), (672, 5, 2, 14)),
    Case("vit_tiny", "conv 16x16/16 3->192 @224", partial(_conv, 3, 192, 16, 16, 224, 1, False)),
    *dense("vit_tiny", (197, 192, 192), (197, 192, 768), (197, 768, 192)),
    *matmul("vit_tiny", (3, 197, 64, 197), (3, 197, 197, 64)),
    *dense("vit_base", (197, 768, 3072), (197, 3072, 768)),
    *matmul("vit_base", (12, 197, 64, 197)),
    Case("whisper_tiny", "conv1d 3/1 80->384 @3000", partial(_conv1d, 80, 384, 3, 1, 3000)),
    Case("whisper_tiny", "conv1d 3/2 384->384 @3000", partial(_conv1d, 384, 384, 3, 2, 3000)),
    *dense("whisper_tiny", (1500, 384, 1536)),
    *matmul("whisper_tiny", (6, 1500, 64, 1500)),
    LONG_DEPTHWISE,
    *dense("conformer_s", (99, 144, 576)),
)  # fmt: skip


def measure(case: Case, precision: str, device: LocalDevice, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = case.make()
    model.eval().requires_grad_(False)
    ours = quantise_model(model, [inputs]) if precision == "w8a8" else model
    compiled = build(ours, inputs, device.profile, device.tuner)
    error = check_outputs(ours, compiled.run, [inputs], f"{case.model} {case.name}, {precision}")
    session = ProfiledSession(model, inputs, int8=precision == "w8a8")
    samples: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        samples["ours"].append(compiled.time(*inputs, repeats=1).seconds)
        session.repeat(0.01)
    samples["theirs"] = session.finish()
    kernel = max(compiled.kernels, key=lambda kernel: kernel.flops)
    return {
        "model": case.model, "kernel": case.name, "precision": precision, "flops": kernel.flops, "samples": samples,
        "ratio": ratio(samples["ours"], samples["theirs"]), "peak": kernel.peak_fraction, "operator": kernel.operator, "error": error,
        "kernel_seconds": kernel.seconds, "microseconds": {side: 1e6 * float(np.median(v)) for side, v in samples.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a model's or a kernel's name")
    parser.add_argument("--precision", default="fp32,w8a8")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = LocalDevice(load_profile("x86-host"))
    results, rows = [], []
    for case in CASES:
        if options.only not in case.model and options.only not in case.name:
            continue
        for precision in options.precision.split(","):
            if precision == "w8a8" and not case.quantisable:
                continue
            result = measure(case, precision, device, options.repeats)
            results.append(result)
            middle, low, high = result["ratio"]
            rows.append([
                case.model, case.name, precision, f"{result['microseconds']['ours']:.1f}", f"{result['microseconds']['theirs']:.1f}",
                f"{1 / middle:.2f}", f"{1 / high:.2f} to {1 / low:.2f}", f"{result['flops'] / result['kernel_seconds'] / 1e9:.0f}",
                f"{result['peak']:.0%}" if result["peak"] else "",
            ])  # fmt: skip
            print(*rows[-1], flush=True)
    summary: dict[str, Any] = {}
    notes = []
    for precision, goal in {"fp32": 1.10, "w8a8": 1.00}.items():
        chosen = [result for result in results if result["precision"] == precision]
        if not chosen:
            continue
        bound = [result["peak"] for result in chosen if result["peak"] and _compute_bound(result)]
        speed = geometric_mean(1 / result["ratio"][0] for result in chosen)
        summary[precision] = {"speed": speed, "compute_bound_peak": bound}
        notes.append(
            f"{precision}: geometric-mean speed {speed:.3f} of ONNX Runtime's over {len(chosen)} shapes (goal >= {goal:.2f})."
        )
        if bound:
            notes.append(
                f"{precision}: {math.fsum(peak >= 0.85 for peak in bound):.0f} of {len(bound)} compute-bound shapes reach 85 % of peak; "
                f"least {min(bound):.0%}, geometric mean {geometric_mean(bound):.0%}."
            )
    headings = ["model", "kernel", "precision", ">ours us", ">ORT us", ">speed", "quartiles", ">Gop/s", ">of peak"]
    publish("kernels", headings, rows, {"summary": summary, "kernels": results}, device.profile, notes)


def _compute_bound(result: dict[str, Any]) -> bool:
    """Products with enough reuse that arithmetic, not memory, limits them: not depthwise, and more than one row of data."""
    return result["operator"] != "depthwise" and not result["kernel"].startswith("dense 1x")


if __name__ == "__main__":
    main()
