"""Under what a run was made: machine, versions, command, settings."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from autocomp.cache import write_atomically
from autocomp.config.addresses import masked
from autocomp.records.evaluation import FORMAT_VERSION
from autocomp.run.folder import PROVENANCE, study_bytes
from autocomp.run.prepare import Prepared

PACKAGES = ("autocomp", "torch", "apache-tvm", "apache-tvm-ffi", "onnxruntime", "optuna", "numpy")


def write_provenance(prepared: Prepared, written: int) -> Path:
    """Write what the numbers depend on: versions, processor, governor, seed, git, and the fits of the latency models.

    ``written`` is how often the run's results were, this time included: a study that knows of fewer is of an earlier time.
    """
    data = {
        "format_version": FORMAT_VERSION,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([Path(sys.argv[0]).name, *map(masked, sys.argv[1:])]),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": next(
            (d.profile.device for d in prepared.devices.values() if d.profile.device), platform.machine()
        ),
        "cpus": os.cpu_count(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "load_average": os.getloadavg()[0],
        "seed": prepared.settings.seed,
        "study_bytes": study_bytes(prepared.folder),
        "results_written": written,
        "git": _git(),
        "space_size": str(prepared.space.size),
        "kernels": {
            name: {
                "stored": len(device.store),
                "tuned_now": device.tuner.tuned,
                "trials_now": device.tuner.trials,
                "kernel_model_error": device.model.kernel_error,
                "module_model_error": device.model.module_error,
                "peak_per_second": device.model.peaks,
            }
            for name, device in prepared.devices.items()
        },
    }
    path = prepared.folder / PROVENANCE
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())
    return path


def profile_line(profile: Any) -> str:
    from autocomp.compiler.build import describe_device

    return f"{profile.description} ({describe_device(profile)})"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _git() -> str:
    """The commit of the working folder, with ``-dirty`` where it has changes; empty outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
