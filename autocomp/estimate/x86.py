"""x86-64 for the estimate: decoding, and stand-ins for vector instructions in the emulator, which has none newer than SSE.

Only what a kernel does besides vector arithmetic decides where it runs and reads, so a stand-in need only touch the same memory: an x87
addition reads it and changes nothing else, an x87 store writes it. Source: Intel 64 and IA-32 Architectures Software
Developer's Manual, volume 2, 2.1 (formats), 2.3 (VEX), 2.7 (EVEX).
"""

from __future__ import annotations

import re
from typing import Any

from autocomp.errors import ObjectError
from autocomp.estimate.instruction import (
    FLAGS,
    LOAD,
    LOAD_AND_STORE,
    NO_ACCESS,
    STORE,
    Instruction,
    disassembler,
    distinct,
)

VECTOR, _MASK = 40, 80  # numbers of zmm0 and k0
_INTEGER = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")  # in the order of their encodings
_TOUCHED = 4  # bytes that a stand-in reads or writes
_MERGING = re.compile(r"vf[n]?m(add|sub)\w*|vpdp\w+|vpternlog\w|vperm[it]2\w+|vpmadd52\w+")
_PREFIX = 0x3E  # a segment override that 64-bit mode ignores: fills a shorter encoding up to the old length


def decode_x86(code: bytes, address: int) -> list[Instruction]:
    """Decode a block of x86-64 code; a byte that is no instruction gets the form ``undefined``."""
    found: list[Instruction] = []
    at = 0
    while at < len(code):
        raw = next(disassembler("x86-64").disasm(code[at : at + 16], address + at, 1), None)
        if raw is None:
            found.append(Instruction(address + at, 1, code[at : at + 1].hex(), "undefined"))
            at += 1
            continue
        found.append(_instruction(raw, found[-1] if found else None))
        at += raw.size
    return found


def stand_in(code: bytes, address: int) -> bytes:
    """Code of the same length in which no vector instruction is left. ObjectError names one that has no stand-in."""
    out = bytearray(code)
    at = 0
    while at < len(code):
        raw = next(disassembler("x86-64").disasm(code[at : at + 16], address + at, 1), None)
        if raw is None:
            at += 1
            continue
        if _is_vector(raw):
            out[at : at + raw.size] = _replacement(raw)
        at += raw.size
    return bytes(out)


def _instruction(raw: Any, before: Instruction | None) -> Instruction:
    import capstone

    mnemonic = raw.mnemonic.removeprefix("notrack ")
    operands = raw.operands
    memory = next((op for op in operands if op.type == capstone.x86.X86_OP_MEM), None)
    read, written = ([_register(raw.reg_name(r)) for r in group] for group in raw.regs_access())
    registers = [_register(raw.reg_name(op.reg)) for op in operands if op.type == capstone.x86.X86_OP_REG]
    merges = _MERGING.fullmatch(mnemonic) or ("{k" in raw.op_str and "{z}" not in raw.op_str)
    if merges:
        read += registers
    elif mnemonic.startswith("v") and operands and operands[0].type == capstone.x86.X86_OP_REG:
        # the disassembler says of some loads that they read their target
        read = [register for register in read if register != registers[0] or register in registers[1:]]
    access, accessed = _access(mnemonic, memory, bool(operands) and operands[0].type == capstone.x86.X86_OP_MEM)
    address = []
    if memory is not None and access:
        address = [_register(raw.reg_name(r)) for r in (memory.mem.base, memory.mem.index) if r]
        read = [register for register in read if register not in address or register in registers]
    elif mnemonic in ("push", "pop", "call", "ret"):
        address = [_register("rsp")]
    form = f"{mnemonic} {_form(raw)}".strip()
    zero = re.fullmatch(r"v?p?xor\w*|sub|vpsub\w", mnemonic) is not None and not access
    eliminated = zero and len(set(registers[-2:])) == 1 and len(registers) >= 2
    if eliminated:
        read = []
    moves = re.fullmatch(r"mov|v?mov[au]p[sd]|v?movdq[au]\d*", mnemonic) is not None
    eliminated = eliminated or (moves and not access and len(registers) == 2 and "r8" not in form)
    if (
        mnemonic.startswith("j")
        and before is not None
        and re.match(r"(cmp|test|sub|add|inc|dec|and|or|xor) ", before.form)
    ):
        form = f"fused {mnemonic}"  # with the instruction before it, into one macro-operation
    emulated = accessed if access != LOAD_AND_STORE else 2 * accessed
    if _is_vector(raw):
        gather = memory is not None and re.match(r"[xyz]mm", raw.reg_name(memory.mem.index) or "")
        emulated = 0 if gather or not access else _TOUCHED
    groups = set(raw.groups)
    return Instruction(
        raw.address,
        raw.size,
        f"{raw.mnemonic} {raw.op_str}".strip(),
        form,
        reads=distinct(read),
        address_reads=distinct(address),
        writes=distinct(written + ([] if access == STORE else registers[:1] * mnemonic.startswith("v"))),
        access=access,
        accessed=accessed,
        emulated=emulated,
        branch=bool(groups & {capstone.CS_GRP_JUMP, capstone.CS_GRP_RET, capstone.CS_GRP_CALL}),
        eliminated=eliminated,
    )


def _access(mnemonic: str, memory: Any, first: bool) -> tuple[int, int]:
    """(kind of access, bytes); ``first``: the operand in memory is the first, where the result goes."""
    import capstone

    if mnemonic in ("push", "call"):
        return STORE, 8
    if mnemonic in ("pop", "ret"):
        return LOAD, 8
    if memory is None or mnemonic.startswith(("lea", "nop", "prefetch", "data16")):
        return NO_ACCESS, 0
    if mnemonic.startswith(
        ("v", "k")
    ):  # of which the disassembler says that stores read: where the operand stands decides
        return (STORE if first else LOAD), memory.size
    reads, writes = memory.access & capstone.CS_AC_READ, memory.access & capstone.CS_AC_WRITE
    if mnemonic in ("cmp", "test") or not writes:
        return LOAD, memory.size
    return (LOAD_AND_STORE if reads and not mnemonic.startswith("mov") else STORE), memory.size


def _form(raw: Any) -> str:
    """Kinds of operands: registers by width, memory by its bytes."""
    import capstone

    kinds = []
    for op in raw.operands:
        if op.type == capstone.x86.X86_OP_MEM:
            kinds.append(f"m{op.size}")
        elif op.type == capstone.x86.X86_OP_IMM:
            kinds.append("i")
        else:
            name = raw.reg_name(op.reg)
            vector = re.match(r"[xyz]mm", name)
            kinds.append(vector[0] if vector else "k" if re.fullmatch(r"k\d", name) else f"r{8 * op.size}")
    return ",".join(kinds)


def _register(name: str) -> int:
    """One number for all widths of a register; -1 for those that do not matter."""
    if name in ("rflags", "eflags", "flags"):
        return FLAGS
    if match := re.fullmatch(r"[xyz]mm(\d+)", name):
        return VECTOR + int(match[1])
    if match := re.fullmatch(r"k(\d)", name):
        return _MASK + int(match[1])
    if match := re.fullmatch(r"r(\d+)[dwb]?", name):
        return int(match[1])
    stem = name.removeprefix("r").removeprefix("e") if len(name) == 3 and name[2] not in "l" else name.removesuffix("l")
    if stem in _INTEGER:
        return _INTEGER.index(stem)
    if match := re.fullmatch(r"([abcd])[lh]?", stem):
        return _INTEGER.index(f"{match[1]}x")
    return -1


def _is_vector(raw: Any) -> bool:
    """Whether an instruction is encoded with VEX or EVEX and not one of the integer ones that share VEX (shlx, bextr, ...)."""
    if raw.bytes[0] not in (0xC4, 0xC5, 0x62):
        return False
    result: bool = raw.mnemonic.startswith("v") or raw.mnemonic.startswith("k")
    return result


def _replacement(raw: Any) -> bytes:
    import capstone

    memory = next((op for op in raw.operands if op.type == capstone.x86.X86_OP_MEM), None)
    if memory is not None and not re.match(r"[xyz]mm", raw.reg_name(memory.mem.index) or ""):
        store = _access(raw.mnemonic, memory, raw.operands[0].type == capstone.x86.X86_OP_MEM)[0] == STORE
        new = _touch(raw, memory.mem, store)
    elif raw.mnemonic in ("vptest", "kortestb", "kortestw", "kortestd", "kortestq", "vtestps"):
        new = b"\x39\xc0"  # cmp eax, eax: of zeros, which all data are, the answer is zero
    elif raw.mnemonic in ("vucomiss", "vcomiss", "vucomisd", "vcomisd"):
        raise ObjectError(f"{raw.mnemonic} decides where the kernel goes by its data: it is not estimated")
    else:
        number = -1
        if raw.operands and raw.operands[0].type == capstone.x86.X86_OP_REG:
            number = _register(raw.reg_name(raw.operands[0].reg))
        # xor of the register with itself: data are zeros
        new = bytes(([0x45] if number > 7 else []) + [0x31, 0xC0 | (number & 7) * 9]) if 0 <= number < 16 else b""
    if len(new) > raw.size:
        raise ObjectError(f"no stand-in for {raw.mnemonic} {raw.op_str} in {raw.size} bytes")
    new = new or b"\x90"  # one no-operation, as a block of the emulator may end between two
    result: bytes = bytes([_PREFIX]) * (raw.size - len(new)) + new
    return result


def _touch(raw: Any, mem: Any, store: bool) -> bytes:
    """``fst dword [mem]`` or ``fadd dword [mem]``, which ends where the old instruction did, so that distances stay."""
    opcode, extension = (0xD9, 2) if store else (0xD8, 0)
    base_name = raw.reg_name(mem.base) or ""
    disp32 = (mem.disp & 0xFFFF_FFFF).to_bytes(4, "little")
    if base_name == "rip":
        result: bytes = bytes([opcode, extension << 3 | 5]) + disp32
        return result
    base = _register(base_name) if mem.base else -1
    index = _register(raw.reg_name(mem.index)) if mem.index else -1
    rex = 0x40 | (base > 7) | (index > 7) << 1
    small = -128 <= mem.disp < 128
    if base < 0:
        mode, displacement = 0, disp32
    elif mem.disp == 0 and base & 7 != 5:
        mode, displacement = 0, b""
    else:
        mode, displacement = (1, bytes([mem.disp & 0xFF])) if small else (2, disp32)
    prefix = bytes([rex]) if rex != 0x40 else b""
    if index < 0 and base >= 0 and base & 7 != 4:
        result = prefix + bytes([opcode, mode << 6 | extension << 3 | base & 7]) + displacement
        return result
    scale = {1: 0, 2: 1, 4: 2, 8: 3}[mem.scale]
    sib = scale << 6 | (index & 7 if index >= 0 else 4) << 3 | (base & 7 if base >= 0 else 5)
    result = prefix + bytes([opcode, mode << 6 | extension << 3 | 4, sib]) + displacement
    return result
