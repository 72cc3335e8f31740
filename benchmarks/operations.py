"""Operations that networks of others are made of, one or two at a time: our compiled module against ONNX Runtime, in turn on one thread.

python benchmarks/operations.py [--only transposed,lstm] [--repeats 30] [--dry]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import geometric_mean, publish, ratio
from reference import onnx_fp32
from torch import Tensor, nn
from torch.nn import functional

from autocomp.compiler.build import build
from autocomp.compiler.verify import output_error, reference_outputs
from autocomp.devices.local import LocalDevice
from autocomp.errors import AutocompError
from autocomp.hardware.profile import load_profile
from autocomp.hardware.timing import interleaved, quiet_core


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class Outputs(nn.Module):
    """A recurrent layer's outputs, without its last states."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Standardised(nn.Conv2d):
    """A convolution whose weight is computed in the graph (weight standardisation)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def _modulated(x: Tensor, style: Tensor, weight: Tensor) -> Tensor:
    scaled = weight * style[:, None]
    return functional.conv2d(x, scaled * (scaled.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt(), padding=1)


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3))))


def _shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


# name: (model, shapes of its inputs)
OPERATIONS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "transposed 4x4 stride 2, 64 to 32": (lambda: nn.ConvTranspose2d(64, 32, 4, 2, 1), ((1, 64, 32, 32),)),
    "transposed 3x3 stride 2, 128 to 64": (lambda: nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), ((1, 128, 28, 28),)),
    "transposed 2x2 stride 2, 128 to 64": (lambda: nn.ConvTranspose2d(128, 64, 2, 2), ((1, 128, 28, 28),)),
    "transposed 4x4 to an image": (lambda: nn.ConvTranspose2d(64, 3, 4, 2, 1), ((1, 64, 32, 32),)),
    "transposed depthwise 4x4": (lambda: nn.ConvTranspose2d(64, 64, 4, 2, 1, groups=64), ((1, 64, 28, 28),)),
    "transposed line, vocoder": (lambda: nn.ConvTranspose1d(256, 128, 16, 8, 4), ((1, 256, 64),)),
    "volume 3x3x3": (lambda: nn.Conv3d(32, 64, 3, padding=1), ((1, 32, 8, 28, 28),)),
    "volume 3x1x1": (lambda: nn.Conv3d(64, 64, (3, 1, 1), padding=(1, 0, 0)), ((1, 64, 8, 28, 28),)),
    "volume depthwise": (lambda: nn.Conv3d(64, 64, 3, padding=1, groups=64), ((1, 64, 8, 28, 28),)),
    "patches of video": (lambda: nn.Conv3d(3, 192, (2, 16, 16), (2, 16, 16)), ((1, 3, 8, 112, 112),)),
    "groups of 4": (lambda: nn.Conv2d(128, 128, 3, padding=1, groups=32), ((1, 128, 28, 28),)),
    "groups of 24": (lambda: nn.Conv2d(144, 144, 3, padding=1, groups=6), ((1, 144, 28, 28),)),
    "standardised weight": (lambda: Standardised(64, 64, 3, padding=1), ((1, 64, 28, 28),)),
    "weight from the input": (lambda: Function(_modulated), ((1, 64, 28, 28), (1, 64, 1, 1), (64, 64, 3, 3))),
    "lstm": (lambda: Outputs(nn.LSTM(128, 128, batch_first=True)), ((1, 100, 128),)),
    "lstm, batch of 8": (lambda: Outputs(nn.LSTM(128, 128, batch_first=True)), ((8, 50, 128),)),
    "lstm, both ways, 2 layers": (
        lambda: Outputs(nn.LSTM(64, 128, 2, batch_first=True, bidirectional=True)), ((1, 50, 64),)
    ),
    "gru": (lambda: Outputs(nn.GRU(128, 128)), ((100, 1, 128),)),
    "rnn": (lambda: Outputs(nn.RNN(128, 128)), ((100, 1, 128),)),
    "gelu by a power": (lambda: nn.Sequential(nn.Linear(192, 768), Function(_gelu), nn.Linear(768, 192)), ((1, 64, 192),)),
    "channel shuffle": (
        lambda: nn.Sequential(nn.Conv2d(64, 64, 1), Function(_shuffle), nn.Conv2d(64, 64, 3, padding=1, groups=64)),
        ((1, 64, 28, 28),),
    ),
    "line with residual": (
        lambda: nn.Sequential(nn.Conv1d(128, 128, 3, padding=1), nn.GELU(), nn.Conv1d(128, 128, 5, padding=2)), ((1, 128, 100),)
    ),
}  # fmt: skip


def measure(name: str, device: LocalDevice, repeats: int) -> dict[str, Any]:
    """Compile one operation, check it against torch, and time it in turn with ONNX Runtime (fp32)."""
    make, shapes = OPERATIONS[name]
    torch.manual_seed(0)
    model, inputs = make().eval(), tuple(torch.randn(shape) for shape in shapes)
    start = time.perf_counter()
    compiled = build(model, inputs, device.profile, device.tuner)
    seconds = time.perf_counter() - start
    error = output_error(compiled.run(*inputs), reference_outputs(model, inputs))
    if not error < 1e-4:
        raise AutocompError(f"{name} differs from torch by {error:.1e}")
    theirs = onnx_fp32(model, inputs)
    with quiet_core():
        samples = interleaved({"ours": compiled.prepare(*inputs), "theirs": theirs.run}, repeats=repeats)
    return {
        "operation": name, "samples": samples, "ratio": ratio(samples["ours"], samples["theirs"]), "error_to_torch": error,
        "milliseconds": {side: 1e3 * float(np.median(values)) for side, values in samples.items()}, "build_seconds": seconds,
        "kernels": [{"name": k.name, "operator": k.operator, "microseconds": 1e6 * k.seconds} for k in compiled.kernels],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="comma-separated beginnings of names")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dry", action="store_true", help="print, and write no report")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = LocalDevice(load_profile("x86-host"))
    wanted = [name for name in OPERATIONS if name.startswith(tuple(options.only.split(",")))]
    results, rows = [], []
    for name in wanted:
        result = measure(name, device, options.repeats)
        results.append(result)
        middle, low, high = result["ratio"]
        times = result["milliseconds"]
        slowest = max(result["kernels"], key=lambda kernel: kernel["microseconds"])
        rows.append([
            name, f"{times['ours']:.3f}", f"{times['theirs']:.3f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}",
            str(len(result["kernels"])), f"{slowest['name']} ({slowest['operator']}) {slowest['microseconds']:.0f} us",
        ])  # fmt: skip
        print(*rows[-1], sep=" | ", flush=True)
    mean = geometric_mean(result["ratio"][0] for result in results)
    rows.append(["geometric mean", "", "", f"{mean:.2f}", "", "", ""])
    headings = ["operation", ">ours ms", ">ORT ms", ">ours/ORT", "quartiles", ">kernels", "slowest kernel"]
    data = {"geometric_mean": mean, "operations": results}
    publish("operations", headings, rows, data, device.profile, write=not options.dry)


if __name__ == "__main__":
    main()
