"""AArch64 for the estimate: decoding."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

from autocomp.estimate.instruction import (
    FLAGS,
    LOAD,
    NO_ACCESS,
    STORE,
    VECTOR,
    Instruction,
    disassembler,
    distinct,
)


def decode_arm64(code: bytes, address: int) -> list[Instruction]:
    """Decode AArch64 code; each word that is no instruction gets the form ``undefined``."""
    return [replace(_arm64_word(code[at : at + 4]), address=address + at) for at in range(0, len(code) // 4 * 4, 4)]


# Mnemonics whose destination is also a source, which the disassembler does not always say.
_ACCUMULATING = re.compile(
    r"(fml[as]l?2?|[su]dot|ml[as]|[su]ml[as]l2?|[su]adalp|[su]abal?2?|[su]r?sra|sqdml[as]l2?|sqrdml[as]h|s[lr]i|bsl|bit|bif|ins|tbx|(s?q?r?u?q?(shrn|xtn|shrun|xtun|rshrn)|fcvtn|[ar]*addhn|[r]*subhn)2)"
)


_WRITES_NO_REGISTER = re.compile(r"b(\.\w+)?|br|blr?|ret|nop|hint|msr|prfu?m")
_COMPARING = frozenset(["cmp", "cmn", "tst", "ccmp", "ccmn", "fcmp", "fcmpe", "fccmp", "fccmpe"])


_UNARY = frozenset(
    ["lsl", "lsr", "asr", "ror", "ubfx", "ubfiz", "sbfx", "sbfiz", "sxtb", "sxth", "sxtw", "uxtb", "uxth", "uxtw"]
)


_ELEMENT_BYTES = {"b": 1, "h": 2, "s": 4, "d": 8, "q": 16, "x": 8, "w": 4}


@cache
def _arm64_word(word: bytes) -> Instruction:
    import capstone
    from capstone import arm64

    found = next(disassembler("arm64").disasm(word, 0), None)
    if found is None or found.id == 0:
        return Instruction(0, 4, word.hex(), "undefined")
    mnemonic, text = found.mnemonic, found.op_str
    read, written = ([_register(found.reg_name(r)) for r in group] for group in found.regs_access())
    address: list[int] = []
    for operand in found.operands:
        if operand.type == arm64.ARM64_OP_MEM:
            address += [_register(found.reg_name(r)) for r in (operand.mem.base, operand.mem.index) if r]
    access = LOAD if mnemonic.startswith("ld") else STORE if mnemonic.startswith("st") else NO_ACCESS
    registers: list[int] = []  # operands, in order, up to the one in memory
    for operand in found.operands:
        if operand.type == arm64.ARM64_OP_MEM:
            break
        if operand.type == arm64.ARM64_OP_REG:
            registers.append(_register(found.reg_name(operand.reg)))
    read, written, accumulator = _roles(mnemonic, text, access, registers, read, written)
    groups = set(found.groups)
    updated = access and re.search(r"\]!|\],", text)
    base = [register for register in written if updated and register in address]
    read = [
        register
        for register in read
        if not (access and register in address) or (register in registers and access == STORE)
    ]
    form = f"{mnemonic} {_arm64_form(text)}".strip()
    accessed = _accessed(mnemonic, text) if access else 0
    return Instruction(
        0,
        4,
        f"{mnemonic} {text}".strip(),
        form,
        reads=distinct(read),
        address_reads=distinct(address),
        writes=distinct(register for register in written if register not in base),
        written_back=base[0] if base else -1,
        accumulator=accumulator,
        access=access,
        accessed=accessed,
        emulated=accessed,
        branch=bool(groups & {capstone.CS_GRP_JUMP, capstone.CS_GRP_BRANCH_RELATIVE})
        or mnemonic in ("ret", "br", "blr", "bl"),
    )


def _roles(
    mnemonic: str, text: str, access: int, registers: list[int], read: list[int], written: list[int]
) -> tuple[list[int], list[int], int]:
    """(read, written, accumulator) of an instruction, from its register operands and what the disassembler says of them.

    The disassembler leaves operands out of some instructions' lists (sdot), and calls some read that are written, or the reverse.
    """
    if access:
        if access == STORE:
            return read + registers, written, -1
        partial = re.search(r"\}\[\d+\]", text)  # one lane is loaded, the others stay
        read = read + registers if partial else [register for register in read if register not in registers]
        return read, written + registers, -1
    if mnemonic in _COMPARING:
        return registers + [FLAGS] * mnemonic.startswith(("cc", "fcc")), [FLAGS], -1
    if mnemonic in ("cbz", "cbnz", "tbz", "tbnz"):
        return registers, [], -1
    if _WRITES_NO_REGISTER.fullmatch(mnemonic):
        return read, written, -1
    written = written + registers[:1]
    if mnemonic in ("movi", "mvni"):
        return [], written, -1
    if mnemonic in _UNARY:
        return registers[1:], written, -1
    read = read + registers[1:]
    if mnemonic in ("fmadd", "fmsub", "fnmadd", "fnmsub"):
        accumulator, factors = registers[-1], registers[1:-1]
    elif _ACCUMULATING.fullmatch(mnemonic) or (mnemonic == "mov" and "[" in text.split(",")[0]):
        accumulator, factors = registers[0], registers[1:]
        read = [*read, accumulator]
    else:
        return read, written, -1
    # a sum that is a factor as well is needed at the start, as factors are
    return read, written, -1 if accumulator in factors else accumulator


def _arm64_form(text: str) -> str:
    """Kinds of operands: registers lose their numbers, immediates their values but for zero, shifts keep their amount."""
    form = text.replace(" ", "").replace("lsl#", "lsl:").replace("lsr#", "lsr:").replace("asr#", "asr:")
    form = re.sub(r"\b([su]xt[bhwx])#", r"\1:", form)
    form = re.sub(r"#-?(0x0+|0+(\.0+)?)(?![\dx.a-f])", "#0", form)
    form = re.sub(r"#-?(?!0(?![\dx.a-f]))[\dx][\da-fx.e+-]*", "#", form)
    form = re.sub(r"\b(xzr|lr|fp|sp)\b|\bx\d+\b", "x", form)
    form = re.sub(r"\bwzr\b|\bwsp\b|\bw\d+\b", "w", form)
    form = re.sub(r"\b([vqdshb])\d+", r"\1", form)
    return re.sub(r"\[\d+\]", "[]", form)


def _accessed(mnemonic: str, text: str) -> int:
    """Bytes of memory that a load or store touches."""
    if listed := re.match(r"\{(.*?)\}(\[\d+\])?", text.replace(" ", "")):
        names = listed[1].split(",")
        arrangement = names[0].rpartition(".")[2]
        element = _ELEMENT_BYTES[arrangement[-1]]
        if listed[2] or mnemonic.endswith("r"):
            return element * len(names)
        return len(names) * element * int(arrangement[:-1] or 1)
    stem = mnemonic.removesuffix("b") if mnemonic in ("ldrb", "strb", "ldurb", "sturb") else mnemonic
    if stem != mnemonic or mnemonic.endswith(("rsb", "rb")):
        return 1
    if mnemonic.endswith("h") and mnemonic[:2] in ("ld", "st"):
        return 2
    if mnemonic.endswith("sw"):
        return 8 if mnemonic == "ldpsw" else 4
    size = _ELEMENT_BYTES[text[0]]
    return 2 * size if mnemonic in ("ldp", "stp", "ldnp", "stnp") else size


def _register(name: str) -> int:
    """One number for all views of a register; -1 for those that hold a constant or do not matter."""
    if name in ("sp", "wsp"):
        return 31
    if name == "lr":
        return 30
    if name == "fp":
        return 29
    if name == "nzcv":
        return FLAGS
    if match := re.fullmatch(r"[xw](\d+)", name):
        return int(match[1])
    if match := re.fullmatch(r"[vqdshb](\d+)", name):
        return VECTOR + int(match[1])
    return -1
