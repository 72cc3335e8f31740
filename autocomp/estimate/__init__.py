"""Latency of a kernel on a core that is not there: its object file is emulated and timed on a model of the core."""

from autocomp.estimate.emulator import run_kernel
from autocomp.estimate.instructions import Core, core_of, list_cores, load_core
from autocomp.estimate.kernel import KernelEstimate, estimate_kernel
from autocomp.estimate.objects import compile_object, load_image

__all__ = [
    "Core", "KernelEstimate", "compile_object", "core_of", "estimate_kernel", "list_cores", "load_core", "load_image", "run_kernel",
]  # fmt: skip
