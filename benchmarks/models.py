"""Whole models, one inference: our compiled module against ONNX Runtime, OpenVINO and ncnn, side by side in one run on one pinned thread.

python benchmarks/models.py [--models resnet18,vit_tiny] [--precision fp32] [--repeats 30]

bf16, on processors that have instructions for it, is held against OpenVINO's bf16, against ONNX Runtime's fp32 (it has no bf16 of its own here),
and against our own fp32. OpenVINO and ncnn are timed where they are installed (``pip install 'autocomp[references]'``); the column "of the best"
is ours over the fastest of the others.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from common import geometric_mean, publish, ratio
from peers import Peer, peers
from reference import brain_model, onnx_fp32, onnx_int8, quantise_model
from zoo import BENCHMARKED, ZOO, like

from autocomp.compiler.build import CompiledModel, build
from autocomp.compiler.verify import output_error, reference_outputs, relative_error, tolerance
from autocomp.devices.local import LocalDevice
from autocomp.errors import MismatchError
from autocomp.hardware.profile import load_profile
from autocomp.hardware.timing import interleaved, quiet_core
from autocomp.records.latency import KernelTime

PRECISIONS = ("fp32", "bf16", "w8a8")
_SHOWN = {"theirs": "ONNX Runtime"}
_FLOATS = "our fp32"
CALIBRATION = 4  # inputs that set the int8 ranges, ours and theirs
GOALS = {
    "fp32": (0.90, 1.05),
    "bf16": (0.53, None),
    "w8a8": (1.00, None),
}  # geometric mean of ours / theirs, and the most on any model


def measure(name: str, precision: str, device: LocalDevice, repeats: int) -> dict[str, Any]:
    """Compile one model, check it against torch, and time it in turn with ONNX Runtime."""
    model, inputs = ZOO[name]()
    calibration = [like(inputs, seed) for seed in range(1, CALIBRATION + 1)]
    with torch.no_grad():
        exact = model(*inputs)
    if precision in ("fp32", "bf16"):
        ours, note = (model if precision == "fp32" else brain_model(model)), ""
        theirs = onnx_fp32(model, inputs)
    else:
        ours = quantise_model(model, calibration)
        theirs, note = onnx_int8(model, inputs, calibration)
    others, refused = peers(model, inputs, "int8" if precision == "w8a8" else precision, calibration)
    compiled = build(ours, inputs, device.profile, device.tuner)
    error = _checked(compiled, ours, inputs, exact)
    others = [peer for peer in others if _agrees(peer, exact, precision, refused)]
    calls = {"ours": compiled.prepare(*inputs), "theirs": theirs.run, **{peer.name: peer.run for peer in others}}
    if precision == "bf16":
        calls[_FLOATS] = build(model, inputs, device.profile, device.tuner).prepare(*inputs)
    with quiet_core():
        samples = interleaved(calls, repeats=repeats)
    rivals = [side for side in samples if side not in ("ours", _FLOATS)]
    best = min(rivals, key=lambda side: float(np.median(samples[side])))
    return {
        "model": name, "precision": precision, "samples": samples, "ratio": ratio(samples["ours"], samples["theirs"]),
        "best": _SHOWN.get(best, best), "of_the_best": ratio(samples["ours"], samples[best]), "refused": refused,
        "milliseconds": {side: 1e3 * float(np.median(values)) for side, values in samples.items()},
        "reference": note, "error_to_torch": error,
        "distance_to_fp32": {"ours": _distance(_first(compiled, inputs), exact), "theirs": _distance(theirs.output(), exact)},
        **breakdown(compiled.kernels),
    }  # fmt: skip


def _agrees(peer: Peer, exact: torch.Tensor, precision: str, refused: list[str]) -> bool:
    """Whether a peer computes what torch does, in fp32; what quantising costs it is shown beside ours."""
    error = _distance(peer.output().reshape(exact.shape), exact)
    if precision != "fp32" or error <= 1e-3:
        return True
    refused.append(f"{peer.name}: differs from torch by {error:.1e}")
    return False


def _checked(
    compiled: CompiledModel, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], exact: torch.Tensor
) -> float:
    """The error against torch. MismatchError above 1e-3, or, with quantised layers, above what quantising itself changes.

    In a deep model of float and 8-bit layers in turn (ViT), scaling torch's own input by 1 + 1e-6 moves its W8A8 output by nearly as
    much as quantising does: values flip over rounding steps, and later layers amplify that. No tighter bound has a meaning.
    """
    reference = reference_outputs(model, inputs)
    error = output_error(compiled.run(*inputs), reference)
    allowed = max(tolerance(model), relative_error(reference[0], exact))
    if not error <= allowed:
        raise MismatchError(f"the compiled module differs from torch by {error:.2e} (allowed: {allowed:.1e})")
    return error


def _first(compiled: CompiledModel, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    result = compiled.run(*inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


def _distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of the exact values: what quantising cost, on random weights."""
    return float((value - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def breakdown(kernels: Sequence[KernelTime]) -> dict[str, Any]:
    """Where the time goes, from each kernel's own time: the parts that are no contraction, and the contractions far from the peak."""
    total = sum(kernel.seconds for kernel in kernels)
    groups: dict[str, list[KernelTime]] = defaultdict(list)
    for kernel in kernels:
        if not kernel.flops:
            groups[re.sub(r"\d+$", "", kernel.name)].append(kernel)
    others = [_row(name, members, total) for name, members in groups.items()]
    distinct: dict[str, list[KernelTime]] = defaultdict(list)
    for kernel in kernels:
        if kernel.flops and kernel.peak_fraction:
            distinct[kernel.key].append(kernel)
    lost = [
        {**_row(members[0].name, members, total), "peak": members[0].peak_fraction}
        for members in distinct.values()
        if (members[0].peak_fraction or 1) < 0.7
    ]
    return {
        "kernels": len(kernels), "kernel_seconds": total,
        "contraction_share": sum(kernel.seconds for kernel in kernels if kernel.flops) / total,
        "peak_in_contractions": _mean_peak(kernels),
        "other_kernels": sorted(others, key=lambda row: -row["microseconds"]),
        "slow_contractions": sorted(lost, key=lambda row: -row["microseconds"]),
    }  # fmt: skip


def _row(name: str, members: Sequence[KernelTime], total: float) -> dict[str, Any]:
    seconds = sum(kernel.seconds for kernel in members)
    return {"name": name, "calls": len(members), "microseconds": 1e6 * seconds, "share": seconds / total}


def _mean_peak(kernels: Iterable[KernelTime]) -> float:
    """Fraction of the measured peak over all contractions: their work at the peak rate over the time they take."""
    pairs = [(kernel.seconds * kernel.peak_fraction, kernel.seconds) for kernel in kernels if kernel.peak_fraction]
    return sum(ideal for ideal, _ in pairs) / (sum(seconds for _, seconds in pairs) or 1.0)


def _top(rows: Sequence[dict[str, Any]], count: int = 6) -> str:
    cells = []
    for row in rows[:count]:
        peak = f" at {row['peak']:.0%} of peak" if "peak" in row else ""
        cells.append(f"{row['name']} x{row['calls']} {row['microseconds']:.0f} us ({row['share']:.1%}){peak}")
    return "; ".join(cells) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(BENCHMARKED), help="comma-separated names of the zoo")
    parser.add_argument("--precision", default=",".join(PRECISIONS))
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    profile = load_profile("x86-host")
    device = LocalDevice(profile)
    results, rows, notes = [], [], []
    for name in options.models.split(","):
        for precision in options.precision.split(","):
            if precision != "fp32" and precision not in profile.precisions:
                notes.append(f"{name}, {precision}: this processor has no kernels for it.")
                continue
            result = measure(name, precision, device, options.repeats)
            results.append(result)
            middle, low, high = result["ratio"]
            milliseconds, far = result["milliseconds"], result["distance_to_fp32"]
            of_best, best_low, best_high = result["of_the_best"]
            beside = "; ".join(
                f"{peer} {milliseconds[peer]:.2f}" for peer in milliseconds if peer not in ("ours", "theirs")
            )
            shown = f"{BENCHMARKED.get(name, name)}, {precision}"
            rows.append([
                BENCHMARKED.get(name, name), precision, f"{milliseconds['ours']:.2f}", f"{milliseconds['theirs']:.2f}",
                f"{middle:.3f}", f"{low:.3f} to {high:.3f}", beside, f"{of_best:.3f}", f"{best_low:.3f} to {best_high:.3f} ({result['best']})",
                f"{result['contraction_share']:.0%}", f"{result['peak_in_contractions']:.0%}",
                f"{far['ours']:.3f} / {far['theirs']:.3f}" if precision != "fp32" else "",
            ])  # fmt: skip
            print(*rows[-1], flush=True)
            notes += [f"{shown}: {reason}." for reason in result["refused"]]
            notes.append(f"{shown}, not contractions: {_top(result['other_kernels'])}.")
            if result["slow_contractions"]:
                notes.append(f"{shown}, contractions below 70 % of peak: {_top(result['slow_contractions'])}.")
    summary = {}
    for precision, (goal, most) in GOALS.items():
        ratios = [result["ratio"][0] for result in results if result["precision"] == precision]
        if ratios:
            summary[precision] = geometric_mean(ratios)
            ceiling = f", and at most {most} on each" if most else ""
            if precision == "bf16":
                floats = [
                    ratio(result["samples"]["ours"], result["samples"][_FLOATS])[0]
                    for result in results
                    if result["precision"] == precision
                ]
                notes.insert(
                    0,
                    f"bf16 over our own fp32: {geometric_mean(floats):.3f} in the geometric mean (goal <= 0.53), most {max(floats):.3f}.",
                )
            of_best = geometric_mean(result["of_the_best"][0] for result in results if result["precision"] == precision)
            summary[f"{precision} of the best"] = of_best
            rows.append([
                "geometric mean", precision, "", "", f"{summary[precision]:.3f}", f"goal <= {goal}{ceiling}; most {max(ratios):.3f}", "",
                f"{of_best:.3f}", "", "", "", "",
            ])  # fmt: skip
    headings = [
        "model",
        "precision",
        ">ours ms",
        ">ORT ms",
        ">ours/ORT",
        "quartiles",
        "others ms",
        ">of the best",
        "quartiles (the best)",
        ">contractions",
        ">of peak",
        ">rms error ours / ORT",
    ]
    publish("models", headings, rows, {"geometric_mean": summary, "models": results}, profile, notes)


if __name__ == "__main__":
    main()
