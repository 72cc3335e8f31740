"""Objects → shared library, with whatever linker there is: a C compiler, a bare linker, or the one in pip's ``ziglang``."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from autocomp.errors import AutocompError


def find_linker() -> list[str] | None:
    """The command that links a shared library, or None where this machine has none."""
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path, "-shared", "-fPIC"]
    for name in ("ld", "ld.lld"):
        if path := shutil.which(name):
            return [path, "-shared"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "ld.lld", "-shared"]
    return None


def link_shared(output: str | Path, objects: Sequence[str | Path], options: Sequence[str] | None = None) -> None:
    """Link object files into ``output``. AutocompError says how to get a linker, or what the linker printed.

    Undefined symbols of TVM's runtime are left to be bound when the library is loaded.
    """
    linker = find_linker()
    if linker is None:
        raise AutocompError(
            "no linker on this machine, so model.so cannot be written: install one with `pip install 'autocomp[linker]'`, "
            "or the system's binutils or gcc"
        )
    command = [*linker, "-o", str(output), *map(str, objects)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AutocompError(
            f"linking {output} failed: {' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}"
        )
