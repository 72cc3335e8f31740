"""Objects → shared library, with whatever linker there is: a C compiler, a bare linker, or the one in pip's ``ziglang``.

A library for another processor needs no compiler of that processor: TVM's objects call nothing of a C library by name that the
process which loads them would not have, so a bare linker is enough, and undefined symbols are bound at the load.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autocomp.errors import AutocompError

_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}  # as some systems spell the architectures of LLVM's triples
_EMULATION = {"aarch64": "aarch64linux", "x86_64": "elf_x86_64"}  # lld's and GNU ld's names of output formats


def this_architecture() -> str:
    """This machine's architecture as the first part of a triple: ``x86_64``, ``aarch64``."""
    return _NAMES.get(platform.machine().lower(), platform.machine().lower())


def architecture_of(target: Mapping[str, Any]) -> str:
    """The architecture that a TVM target's code is for; this machine's where its triple says nothing."""
    triple = str(target.get("mtriple", ""))
    return _NAMES.get(triple.partition("-")[0], triple.partition("-")[0]) or this_architecture()


def find_linker(architecture: str | None = None) -> list[str] | None:
    """The command that links a shared library for an architecture (None: this one), or None where this machine has none."""
    if architecture is not None and architecture != this_architecture():
        return _find_cross_linker(architecture)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path, "-shared", "-fPIC"]
    for name in ("ld", "ld.lld"):
        if path := shutil.which(name):
            return [path, "-shared"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "ld.lld", "-shared"]
    return None


def _find_cross_linker(architecture: str) -> list[str] | None:
    if path := shutil.which(f"{architecture}-linux-gnu-ld"):
        return [path, "-shared"]
    emulation = _EMULATION.get(architecture)
    if emulation is None:
        return None
    if path := shutil.which("ld.lld"):
        return [path, "-shared", "-m", emulation]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "ld.lld", "-shared", "-m", emulation]
    return None


def link_shared(output: str | Path, objects: Sequence[str | Path], options: Sequence[str] | None = None) -> None:
    """Link object files of this machine into ``output``. AutocompError says how to get a linker, or what the linker printed.

    Undefined symbols of TVM's runtime are left to be bound when the library is loaded.
    """
    _link(output, objects, this_architecture())


def linker_for(target: Mapping[str, Any]) -> Callable[..., None]:
    """What ``export_library`` of a module compiled for ``target`` links with; as ``link_shared``."""
    architecture = architecture_of(target)

    def link(output: str | Path, objects: Sequence[str | Path], options: Sequence[str] | None = None) -> None:
        _link(output, objects, architecture)

    # TVM asks the linker for the triple of the small object that it packs beside the code.
    link.get_target_triple = lambda: target.get("mtriple") or None  # type: ignore[attr-defined]  # where it is asked for
    return link


def _link(output: str | Path, objects: Sequence[str | Path], architecture: str) -> None:
    linker = find_linker(architecture)
    if linker is None and architecture == this_architecture():
        raise AutocompError(
            "no linker on this machine, so model.so cannot be written: install one with `pip install 'autocomp[linker]'`, "
            "or the system's binutils or gcc"
        )
    if linker is None:
        package = f"binutils-{architecture.replace('_', '-')}-linux-gnu"
        raise AutocompError(
            f"no linker for {architecture} on this machine, so code for the board cannot be linked: install one with "
            f"`pip install 'autocomp[linker]'`, or the system's {package} (Debian, Ubuntu) or lld"
        )
    command = [*linker, "-o", str(output), *map(str, objects)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AutocompError(
            f"linking {output} failed: {' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}"
        )
