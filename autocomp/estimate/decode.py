"""Instructions of a kernel as records: what each reads and writes, what memory it touches, and its form for the instruction table.

The form is the mnemonic and the kinds of its operands (``fmla v.4s,v.4s,v.s[]``), which is all that timing depends on.
"""

from __future__ import annotations

from autocomp.estimate.arm64 import decode_arm64
from autocomp.estimate.instruction import (
    Instruction,
)
from autocomp.estimate.x86 import decode_x86


def decode(isa: str, code: bytes, address: int) -> list[Instruction]:
    """Decode a block of code that starts at an address."""
    if isa == "arm64":
        return decode_arm64(code, address)
    return decode_x86(code, address)
