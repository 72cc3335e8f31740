"""A Cortex-A76 board that is a process: Debian's arm64 Python and TVM's arm64 runtime under qemu's user-mode emulation.

Everything comes from the registries, once, into the user's cache: about 15 MB of Debian packages, chosen and checked by apt as on
an arm64 machine that has none, and 115 MB of wheels that pip picks for arm64. qemu raises SIGILL at instructions that the named
processor lacks, so a wrong target feature shows. Times under emulation mean nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

QEMU = "qemu-aarch64"
RELEASE = "bookworm"  # its Python is 3.11
# What a board installs (docs/boards.md), and what those need. The same TVM and ffi as here; of the rest, what fits them.
PINNED = ("apache-tvm", "apache-tvm-ffi")
OTHERS = ("numpy>=2", "ml_dtypes", "typing_extensions", "cloudpickle", "psutil", "tornado")
DEBIAN = ("python3.11-minimal", "libpython3.11-stdlib", "libstdc++6", "libgcc-s1")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_24_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")

_PYTHON = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
export TVM_USE_RUNTIME_LIB=1 PYTHONHOME="$here/sysroot/usr" PYTHONPATH="$here/site" BOARD_PYTHON="$here/python"
exec {qemu} -cpu "${{BOARD_CPU:-cortex-a76}}" -L "$here/sysroot" "$here/sysroot/usr/bin/python3.11" "$@"
"""
# TVM starts workers with sys.executable, which would be the arm64 file that this machine cannot run by itself.
_SITE = "import os, sys\nsys.executable = os.environ['BOARD_PYTHON']\n"


class MissingPiece(Exception):
    """What is not installed here, and how to get it."""


def assemble(cache: Path | None = None) -> Path:
    """Return the folder with ``python`` (the emulated interpreter) and ``site``; downloads it once. MissingPiece, RuntimeError."""
    for tool, package in ((QEMU, "qemu-user"), ("apt-get", "apt"), ("dpkg", "dpkg")):
        if shutil.which(tool) is None:
            raise MissingPiece(
                f"no {tool} on the PATH, which the emulated board needs: `apt-get install {package}` (Debian, Ubuntu), "
                "or leave these tests out (they are out unless asked for with `-m board`)"
            )
    wanted = [*(f"{name}=={version(name)}" for name in PINNED), *OTHERS]
    recipe = repr((RELEASE, DEBIAN, wanted, _PYTHON, _SITE))
    name = f"emulated-board-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}"
    home = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autocomp"
    board = home / name
    if not (board / "python").exists():
        making = home / f"{name}.{os.getpid()}"
        try:
            _unpack_debian(making)
            _unpack_wheels(making, wanted)
            (making / "site" / "sitecustomize.py").write_text(_SITE)
            python = making / "python"
            python.write_text(_PYTHON.format(qemu=QEMU))
            python.chmod(0o755)
            if not board.exists():
                making.rename(board)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return board


def runtime_library(board: Path) -> Path:
    return board / "site" / "tvm" / "lib" / "libtvm_runtime_extra.so"


def _unpack_debian(folder: Path) -> None:
    """Let apt choose, fetch and check packages as on an arm64 machine with none installed; then unpack them."""
    apt = folder / "apt"
    for part in ("state/lists/partial", "cache/archives/partial", "sysroot"):
        (apt / part).mkdir(parents=True)
    (apt / "state" / "status").touch()
    (apt / "sources.list").write_text(f"deb {_signed_by()}http://deb.debian.org/debian {RELEASE} main\n")
    options = {
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "state" / "status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
    }
    command = ["apt-get", "-qq", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    _run([*command, "update"])
    _run([*command, "install", "--download-only", "--yes", *DEBIAN])
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(folder / "sysroot")])
    shutil.rmtree(apt)


def _signed_by() -> str:
    """Debian's own keys where the system keeps them apart from apt's trusted ones (not on Debian itself)."""
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if keyring.exists():
        return f"[signed-by={keyring}] "
    raise MissingPiece("Debian's keys are not here: `apt-get install debian-archive-keyring`")


def _unpack_wheels(folder: Path, wanted: list[str]) -> None:
    wheels, site = folder / "wheels", folder / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(wheels),
    ]
    command += [
        "--python-version",
        "3.11",
        "--implementation",
        "cp",
        "--abi",
        "cp311",
        "--abi",
        "abi3",
        "--abi",
        "none",
    ]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    _run([*command, *wanted])
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:
            # the compiler is most of TVM's wheel, and a board has no use for it
            file.extractall(site, [name for name in file.namelist() if not name.endswith("libtvm_compiler.so")])
    shutil.rmtree(wheels)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-2000:]}")
