"""One instruction of a kernel as a record: what it reads and writes, what memory it touches, and its form for the instruction table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

FLAGS = 32  # number of the condition flags; 0 to 31 are integer registers and 40 to 71 vector registers
VECTOR = 40
REGISTERS = 96
NO_ACCESS, LOAD, STORE, LOAD_AND_STORE = 0, 1, 2, 3


@dataclass(frozen=True)
class Instruction:
    """One instruction at an address.

    ``reads`` are registers its operation needs, ``address_reads`` those of its address; ``written_back`` is a base register that
    it also updates, ``accumulator`` one it adds to (-1: none). ``accessed`` is in bytes, ``emulated`` those that its stand-in in the
    emulator touches; ``eliminated`` marks what renaming does.
    """

    address: int
    length: int
    text: str
    form: str
    reads: tuple[int, ...] = ()
    address_reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    written_back: int = -1
    accumulator: int = -1
    access: int = NO_ACCESS
    accessed: int = 0
    branch: bool = False
    eliminated: bool = False
    emulated: int = 0


def distinct(registers: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(register for register in registers if register >= 0))


@cache
def disassembler(isa: str) -> Any:
    import capstone

    if isa == "arm64":
        engine = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
    else:
        engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    engine.detail = True
    return engine
