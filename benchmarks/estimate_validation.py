"""How far the estimator can be trusted: its cycles of our own kernels on this machine's core, against their native time.

The estimator is the one that stands in for a Cortex-A76 (loader, emulation, sampling, core model), with the table of another core: AMD's
Zen 5. A development set was looked at while the model was written; the held-out set was run once it stood, and its figures are published.

    python benchmarks/estimate_validation.py [--set development] [--native TIMES.json]

Native times are the best of three means, each over 20 ms; the clock is that of a chain of dependent additions, timed beside them.
Needs a Zen 5 core.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import publish

from autocomp.errors import UsageError
from autocomp.estimate import KernelEstimate, compile_object, estimate_kernel, load_core
from autocomp.hardware.profile import Profile, load_profile
from autocomp.kernels import compute, packing, rows, templates
from autocomp.kernels.intrinsics import dot_product

CORE = "zen5"
TILES = 6  # schedules of one kernel: the three that the analytic model likes best, and others spread over the rest

# (name, arguments) by family. Convolutions: height = width, channels in and out, kernel, stride; int8 has the same.
DEVELOPMENT: dict[str, list[tuple[Any, ...]]] = {
    "conv2d": [(14, 64, 64, 3, 1), (28, 32, 64, 1, 1)],
    "dense": [(96, 256, 128)],
    "depthwise": [(28, 96, 3, 1)],
    "conv2d_int8": [(14, 64, 64, 3, 1)],
    "softmax": [(128, 196)],
    "layer_norm": [(96, 256)],
}
# ResNet-18 and MobileNetV2 at 224, a Conformer-S, a BERT layer: their shapes, some at a smaller size.
HELD_OUT: dict[str, list[tuple[Any, ...]]] = {
    "conv2d": [
        (56, 64, 64, 3, 1), (56, 64, 128, 3, 2), (28, 128, 128, 3, 1), (14, 256, 256, 3, 1), (7, 512, 512, 3, 1),
        (56, 24, 144, 1, 1), (14, 96, 576, 1, 1), (28, 192, 32, 1, 1), (7, 960, 160, 1, 1), (112, 3, 32, 3, 2),
        (16, 16, 32, 5, 1),
    ],
    "dense": [(240, 144, 576), (128, 768, 768), (64, 512, 2048), (1, 1024, 1000), (400, 80, 256), (17, 300, 200)],
    "depthwise": [(56, 144, 3, 1), (28, 192, 3, 2), (14, 576, 3, 1), (7, 960, 3, 1), (112, 32, 3, 1)],
    "conv2d_int8": [(56, 64, 64, 3, 1), (28, 128, 128, 3, 1), (14, 256, 256, 3, 1), (14, 96, 576, 1, 1), (7, 512, 512, 3, 1)],
    "dense_int8": [(240, 144, 576), (128, 768, 768), (64, 512, 2048)],
    "softmax": [(960, 240), (64, 64), (1536, 128), (8, 1000), (400, 33)],
    "layer_norm": [(240, 144), (128, 768), (1024, 64), (16, 1024), (77, 50)],
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """One schedule of one kernel: its function, and its tensors (dtype, shape)."""

    kernel: str
    family: str
    name: str
    function: Any
    tensors: list[tuple[str, tuple[int, ...]]]


def schedules(kernels: dict[str, list[tuple[Any, ...]]], profile: Profile) -> Iterator[Schedule]:
    for family, shapes in kernels.items():
        for shape in shapes:
            function = anchored(family, shape, profile)
            label = f"{family} {'x'.join(map(str, shape))}"
            anchor = templates.describe(function)
            tiles = templates.tiles(anchor, profile)
            best = list(range(min(3, len(tiles))))
            others = np.linspace(3, len(tiles) - 1, TILES - 3).round().astype(int).tolist() if len(tiles) > 3 else []
            for index in dict.fromkeys(best + others):
                tile = tiles[index]
                try:
                    scheduled = templates.apply(function, tile, anchor, profile)
                except Exception as error:  # a tile that TVM refuses is no schedule
                    print(f"{label} {tile}: {str(error).splitlines()[-1][:100]}")
                    continue
                tensors = [
                    (str(p.ty.dtype).removeprefix("T."), tuple(int(size) for size in p.ty.shape))
                    for p in scheduled.params
                ]
                yield Schedule(label, family, f"{label} #{index}", scheduled, tensors)


def anchored(family: str, shape: tuple[Any, ...], profile: Profile) -> Any:
    """The fused function of a kernel: its anchor with the packed weight as an argument."""
    from tvm import te

    if family == "softmax":
        return rows.softmax(*shape, profile.lanes)
    if family == "layer_norm":
        return rows.layer_norm(*shape, 1e-5, profile.lanes)
    dot = dot_product(profile) if family.endswith("int8") else None
    dtype, weight_dtype = (dot.activation, "int8") if dot else ("float32", "float32")
    if family.startswith("dense"):
        count, depth, out = shape
        spec = compute.DenseSpec.of((count, depth), out, profile.lanes)
        data = te.placeholder((count, depth), dtype, name="data")
        packed = packing.pack_dense_weight(np.zeros((out, depth), weight_dtype), profile.lanes, dot)
        weight = te.placeholder(packed.shape, str(packed.dtype), name="weight")
        return te.create_prim_func([data, weight, compute.dense(data, weight, spec, dot)])
    size, channels, *rest = shape
    out, kernel, stride = (channels, *rest) if family == "depthwise" else rest
    groups = channels if family == "depthwise" else 1
    data = te.placeholder((1, size, size, channels), dtype, name="data")
    oihw = np.zeros((out, channels // groups, kernel, kernel), weight_dtype)
    conv = compute.ConvSpec.of(data.shape, oihw.shape, [stride] * 2, [kernel // 2] * 4, [1, 1], groups, profile.lanes)
    packed = packing.pack_conv_weight(oihw, conv, dot)
    weight = te.placeholder(packed.shape, str(packed.dtype), name="weight")
    inputs = [data, weight]
    zero = None
    if dot:
        zero = te.placeholder((1,), "int32", name="zero")
        inputs.append(zero)
    result = compute.conv2d(data, weight, conv, dot, zero)
    inputs = [tensor for tensor in inputs if tensor is not zero or not conv.is_dense]
    return te.create_prim_func([*inputs, result])


def native_seconds(schedule: Schedule, profile: Profile) -> float:
    """The best of three means over 20 ms."""
    import tvm

    rng = np.random.default_rng(0)
    arrays = [
        np.asarray(0.1 * rng.standard_normal(shape) if dtype.startswith("float") else rng.integers(0, 4, shape), dtype)
        for dtype, shape in schedule.tensors
    ]
    arguments = [tvm.runtime.tensor(array) for array in arrays]
    executable = tvm.compile(
        tvm.IRModule({"main": schedule.function.with_attr("global_symbol", "main")}),
        tvm.target.Target(dict(profile.target)),
    )
    device = tvm.cpu()
    executable(*arguments)
    once = executable.mod.time_evaluator("main", device, number=3, repeat=1)(*arguments).mean
    number = max(1, round(20e-3 / once))
    return float(min(executable.mod.time_evaluator("main", device, number=number, repeat=3)(*arguments).results))


def clock_hz() -> float:
    """Cycles a second of this core: a chain of dependent additions, one cycle each."""
    body = b"\x48\x01\xc0" * 100  # add rax, rax
    code = (
        b"\xb9"
        + (100_000).to_bytes(4, "little")
        + body
        + b"\xff\xc9\x0f\x85"
        + (-len(body) - 8).to_bytes(4, "little", signed=True)
        + b"\xc3"
    )
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    run = ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return 100 * 100_000 / best


def measure(kernels: dict[str, list[tuple[Any, ...]]], profile: Profile) -> dict[str, Any]:
    """Native seconds of every schedule, and the clock before and after."""
    clocks = [clock_hz()]
    seconds = {schedule.name: native_seconds(schedule, profile) for schedule in schedules(kernels, profile)}
    return {"clock_hz": max(*clocks, clock_hz()), "seconds": seconds}


@dataclass(frozen=True)
class Result:
    """A schedule's native and estimated cycles."""

    kernel: str
    family: str
    name: str
    native: float
    estimate: KernelEstimate
    took: float

    @property
    def ratio(self) -> float:
        return self.estimate.cycles / self.native


def statistics(results: list[Result]) -> dict[str, Any]:
    """Kendall's tau over all and within kernels, error of the cycles, and what trusting the estimate's choice costs."""
    from scipy.stats import kendalltau

    errors = [abs(result.ratio - 1) for result in results]
    by_kernel: dict[str, list[Result]] = {}
    for result in results:
        by_kernel.setdefault(result.kernel, []).append(result)
    chosen = [group for group in by_kernel.values() if len(group) > 1]
    regrets = [
        min(group, key=lambda r: r.estimate.cycles).native / min(r.native for r in group) - 1 for group in chosen
    ]
    within = [
        float(kendalltau([r.native for r in group], [r.estimate.cycles for r in group]).statistic)
        for group in chosen
        if len(group) >= 4
    ]
    return {
        "schedules": len(results),
        "kernels": len(by_kernel),
        "kendall_tau": float(kendalltau([r.native for r in results], [r.estimate.cycles for r in results]).statistic),
        "kendall_tau_within_kernels": float(np.mean(within)) if within else None,
        "median_error": float(np.median(errors)),
        "p95_error": float(np.percentile(errors, 95)),
        "median_ratio": float(np.median([r.ratio for r in results])),
        "worst_ratio": max((r.ratio for r in results), key=lambda ratio: abs(math.log(ratio))),
        "mean_regret": float(np.mean(regrets)) if regrets else None,
        "worst_regret": max(regrets, default=None),
        "estimate_seconds_median": float(np.median([r.took for r in results])),
        "estimate_seconds_worst": max(r.took for r in results),
        "unknown_share_worst": max(r.estimate.unknown_share for r in results),
        "unknown": sorted({name for r in results for name in r.estimate.unknown}),
    }


def compare(kernels: dict[str, list[tuple[Any, ...]]], profile: Profile, native: dict[str, Any]) -> list[Result]:
    core = load_core(CORE).adapted(clock_hz=native["clock_hz"], caches=profile.caches)
    results = []
    for schedule in schedules(kernels, profile):
        code = compile_object(schedule.function, profile.target)
        start = time.perf_counter()
        estimate = estimate_kernel(code, schedule.tensors, core, store=False)
        took = time.perf_counter() - start
        cycles = native["seconds"][schedule.name] * native["clock_hz"]
        results.append(Result(schedule.kernel, schedule.family, schedule.name, cycles, estimate, took))
    return results


def row(name: str, s: dict[str, Any]) -> list[str]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.0f} %"

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return [
        name, str(s["kernels"]), str(s["schedules"]), number(s["kendall_tau"]), number(s["kendall_tau_within_kernels"]),
        percent(s["median_error"]), percent(s["p95_error"]), number(s["median_ratio"]), number(s["worst_ratio"]),
        percent(s["mean_regret"]), percent(s["worst_regret"]),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("development", "held-out"), default="held-out")
    parser.add_argument(
        "--native", type=Path, help="native times: read if the file is there, else measured and written"
    )
    parser.add_argument("--time-only", action="store_true", help="stop when the native times are written")
    parser.add_argument("--verbose", action="store_true", help="print every schedule")
    arguments = parser.parse_args()
    profile = load_profile("x86-host")
    if profile.target.get("mcpu") != "znver5":
        raise UsageError(f"the table of instructions is of a Zen 5 core, this one is {profile.target.get('mcpu')}")
    kernels = DEVELOPMENT if arguments.set == "development" else HELD_OUT
    if arguments.native and arguments.native.exists():
        native = json.loads(arguments.native.read_text())
    else:
        native = measure(kernels, profile)
        if arguments.native:
            arguments.native.write_text(json.dumps(native))
    if arguments.time_only:
        return
    results = compare(kernels, profile, native)
    if arguments.verbose:
        for r in results:
            print(
                f"{r.name:32s} native {r.native:12.0f} estimated {r.estimate.cycles:12.0f} ratio {r.ratio:5.2f} "
                f"sampled {r.estimate.sampled:.3f} instructions {r.estimate.instructions} {r.took:.2f} s "
                f"misses {r.estimate.misses} mispredicts {r.estimate.mispredicts} {r.estimate.unknown}"
            )
    groups = {family: [r for r in results if r.family == family] for family in kernels}
    tables = {name: statistics(group) for name, group in groups.items() if group}
    tables["all"] = statistics(results)
    headings = [
        "kernels of", ">kernels", ">schedules", ">Kendall τ", ">τ within a kernel", ">median error", ">95th percentile",
        ">median ratio", ">worst ratio", ">mean regret", ">worst regret",
    ]  # fmt: skip
    lines = [row(name, table) for name, table in tables.items()]
    if arguments.set == "development":
        for line in [headings, *lines]:
            print(" | ".join(line))
        return
    whole = tables["all"]
    publish(
        "estimate_validation",
        headings,
        lines,
        {"core": CORE, "clock_hz": native["clock_hz"], "held_out": tables, "schedules": [plain(r) for r in results]},
        profile,
        [
            "Held-out schedules: none of these shapes was looked at while the model or its table was written. Ratio: estimated over "
            "native cycles; error: its distance from 1; regret: native time of the schedule that the estimate prefers, over the "
            "fastest's, less 1.",
            f"An estimate took {whole['estimate_seconds_median']:.2f} s at the median, {whole['estimate_seconds_worst']:.2f} s at worst; "
            f"native clock {native['clock_hz'] / 1e9:.2f} GHz.",
            "A first run over the held-out set gave τ 0.94, a median error of 5 % and a 95th percentile of 36 %. Then a unit test showed "
            "512-bit stores to be decoded as loads; that was mended, and what it had hidden of stores was corrected on the development set. "
            "The table above is the second run, and the last.",
            "The table is that of Zen 5, from published sources, not fitted to times. It says how well the method does, not how well "
            "the Cortex-A76's table does.",
        ],
    )


def plain(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "native_cycles": result.native,
        "estimated_cycles": result.estimate.cycles,
        "instructions": result.estimate.instructions,
        "sampled": result.estimate.sampled,
    }


if __name__ == "__main__":
    main()
