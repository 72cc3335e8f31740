"""Linking for another processor: which linker is taken, what it makes, and what is said where there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from autocomp.errors import AutocompError
from autocomp.hardware import link
from autocomp.hardware.profile import load_profile

A76 = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}
HEADER = {"aarch64": 183, "x86_64": 62}  # e_machine of an ELF file


def only(*names: str) -> Callable[[str], str | None]:
    return lambda name: f"/bin/{name}" if name in names else None


@pytest.mark.parametrize(
    ("there", "command"),
    [
        (("aarch64-linux-gnu-ld", "ld.lld", "cc"), ["/bin/aarch64-linux-gnu-ld", "-shared"]),
        (("ld.lld", "ld", "cc"), ["/bin/ld.lld", "-shared", "-m", "aarch64linux"]),
        (("cc", "ld"), [sys.executable, "-m", "ziglang", "ld.lld", "-shared", "-m", "aarch64linux"]),
    ],
)
def test_which_linker(monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], command: list[str]) -> None:
    monkeypatch.setattr(link, "this_architecture", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", only(*there))
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: object())
    assert link.find_linker("aarch64") == command
    assert link.find_linker("x86_64") == link.find_linker()


def test_a_board_that_is_this_machine_needs_no_cross_linker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "this_architecture", lambda: "aarch64")
    monkeypatch.setattr(shutil, "which", only("cc"))
    assert link.find_linker("aarch64") == ["/bin/cc", "-shared", "-fPIC"]


def test_no_linker_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(link, "this_architecture", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", only("cc", "ld"))
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: None)
    words = r"no linker for aarch64 .*autocomp\[linker\].*binutils-aarch64-linux-gnu"
    with pytest.raises(AutocompError, match=words):
        link.linker_for(A76)(tmp_path / "a.so", [tmp_path / "a.o"])
    assert link.find_linker("riscv64") is None


@pytest.mark.parametrize(
    "there",
    [
        (),
        ("cc",),
        ("gcc", "ld"),
        ("clang", "aarch64-linux-gnu-ld"),
        ("aarch64-linux-gnu-ld",),
        ("ld.lld",),
        ("cc", "x86_64-linux-gnu-ld"),
    ],
)
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_make_brings_a_linker_where_one_is_lacking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, there: tuple[str, ...]
) -> None:
    """The Makefile must ask for ziglang on exactly the machines on which the package would find no linker without it."""
    monkeypatch.setattr(link, "this_architecture", lambda: machine)
    monkeypatch.setattr(shutil, "which", only(*there))
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: None)
    lacking = any(link.find_linker(architecture) is None for architecture in (machine, "aarch64"))
    monkeypatch.undo()
    for name, text in {**dict.fromkeys(there, "exit 1"), "uname": f"echo {machine}"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    make = shutil.which("make")
    assert make is not None
    arguments = [make, "-s", "-f", str(ROOT / "Makefile"), "--eval", "extra: ; @:$(info $(EXTRA))", "extra"]
    environment = {"PATH": str(tmp_path), "PYTHON": "python3"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("[linker]" if lacking else "")


def test_architectures() -> None:
    assert link.architecture_of(A76) == "aarch64"
    assert link.architecture_of({"mtriple": "arm64-linux-gnu"}) == "aarch64"
    assert link.architecture_of(load_profile("x86-host").target) == link.this_architecture()


@pytest.mark.board
def test_a_cross_compiled_kernel_is_the_boards_code(tmp_path: Path) -> None:
    if link.find_linker("aarch64") is None:
        pytest.fail(
            "no linker for aarch64: `pip install 'autocomp[linker]'`, or `apt-get install binutils-aarch64-linux-gnu`"
        )
    import tvm
    from tvm import te

    from autocomp.devices.boards import temporary_library

    source = te.placeholder((64,), "float32", name="source")
    doubled = te.create_prim_func([source, te.compute((64,), lambda i: source[i] * 2.0)])
    targets: dict[str, dict[str, Any]] = {"aarch64": A76, "x86_64": {"kind": "llvm", "mcpu": "x86-64-v3"}}
    for architecture, target in targets.items():
        if architecture != "aarch64" and architecture != link.this_architecture():
            continue
        executable = tvm.compile(tvm.IRModule({"main": doubled}), tvm.target.Target(target))
        library = temporary_library(executable, target)
        assert library[:4] == b"\x7fELF"
        assert int.from_bytes(library[18:20], "little") == HEADER[architecture]
