"""Kernels of real models on the Cortex-A76, in every precision, as the core's model estimates them, against the arithmetic peak.

    python benchmarks/a76_kernels.py [--only resnet18] [--precision fp32,fp16,w8a8]

Peaks of one core: 16 FLOP a cycle in fp32 and 32 in fp16 (two pipes of 128-bit multiply-adds), 32 multiply-adds of bytes (SDOT). The kernels
are tuned from an empty store, which times the tuning too. Each is one layer, channels last inside and out, with float32 at both ends: what
casts or quantises its input is a kernel of its own, not counted here, as in a model it is part of the layer before.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from common import geometric_mean, publish
from kernels import LONG_DEPTHWISE, RESNET18, Case, conv, dense, depthwise, matmul, one_dense
from reference import halve_model, quantise_model, replace_layers
from torch import nn

from autocomp.compiler.build import schedule
from autocomp.compress.scales import weight_only
from autocomp.estimate import compile_object, estimate_kernel, load_core
from autocomp.hardware.profile import Profile, load_profile
from autocomp.records.latency import How
from autocomp.tuning.store import KernelStore
from autocomp.tuning.timers import signature
from autocomp.tuning.tune import Tuner

PEAK = {"fp32": 16.0, "fp16": 32.0, "w8a8": 64.0, "w8": 16.0, "w4": 16.0}  # operations a cycle
T = TypeVar("T")


class _Estimates:
    """A timer of the core's model, which keeps nothing from run to run."""

    how: How = "estimated"

    def __init__(self, profile: Profile) -> None:
        self.profile, self.core = profile, load_core(profile.core)

    def attempt(
        self, function: Any, items: Sequence[T], build: Callable[[T], Any]
    ) -> Generator[tuple[T, float | None, str]]:
        for item in items:
            code = compile_object(build(item), self.profile.target)
            yield item, estimate_kernel(code, signature(function), self.core, store=False).seconds, ""


CASES = (
    Case("gemm", "256x256x256", partial(one_dense, 256, 256, 256)),
    Case("gemm", "192x256x192", partial(one_dense, 192, 256, 192)),
    *RESNET18, *conv("resnet18", (128, 256, 3, 2, 28), (256, 512, 3, 2, 14)),
    *conv(
        "mobilenet_v2", (32, 16, 1, 1, 112), (16, 96, 1, 1, 112), (96, 24, 1, 1, 56), (24, 144, 1, 1, 56), (144, 32, 1, 1, 28),
        (32, 192, 1, 1, 28), (192, 64, 1, 1, 14), (64, 384, 1, 1, 14), (384, 96, 1, 1, 14), (96, 576, 1, 1, 14), (576, 160, 1, 1, 7),
        (160, 960, 1, 1, 7), (960, 320, 1, 1, 7), (320, 1280, 1, 1, 7),
    ),
    *dense("conformer_s", (99, 144, 576), (99, 576, 144), (99, 144, 144), (99, 144, 288), (99, 144, 128)),
    *conv("conformer_s", (144, 144, 3, 2, 40)),
    *matmul("conformer_s", (4, 99, 36, 99)),
    # bound by memory, or by loads: shown, not part of the mean
    *depthwise("mobilenet_v2", (96, 3, 2, 112), (144, 3, 1, 56), (384, 3, 1, 14)), LONG_DEPTHWISE,
    *dense("linear", (1, 512, 1000), (1, 1280, 1000), (1, 2048, 2048), (99, 144, 576)),
)  # fmt: skip


def in_precision(model: nn.Module, inputs: tuple[torch.Tensor, ...], precision: str) -> nn.Module:
    """The model with every layer in one precision, every linear one for weights alone."""
    if precision == "fp32":
        return model
    if precision == "w8a8":
        return quantise_model(model, [inputs])
    if precision == "fp16":
        return halve_model(model)
    return replace_layers(model, (nn.Linear,), lambda layer: weight_only(layer, int(precision[1:]), 64))


def measure(case: Case, precision: str, profile: Profile, tuner: Tuner) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = case.make()
    ours = in_precision(model.eval().requires_grad_(False), inputs, precision)
    trials, start = tuner.trials, time.perf_counter()
    scheduled = schedule(ours, inputs, profile, tuner)
    seconds = time.perf_counter() - start
    kernel = max(scheduled.kernels, key=lambda kernel: kernel.flops)
    assert profile.clock_hz
    cycles = kernel.seconds * profile.clock_hz
    (name,) = [key for key in scheduled.module.functions if key.name_hint == kernel.name]
    tensors = signature(scheduled.module[name])
    return {
        "bytes": sum(math.prod(shape) * int("".join(filter(str.isdigit, dtype))) // 8 for dtype, shape in tensors),
        "model": case.model, "kernel": case.name, "precision": precision, "operator": kernel.operator, "flops": kernel.flops,
        "microseconds": 1e6 * kernel.seconds, "per_cycle": kernel.flops / cycles, "peak": kernel.flops / cycles / PEAK[precision],
        "all_kernels_microseconds": 1e6 * sum(other.seconds for other in scheduled.kernels), "trials": tuner.trials - trials,
        "tuning_seconds": seconds, "kernels": len(scheduled.kernels),
    }  # fmt: skip


def bound_by_arithmetic(result: dict[str, Any], profile: Profile) -> bool:
    """Whether the arithmetic at its peak takes longer than copying the tensors, where the second-level cache does not hold them."""
    if result["operator"].startswith(("depthwise", "gemv", "rowwise")) or result["model"] in ("linear", "gemm"):
        return False
    assert profile.clock_hz
    arithmetic = result["flops"] / PEAK[result["precision"]] / profile.clock_hz
    copying = result["bytes"] / profile.memory_bandwidth["copy"]
    return result["bytes"] <= profile.caches["l2"] or arithmetic >= copying


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a model's or a kernel's name")
    parser.add_argument("--precision", default="fp32,fp16,w8a8,w8,w4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    profile = load_profile("cortex-a76")
    results, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        tuner = Tuner(profile, KernelStore.open(profile, Path(folder)), _Estimates(profile))
        for case in CASES:
            if options.only not in case.model and options.only not in case.name:
                continue
            for precision in options.precision.split(","):
                if (precision != "fp32" and not case.quantisable) or (
                    precision in ("w8", "w4") and case.model != "linear"
                ):
                    continue
                result = measure(case, precision, profile, tuner)
                results.append(result)
                rows.append([
                    case.model, case.name, precision, result["operator"], f"{result['microseconds']:.0f}",
                    f"{result['per_cycle'] / (2 if precision == 'w8a8' else 1):.1f}", f"{result['peak']:.0%}",
                    str(result["trials"]), f"{result['tuning_seconds']:.1f}",
                ])  # fmt: skip
                print(*rows[-1], flush=True)
    summary: dict[str, Any] = {}
    notes = [
        f"Estimated (core model), Cortex-A76 @ {(profile.clock_hz or 0) / 1e9:.1f} GHz, 1 core. Per cycle: FLOP; multiply-adds in w8a8."
    ]
    for precision in ("fp32", "fp16", "w8a8"):
        bound = [
            result["peak"]
            for result in results
            if result["precision"] == precision and bound_by_arithmetic(result, profile)
        ]
        square = next(
            (
                result["peak"]
                for result in results
                if result["precision"] == precision and "256x256x256" in result["kernel"]
            ),
            None,
        )
        if not bound:
            continue
        summary[precision] = {
            "geometric_mean": geometric_mean(bound),
            "least": min(bound),
            "shapes": len(bound),
            "gemm_256": square,
        }
        notes.append(
            f"{precision}: {f'{square:.0%} of peak in a 256x256x256 product (goal 90 %); ' if square else ''}geometric mean "
            f"{geometric_mean(bound):.0%} over {len(bound)} compute-bound layer shapes (goal 80 %), least {min(bound):.0%}."
        )
    tuned = [result["tuning_seconds"] for result in results]
    if tuned:
        middle, most = sorted(tuned)[len(tuned) // 2], max(tuned)
        summary["tuning"] = {"median_seconds": middle, "largest_seconds": most}
        notes.append(
            f"Exporting, lowering and tuning one layer takes {middle:.1f} s in the median, {most:.1f} s at most (goal 8 s)."
        )
    headings = ["model", "kernel", "precision", "template", ">us", ">per cycle", ">of peak", ">trials", ">s to tune"]
    publish("a76_kernels", headings, rows, {"summary": summary, "kernels": results}, profile, notes)


if __name__ == "__main__":
    main()
