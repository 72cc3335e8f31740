"""How each relocation of an object file is applied, by name. Source: ELF for the Arm 64-bit Architecture (aaelf64), tables 4-6 to 4-17."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence

# (image, offset of the place, address of the place, symbol + addend); for GOT relocations the third is the address of the entry
_Apply = Callable[[MutableSequence[int], int, int, int], None]


def _word(data: MutableSequence[int], at: int) -> int:
    return int.from_bytes(bytes(data[at : at + 4]), "little")


def _put(data: MutableSequence[int], at: int, value: int, size: int = 4) -> None:
    data[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _pages(data: MutableSequence[int], at: int, place: int, value: int) -> None:
    """ADRP: distance in pages of 4 KiB, 21 bits in two fields."""
    distance = (value >> 12) - (place >> 12)
    _put(data, at, (_word(data, at) & 0x9F00001F) | ((distance & 3) << 29) | (((distance >> 2) & 0x7FFFF) << 5))


def _address(data: MutableSequence[int], at: int, place: int, value: int) -> None:
    """ADR: distance in bytes, 21 bits in two fields."""
    distance = value - place
    _put(data, at, (_word(data, at) & 0x9F00001F) | ((distance & 3) << 29) | (((distance >> 2) & 0x7FFFF) << 5))


def _low12(scale: int) -> _Apply:
    """The low 12 bits of an address, in units of ``2 ** scale`` bytes (ADD, and loads and stores of that size)."""

    def apply(data: MutableSequence[int], at: int, place: int, value: int) -> None:
        _put(data, at, (_word(data, at) & ~(0xFFF << 10)) | (((value & 0xFFF) >> scale) << 10))

    return apply


def _branch(bits: int, shift: int) -> _Apply:
    """A distance in words, ``bits`` wide, at bit ``shift`` of the instruction."""

    def apply(data: MutableSequence[int], at: int, place: int, value: int) -> None:
        mask = (1 << bits) - 1
        _put(data, at, (_word(data, at) & ~(mask << shift)) | ((((value - place) >> 2) & mask) << shift))

    return apply


def _absolute(size: int) -> _Apply:
    return lambda data, at, place, value: _put(data, at, value, size)


def _relative(size: int) -> _Apply:
    return lambda data, at, place, value: _put(data, at, value - place, size)


_ARM64: Mapping[str, _Apply] = {
    "R_AARCH64_ABS64": _absolute(8),
    "R_AARCH64_ABS32": _absolute(4),
    "R_AARCH64_PREL64": _relative(8),
    "R_AARCH64_PREL32": _relative(4),
    "R_AARCH64_LD_PREL_LO19": _branch(19, 5),
    "R_AARCH64_ADR_PREL_LO21": _address,
    "R_AARCH64_ADR_PREL_PG_HI21": _pages,
    "R_AARCH64_ADR_PREL_PG_HI21_NC": _pages,
    "R_AARCH64_ADD_ABS_LO12_NC": _low12(0),
    "R_AARCH64_LDST8_ABS_LO12_NC": _low12(0),
    "R_AARCH64_LDST16_ABS_LO12_NC": _low12(1),
    "R_AARCH64_LDST32_ABS_LO12_NC": _low12(2),
    "R_AARCH64_LDST64_ABS_LO12_NC": _low12(3),
    "R_AARCH64_LDST128_ABS_LO12_NC": _low12(4),
    "R_AARCH64_TSTBR14": _branch(14, 5),
    "R_AARCH64_CONDBR19": _branch(19, 5),
    "R_AARCH64_JUMP26": _branch(26, 0),
    "R_AARCH64_CALL26": _branch(26, 0),
    "R_AARCH64_ADR_GOT_PAGE": _pages,
    "R_AARCH64_LD64_GOT_LO12_NC": _low12(3),
}

# Source: System V ABI, AMD64 supplement, table 4.9.
_X86_64: Mapping[str, _Apply] = {
    "R_X86_64_64": _absolute(8),
    "R_X86_64_32": _absolute(4),
    "R_X86_64_32S": _absolute(4),
    "R_X86_64_PC32": _relative(4),
    "R_X86_64_PC64": _relative(8),
    "R_X86_64_PLT32": _relative(4),
    "R_X86_64_GOTPCREL": _relative(4),
    "R_X86_64_GOTPCRELX": _relative(4),
    "R_X86_64_REX_GOTPCRELX": _relative(4),
}

TABLES: Mapping[str, Mapping[str, _Apply]] = {"arm64": _ARM64, "x86-64": _X86_64}

# Those whose value is the address of the symbol's entry in the global offset table.
THROUGH_GOT = frozenset(
    {
        *("R_AARCH64_ADR_GOT_PAGE", "R_AARCH64_LD64_GOT_LO12_NC"),
        *("R_X86_64_GOTPCREL", "R_X86_64_GOTPCRELX", "R_X86_64_REX_GOTPCRELX"),
    }
)
