"""A shared library as an image that can be run: the very file that is handed over is emulated, one function at a time.

Segments are mapped as a loader would, dynamic relocations applied, undefined functions stubbed. Source: System V ABI (ELF-64), and its
supplement for the Arm 64-bit architecture for the relocations.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from autocomp.errors import ObjectError
from autocomp.estimate.emulator import run_image
from autocomp.estimate.objects import BASE, ENTRY, Image
from autocomp.estimate.stubs import stubs_of

_PAGE = 4096
_EXECUTABLE = 1  # PF_X
_ABSOLUTE, _GLOBAL, _JUMP, _RELATIVE = 257, 1025, 1026, 1027  # R_AARCH64_ABS64, GLOB_DAT, JUMP_SLOT, RELATIVE


class Library:
    """An AArch64 shared library that TVM exported. ObjectError names what it holds that is unknown."""

    def __init__(self, data: bytes) -> None:
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile

        try:
            elf: Any = ELFFile(io.BytesIO(data))
        except ELFError as error:
            raise ObjectError(f"not an ELF shared library ({error})") from error
        if elf["e_machine"] != "EM_AARCH64" or elf["e_type"] != "ET_DYN":
            raise ObjectError(f"not a shared library for AArch64 but {elf['e_type']} for {elf['e_machine']}")
        self.stubs = stubs_of("arm64")
        self.data = bytearray(self.stubs.code)
        self.symbols = elf.get_section_by_name(".dynsym")
        self.externals: dict[str, int] = {}
        self._stub_undefined()
        self.data += bytes(-len(self.data) % _PAGE)
        self.offset = len(self.data)
        self.code_end = self._map(elf)
        for name in (".rela.dyn", ".rela.plt"):
            for relocation in elf.get_section_by_name(name).iter_relocations() if elf.get_section_by_name(name) else ():
                self._relocate(relocation)
        self._point_at_stubs()

    def run(self, function: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Execute one exported function, as ``run_kernel`` does one of an object file."""
        found = self.symbols.get_symbol_by_name(ENTRY + function)
        if not found:
            raise ObjectError(f"the library exports no function {function}")
        workspace = BASE + self.stubs.offsets["workspace"]
        entry = self._address(found[0])
        image = Image("arm64", bytes(self.data), self.code_end, entry, dict(self.externals), workspace)
        return run_image(image, arrays)

    def _stub_undefined(self) -> None:
        self.data += bytes(-len(self.data) % 64)
        for symbol in self.symbols.iter_symbols():
            if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name and symbol.name not in self.stubs.offsets:
                self.externals[symbol.name] = BASE + len(self.data)
                self.data += self.stubs.returns

    def _map(self, elf: Any) -> int:
        """Copy the segments to their places; the end of the executable ones."""
        code_end = 0
        for segment in elf.iter_segments():
            if segment["p_type"] != "PT_LOAD":
                continue
            start, end = self.offset + segment["p_vaddr"], self.offset + segment["p_vaddr"] + segment["p_memsz"]
            self.data += bytes(max(0, end - len(self.data)))
            self.data[start : start + segment["p_filesz"]] = segment.data()
            if segment["p_flags"] & _EXECUTABLE:
                code_end = max(code_end, end)
        self.data += bytes(-len(self.data) % _PAGE)
        return BASE + code_end

    def _address(self, symbol: Any) -> int:
        if symbol["st_shndx"] != "SHN_UNDEF":
            return int(BASE + self.offset + symbol["st_value"])
        stub = self.stubs.offsets.get(symbol.name)
        return self.externals.get(symbol.name, 0) if stub is None else BASE + stub

    def _relocate(self, relocation: Any) -> None:
        kind, addend = relocation["r_info_type"], relocation["r_addend"]
        if kind == _RELATIVE:
            value = BASE + self.offset + addend
        elif kind in (_ABSOLUTE, _GLOBAL, _JUMP):
            value = self._address(self.symbols.get_symbol(relocation["r_info_sym"])) + addend
        else:
            raise ObjectError(f"unknown dynamic relocation number {kind} in the library: it cannot be emulated")
        self._put(self.offset + relocation["r_offset"], value)

    def _point_at_stubs(self) -> None:
        """TVM's code calls its runtime through variables (``__TVMBackendAllocWorkspace``) that the runtime fills in at the load."""
        for symbol in self.symbols.iter_symbols():
            stub = self.stubs.offsets.get(symbol.name.removeprefix("__"))
            if symbol.name.startswith("__") and stub is not None and symbol["st_shndx"] != "SHN_UNDEF":
                self._put(self._address(symbol) - BASE, BASE + stub)

    def _put(self, at: int, value: int) -> None:
        self.data[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")
