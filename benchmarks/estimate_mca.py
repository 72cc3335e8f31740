"""The Cortex-A76's table against LLVM's model of the same pipeline: cycles an iteration of the hottest loops of our kernels.

`llvm-mca -mcpu=neoverse-n1` times a block of code repeated for ever, with every access in the first level and no branch missed; the estimator's
core model is given the same block under the same conditions. Two readings of the same guide by different people: where they agree, the
table is read right; it says nothing of caches, of branches, nor of what the guide leaves out.

    python benchmarks/estimate_mca.py [--mca llvm-mca-19]

Needs llvm-mca of LLVM 16 or newer (older ones reckon with a Cortex-A57 under that name).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Sequence

import numpy as np
from common import geometric_mean, publish
from estimate_validation import schedules

from autocomp.errors import UsageError
from autocomp.estimate import compile_object, core_of, load_image
from autocomp.estimate.core import simulate
from autocomp.estimate.decode import decode
from autocomp.estimate.emulator import count_blocks
from autocomp.estimate.instruction import Instruction
from autocomp.estimate.instructions import Core
from autocomp.estimate.objects import BASE
from autocomp.hardware.profile import load_profile

KERNELS = {
    "dense": [(96, 256, 128), (128, 768, 768)],
    "conv2d": [(14, 64, 64, 3, 1), (28, 32, 64, 1, 1)],
    "depthwise": [(28, 96, 3, 1)],
    "dense_int8": [(96, 256, 128)],
    "conv2d_int8": [(14, 64, 64, 3, 1)],
    "softmax": [(128, 196)],
    "layer_norm": [(96, 256)],
}
ITERATIONS = 200
OLDEST = 16  # LLVM's first release with a model of the Neoverse N1 [llvm/lib/Target/AArch64/AArch64SchedNeoverseN1.td]


def hottest_block(code: bytes, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[Instruction]:
    """The block of a kernel that most instructions are executed in."""
    image = load_image(code)
    counts = count_blocks(image, tensors, 1 << 40)
    at = int(np.argmax(counts.sizes * counts.counts))
    start, size = int(counts.starts[at]), int(counts.sizes[at])
    return decode(image.isa, image.data[start : start + size], BASE + start)


def ours(block: list[Instruction], core: Core) -> float:
    """Cycles an iteration, every access to a line of its own that is in the first level."""
    first = 0x4000_0000
    lines = {n: first + 64 * n for n, instruction in enumerate(block) if instruction.access}
    once = [(n, lines.get(n, -1), 1) for n in range(len(block))]
    warmed = [(first, first + 64 * len(block))]

    def cycles(times: int) -> int:
        return simulate(np.array(once * times, np.int64), block, core, warmed).cycles

    return (cycles(2 * ITERATIONS) - cycles(ITERATIONS)) / ITERATIONS


def theirs(block: list[Instruction], mca: str) -> float:
    """Cycles an iteration by llvm-mca."""
    lines = [re.sub(r"#0x[0-9a-f]+$", ".L1", i.text) if i.branch else i.text for i in block]
    command = [mca, "-mtriple=aarch64", "-mcpu=neoverse-n1", "-mattr=+dotprod,+fullfp16", f"-iterations={ITERATIONS}"]
    run = subprocess.run(command, input=".L1:\n" + "\n".join(lines), capture_output=True, text=True, check=True)
    found = re.search(r"Total Cycles:\s+(\d+)", run.stdout)
    assert found is not None, run.stdout[:500]
    return int(found[1]) / ITERATIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mca", default="llvm-mca", help="the program, of LLVM 16 or newer")
    arguments = parser.parse_args()
    if shutil.which(arguments.mca) is None:
        raise UsageError(
            f"{arguments.mca} is not there: install LLVM's tools (Debian: apt install llvm-19) and name it with --mca"
        )
    said = subprocess.run([arguments.mca, "--version"], capture_output=True, text=True, check=True).stdout
    version = int(re.findall(r"version (\d+)", said)[0])
    if version < OLDEST:
        raise UsageError(
            f"llvm-mca {version} has no model of the Neoverse N1, {OLDEST} or newer has: name another with --mca"
        )
    profile = load_profile("cortex-a76")
    core = core_of(profile)
    rows, ratios, data = [], [], []
    for schedule in schedules(KERNELS, profile):
        block = hottest_block(compile_object(schedule.function, profile.target), schedule.tensors)
        mine, other = ours(block, core), theirs(block, arguments.mca)
        unknown = sorted({i.text.split()[0] for i in block if not core.timing(i).known})
        ratios.append(mine / other)
        rows.append([schedule.name, str(len(block)), f"{mine:.1f}", f"{other:.1f}", f"{mine / other:.2f}"])
        data.append(
            {"name": schedule.name, "instructions": len(block), "ours": mine, "llvm_mca": other, "unknown": unknown}
        )
    median, worst = float(np.median(np.abs(np.array(ratios) - 1))), max(ratios, key=lambda ratio: abs(np.log(ratio)))
    rows.append(["geometric mean", "", "", "", f"{geometric_mean(ratios):.2f}"])
    publish(
        "estimate_mca",
        ["hottest block of", ">instructions", ">core model", f">llvm-mca {version}", ">ratio"],
        rows,
        {"llvm": version, "blocks": data, "median_difference": median, "worst_ratio": worst},
        profile,
        [
            f"Cycles an iteration on a Cortex-A76, estimated by both; they differ by {100 * median:.1f} % at the median, the worst ratio is "
            f"{worst:.2f}.",
            "A ratio of 0.50 is a loop of one chain of additions into the same register: Arm's guide forwards the accumulator after 2 "
            "(fmla) or 1 cycles (sdot), LLVM's model waits for the full 4 or 3. llvm-mca follows no store to a load.",
        ],
    )


if __name__ == "__main__":
    main()
