"""What tuning costs and what it leaves on the table: each model's kernels from an empty store, against 20 times the budget.

    python benchmarks/tuning.py [--models resnet18] [--precision fp32] [--metaschedule 3]

``--metaschedule N`` also tunes the N kernels of each model that take longest with MetaSchedule's default space, 64 trials each; it
needs ``pip install 'autocomp[benchmarks]'`` and minutes, and makes a table of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import publish, ratio
from reference import quantise_model
from torch import Tensor, nn
from zoo import BENCHMARKED, ZOO, like

from autocomp.compiler.build import CompiledModel, build
from autocomp.hardware.profile import Profile, load_profile
from autocomp.hardware.timing import interleaved, quiet_core
from autocomp.processes.alone import attempt_alone
from autocomp.records.latency import KernelTime
from autocomp.tuning import timers, tune
from autocomp.tuning.store import KernelStore

WIDE = 20  # times the usual budget
_META_TRIALS = 64
Inputs = tuple[Tensor, ...]


class RecordingTuner(tune.Tuner):
    """A tuner that keeps the seconds that tuning took, and the functions it saw; ``apart``, it tunes one kernel after the other."""

    def __init__(self, *arguments: Any, apart: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.apart = apart
        self.seconds: list[float] = []  # of every kernel that was new; not apart, of all that were asked for together
        self.functions: dict[str, Any] = {}

    def tune_all(self, functions: Sequence[Any]) -> list[tune.Tuned]:
        tuned: list[tune.Tuned] = []
        for part in [[function] for function in functions] if self.apart else [functions]:
            start = time.perf_counter()
            new = super().tune_all(part)
            if any(one.trials for one in new):
                self.seconds.append(time.perf_counter() - start)
            tuned += new
        self.functions |= {one.record.key: function for one, function in zip(tuned, functions, strict=True)}
        return tuned


@contextlib.contextmanager
def _to_the_end() -> Iterator[None]:
    """Let tuning spend its whole budget: no tile is good enough, and no number of failures enough to stop."""
    kept = tune._GOOD_ENOUGH, tune._PATIENCE, tune._PATIENCE_OF
    tune._GOOD_ENOUGH, tune._PATIENCE, tune._PATIENCE_OF = float("inf"), 10**9, {}
    try:
        yield
    finally:
        tune._GOOD_ENOUGH, tune._PATIENCE, tune._PATIENCE_OF = kept


def _build(
    model: nn.Module, inputs: Inputs, profile: Profile, folder: Path, **options: Any
) -> tuple[CompiledModel, RecordingTuner, float]:
    tuner = RecordingTuner(profile, KernelStore.open(profile, folder), **options)
    start = time.perf_counter()
    compiled = build(model, inputs, profile, tuner)
    return compiled, tuner, time.perf_counter() - start


def measure(name: str, precision: str, profile: Profile, repeats: int, metaschedule: int) -> dict[str, Any]:
    model, inputs = ZOO[name]()
    if precision == "w8a8":
        model = quantise_model(model, [like(inputs, seed) for seed in range(1, 3)])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        usual, tuner, seconds = _build(model, inputs, profile, folder / "usual")
        _, apart, _ = _build(model, inputs, profile, folder / "apart", apart=True)
        _, again, again_seconds = _build(model, inputs, profile, folder / "usual")
        with _to_the_end():
            wide, wide_tuner, _ = _build(model, inputs, profile, folder / "wide", budget=tuner.budget * WIDE)
        with quiet_core():
            samples = interleaved({"usual": usual.prepare(*inputs), "wide": wide.prepare(*inputs)}, repeats=repeats)
        slowest = sorted(
            {kernel.key: kernel for kernel in usual.kernels if kernel.flops}.values(), key=lambda k: -k.seconds
        )
        compared = []
        for kernel in slowest[:metaschedule]:
            work = partial(
                _metaschedule, function=tuner.functions[kernel.key], target=tuner.target, folder=folder / kernel.key
            )
            alone = attempt_alone(
                [kernel], lambda kernel: kernel, lambda kernel, _, work=work: work(kernel), timeout=3600
            )
            ((found, failure),) = alone  # a crash of the search is not ours
            compared.append(found or {"operator": kernel.operator, "failure": failure})
    return {
        "model": name, "precision": precision, "kernels": len(apart.seconds), "trials": tuner.trials,
        "tuning_seconds": sum(tuner.seconds), "slowest_kernel_seconds": max(apart.seconds), "build_seconds": seconds,
        "trials_again": again.trials, "build_again_seconds": again_seconds,
        "wide_trials": wide_tuner.trials, "wide_tuning_seconds": sum(wide_tuner.seconds), "samples": samples,
        "ratio_to_wide": ratio(samples["usual"], samples["wide"]),
        "kernel_sum_ratio": sum(k.seconds for k in usual.kernels) / sum(k.seconds for k in wide.kernels), "metaschedule": compared,
    }  # fmt: skip


def _metaschedule(kernel: KernelTime, *, function: Any, target: Any, folder: Path) -> dict[str, Any]:
    """Tune the same function with MetaSchedule's default space; importing its intrinsics alone takes about 15 s."""
    import tvm
    from tvm.s_tir import meta_schedule as ms

    plain = function.with_attr("global_symbol", "main")
    start = time.perf_counter()
    database = ms.tune_tir(
        tvm.IRModule({"main": plain}),
        target,
        str(folder),
        max_trials_global=_META_TRIALS,
        num_trials_per_iter=16,
        num_tuning_cores=1,
    )
    seconds = time.perf_counter() - start
    schedule = ms.tir_integration.compile_tir(database, tvm.IRModule({"main": plain}), target)
    theirs = float("nan")
    if schedule is not None:
        theirs = timers.time_function(schedule.mod["main"], timers.random_arguments(function), target)
    return {
        "operator": kernel.operator, "ours_seconds": kernel.seconds, "metaschedule_seconds": theirs, "tuning_seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(BENCHMARKED))
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--metaschedule", type=int, default=0, metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(1)
    profile = load_profile("x86-host")
    results, rows, notes = [], [], []
    for name in options.models.split(","):
        for precision in options.precision.split(","):
            result = measure(name, precision, profile, options.repeats, options.metaschedule)
            results.append(result)
            middle, low, high = result["ratio_to_wide"]
            rows.append([
                BENCHMARKED.get(name, name), precision, str(result["kernels"]), str(result["trials"]), f"{result['tuning_seconds']:.1f}",
                f"{result['build_seconds']:.1f}", str(result["trials_again"]), f"{result['build_again_seconds']:.1f}",
                str(result["wide_trials"]), f"{result['wide_tuning_seconds']:.0f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}",
            ])  # fmt: skip
            print(*rows[-1], flush=True)
            for row in result["metaschedule"]:
                if "failure" in row:
                    notes.append(f"{name}, {row['operator']}: MetaSchedule failed: {row['failure']}.")
                    continue
                speed = row["metaschedule_seconds"] / row["ours_seconds"]
                notes.append(
                    f"{name}, {row['operator']}: MetaSchedule's default space, {_META_TRIALS} trials, {row['tuning_seconds']:.0f} s: "
                    f"{1e6 * row['metaschedule_seconds']:.0f} us against our {1e6 * row['ours_seconds']:.0f} us ({speed:.2f} times ours)."
                )
    headings = [
        "model", "precision", ">kernels", ">trials", ">tuning s", ">build s", ">trials again", ">build again s", ">trials 20x", ">tuning 20x s",
        ">time / 20x", "quartiles",
    ]  # fmt: skip
    median = float(np.median([result["ratio_to_wide"][0] for result in results]))
    notes.insert(
        0,
        f"Goals: ResNet-18 in at most 10 s of tuning, within 5 % of 20 times the budget; 0 trials again. Median {median:.3f}.",
    )
    publish("metaschedule" if options.metaschedule else "tuning", headings, rows, {"models": results}, profile, notes)


if __name__ == "__main__":
    main()
