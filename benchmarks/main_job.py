"""The main job from nothing: a search of the built-in task with an empty cache, its stages, and the goals it is held to.

python benchmarks/main_job.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import publish, ratio

from autocomp.compiler.build import build
from autocomp.devices.local import LocalDevice
from autocomp.export.onnx import export_onnx, onnx_session
from autocomp.hardware.profile import load_profile
from autocomp.hardware.timing import interleaved, quiet_core
from autocomp.tasks.task import load_task
from autocomp.tuning.store import KernelStore

RECORDS = ("config.yaml", "provenance.json", "front.json", "evaluations.csv", "report.html")


def search(folder: Path) -> dict:
    """Run the demo's command in a process of its own with an empty cache; seconds, trials, peak memory."""
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "autocomp.cli.main",
        "search",
        "digits",
        *("--trials", "200", "--measurements", "16", "--recover", "45s"),
        "--out",
        str(folder / "run"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "AUTOCOMP_CACHE": str(folder / "cache")})
    seconds = time.perf_counter() - start
    summary = json.loads((folder / "run" / "front.json").read_text())["summary"]
    return {**summary, "seconds": seconds, "seconds_by_stage": summary["seconds"]}


def tuning(folder: Path) -> dict:
    """Seconds to tune each fp32 kernel of the dense model from an empty store, and trials of a second build."""
    task = load_task("digits")
    profile = load_profile("x86-host")
    device = LocalDevice(profile, KernelStore.open(profile, folder / "store"))
    seconds = []
    tune_all = device.tuner.tune_all

    def timed(function: object) -> object:
        start = time.perf_counter()
        (tuned,) = tune_all([function])
        seconds.append(time.perf_counter() - start)
        return tuned

    device.tuner.tune_all = lambda functions: [timed(function) for function in functions]
    compiled = build(task.model, task.example_inputs, profile, device.tuner)
    first, trials = list(seconds), device.tuner.trials
    build(task.model, task.example_inputs, profile, device.tuner)
    session = onnx_session(export_onnx(task.model, task.example_inputs, folder / "dense.onnx"))
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, task.example_inputs[0].numpy())
    binding.bind_output(session.get_outputs()[0].name)
    with quiet_core():
        samples = interleaved(
            {"ours": compiled.prepare(*task.example_inputs), "ort": lambda: session.run_with_iobinding(binding)}
        )
    return {
        "kernels": len(first), "slowest_seconds": max(first), "total_seconds": sum(first), "trials": trials,
        "trials_second_build": device.tuner.trials - trials, "ratio": ratio(samples["ours"], samples["ort"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--example", type=Path, help="copy the run's records and report into this folder")
    example = parser.parse_args().example
    with tempfile.TemporaryDirectory() as temporary:
        run = search(Path(temporary))
        for name in RECORDS if example else ():
            example.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(temporary) / "run" / name, example / name)
        kernels = tuning(Path(temporary))
    middle, low, high = kernels["ratio"]
    rows = [
        ["whole search, empty cache", f"{run['seconds']:.0f} s", "<= 360 s"],
        ["training the built-in model", f"{run['seconds_by_stage'].get('train digits', 0.0):.0f} s", "<= 90 s"],
        ["told / measured / failed", f"{run['told']} / {run['measured']} / {run['failed']}", ">= 300 / >= 16 / -"],
        ["peak memory", f"{run['peak_bytes'] / 1e9:.2f} GB", "< 3 GB"],
        ["slowest new fp32 kernel", f"{kernels['slowest_seconds']:.2f} s", "<= 3 s"],
        [f"all {kernels['kernels']} kernels of the dense model", f"{kernels['total_seconds']:.1f} s", "-"],
        ["trials of a second build", str(kernels["trials_second_build"]), "0"],
        ["dense fp32 time over ONNX Runtime's", f"{middle:.3f} ({low:.3f} to {high:.3f})", "<= 1"],
    ]
    publish(
        "main_job", ["what", ">measured", ">goal"], rows, {"run": run, "kernels": kernels}, load_profile("x86-host")
    )


if __name__ == "__main__":
    main()
