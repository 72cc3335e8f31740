"""A kernel's object file as an image that can be run: sections laid out, relocations applied, undefined functions stubbed.

No linker is needed: TVM's objects hold one function, its constants and a few weak symbols. Source: System V ABI (ELF-64).
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autocomp.errors import ObjectError
from autocomp.estimate.relocations import TABLES, THROUGH_GOT
from autocomp.estimate.stubs import stubs_of

BASE = 0x1000_0000  # where the image is loaded
_PAGE = 4096
_ALLOCATED, _EXECUTABLE = 2, 4  # section flags SHF_ALLOC and SHF_EXECINSTR
_MACHINES = {"EM_AARCH64": "arm64", "EM_X86_64": "x86-64"}
_MORE_NAMES = {"arm64": {299: "R_AARCH64_LDST128_ABS_LO12_NC"}}  # which the ELF library does not list
ENTRY = "__tvm_ffi_"  # TVM FFI's prefix of an exported function
_STUB = 16  # bytes of the stub of an undefined function


@dataclass(frozen=True)
class Image:
    """An object file in memory at ``BASE``.

    Code lies in [``BASE``, ``code_end``), stubs first; ``entry`` is the address of the kernel; ``externals`` the addresses of the
    stubs of undefined functions by name; ``workspace`` the address of the pointer to free workspace.
    """

    isa: str
    data: bytes
    code_end: int
    entry: int
    externals: Mapping[str, int]
    workspace: int


def compile_object(function: Any, target: Any) -> bytes:
    """The object file that TVM compiles a scheduled PrimFunc to, without a file on disk. ``target`` is a TVM target or its dict."""
    import tvm
    from tvm.target import Target

    if not isinstance(target, Target):
        target = Target(dict(target))
    executable = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=target)
    memory = os.memfd_create("kernel")
    try:
        executable.mod.write_to_file(f"/proc/self/fd/{memory}", "o")
        return os.pread(memory, os.fstat(memory).st_size, 0)
    finally:
        os.close(memory)


def load_image(object_bytes: bytes) -> Image:
    """Lay out and relocate an object file. ObjectError names what it holds that is unknown (machine, relocation, entry)."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        return _Loader(ELFFile(io.BytesIO(object_bytes))).image()
    except ELFError as error:
        raise ObjectError(f"not an ELF object file ({error}): give the bytes of the .o that TVM writes") from error


class _Loader:
    def __init__(self, elf: Any) -> None:
        machine = elf["e_machine"]
        if machine not in _MACHINES:
            raise ObjectError(f"the object file is for {machine}; known: {', '.join(_MACHINES)}")
        self.isa = _MACHINES[machine]
        self.sections = list(elf.iter_sections())
        self.symbols = elf.get_section_by_name(".symtab")
        self.stubs = stubs_of(self.isa)
        self.data = bytearray(self.stubs.code)
        self.addresses: dict[int, int] = {}  # of sections
        self.externals: dict[str, int] = {}
        self.values: dict[int, int] = {}  # of symbols
        self.got: dict[int, int] = {}

    def image(self) -> Image:
        loaded = [
            (index, section)
            for index, section in enumerate(self.sections)
            if section["sh_flags"] & _ALLOCATED and section["sh_size"] and section.name != ".eh_frame"
        ]
        self._stub_undefined()
        for index, section in loaded:
            if section["sh_flags"] & _EXECUTABLE:
                self._place(index, section)
        code_end = BASE + len(self.data)
        self._align(_PAGE)
        for index, section in loaded:
            if not section["sh_flags"] & _EXECUTABLE:
                self._place(index, section)
        self._align(_PAGE)
        for section in self.sections:
            if section["sh_type"] in ("SHT_RELA", "SHT_REL") and section["sh_info"] in self.addresses:
                self._relocate(section)
        self._point_at_stubs()
        workspace = BASE + self.stubs.offsets["workspace"]
        return Image(self.isa, bytes(self.data), code_end, self._entry(), dict(self.externals), workspace)

    def _stub_undefined(self) -> None:
        self._align(64)
        for index in range(1, self.symbols.num_symbols()):
            symbol = self.symbols.get_symbol(index)
            if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name not in self.stubs.offsets:
                self.externals[symbol.name] = BASE + len(self.data)
                self.data += self.stubs.returns

    def _place(self, index: int, section: Any) -> None:
        self._align(max(16, section["sh_addralign"]))
        self.addresses[index] = BASE + len(self.data)
        self.data += bytes(section["sh_size"]) if section["sh_type"] == "SHT_NOBITS" else section.data()

    def _align(self, size: int) -> None:
        self.data += bytes(-len(self.data) % size)

    def _value(self, index: int) -> int:
        if index not in self.values:
            symbol = self.symbols.get_symbol(index)
            where = symbol["st_shndx"]
            if where == "SHN_UNDEF":
                stub = self.stubs.offsets.get(symbol.name)
                self.values[index] = self.externals.get(symbol.name, 0) if stub is None else BASE + stub
            elif where == "SHN_ABS":
                self.values[index] = symbol["st_value"]
            else:
                self.values[index] = self.addresses.get(where, 0) + symbol["st_value"]
        return self.values[index]

    def _relocate(self, section: Any) -> None:
        from elftools.elf.enums import ENUM_RELOC_TYPE_AARCH64, ENUM_RELOC_TYPE_x64

        numbers = ENUM_RELOC_TYPE_AARCH64 if self.isa == "arm64" else ENUM_RELOC_TYPE_x64
        names = {number: name for name, number in numbers.items()} | _MORE_NAMES.get(self.isa, {})
        base = self.addresses[section["sh_info"]]
        for relocation in section.iter_relocations():
            name = names.get(relocation["r_info_type"], f"number {relocation['r_info_type']}")
            apply = TABLES[self.isa].get(name)
            if apply is None or not relocation.is_RELA():
                raise ObjectError(
                    f"unknown relocation {name} at {self.sections[section['sh_info']].name}+{relocation['r_offset']:#x}: "
                    "the kernel cannot be emulated; compile it with other options or measure it on a board"
                )
            value = self._value(relocation["r_info_sym"])
            if name in THROUGH_GOT:  # which is filled as needed, after everything else
                value = self._got_entry(relocation["r_info_sym"], value)
            place = base + relocation["r_offset"]
            apply(self.data, place - BASE, place, value + relocation["r_addend"])

    def _got_entry(self, symbol: int, value: int) -> int:
        if symbol not in self.got:
            self.got[symbol] = BASE + len(self.data)
            self.data += value.to_bytes(8, "little")
        return self.got[symbol]

    def _point_at_stubs(self) -> None:
        """TVM's objects call their runtime through variables (``__TVMBackendAllocWorkspace``) that a loader fills in."""
        for index in range(1, self.symbols.num_symbols()):
            symbol = self.symbols.get_symbol(index)
            stub = self.stubs.offsets.get(symbol.name.removeprefix("__"))
            if symbol.name.startswith("__") and stub is not None and symbol["st_shndx"] != "SHN_UNDEF":
                at = self._value(index) - BASE
                self.data[at : at + 8] = (BASE + stub).to_bytes(8, "little")

    def _entry(self) -> int:
        found = {}
        for index in range(1, self.symbols.num_symbols()):
            symbol = self.symbols.get_symbol(index)
            if symbol.name.startswith(ENTRY) and symbol["st_info"]["type"] == "STT_FUNC":
                found[symbol.name] = self._value(index)
        if len(found) != 1:
            raise ObjectError(
                f"the object file must hold one function {ENTRY}*, found: {', '.join(sorted(found)) or 'none'}"
            )
        return int(next(iter(found.values())))
