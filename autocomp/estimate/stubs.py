"""Machine code for what a kernel's object file calls but does not hold: TVM's backend functions, memset and memcpy.

Each stub is written as pairs of encoding and assembly (branches to distances), so that a reader can follow it and a test can
disassemble it. A workspace is
taken from a pointer that only moves up and goes back when it is freed, as TVM allocates and frees in nested order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# name of the stub, then its instructions; a name alone on the right of an encoding marks a word of data
_Code = tuple[tuple[int, str], ...]

_ARM64: Mapping[str, _Code] = {
    # int TVMBackendParallelLaunch(lambda, data, tasks): one task, run in place, told that it is one of one
    "TVMBackendParallelLaunch": (
        (0xA9BD7BFD, "stp x29, x30, [sp, #-0x30]!"),
        (0xF9000BFF, "str xzr, [sp, #0x10]"),
        (0x52800029, "mov w9, #1"),
        (0xB9001BE9, "str w9, [sp, #0x18]"),
        (0xAA0003E9, "mov x9, x0"),
        (0xAA0103E2, "mov x2, x1"),
        (0x910043E1, "add x1, sp, #0x10"),
        (0x2A1F03E0, "mov w0, wzr"),
        (0xD63F0120, "blr x9"),
        (0xA8C37BFD, "ldp x29, x30, [sp], #0x30"),
        (0xD65F03C0, "ret"),
        (0xD503201F, "nop"),
    ),
    # void *TVMBackendAllocWorkspace(device, id, bytes in x2, ...): in whole cache lines
    "TVMBackendAllocWorkspace": (
        (0x10000189, "adr x9, #0x30"),
        (0xF940012A, "ldr x10, [x9]"),
        (0x9101FC4B, "add x11, x2, #0x7f"),
        (0x927AE56B, "and x11, x11, #0xffffffffffffffc0"),
        (0x8B0B014B, "add x11, x10, x11"),
        (0xF900012B, "str x11, [x9]"),
        (0xAA0A03E0, "mov x0, x10"),
        (0xD65F03C0, "ret"),
    ),
    # int TVMBackendFreeWorkspace(device, id, pointer in x2)
    "TVMBackendFreeWorkspace": (
        (0x10000089, "adr x9, #0x10"),
        (0xF9000122, "str x2, [x9]"),
        (0x2A1F03E0, "mov w0, wzr"),
        (0xD65F03C0, "ret"),
    ),
    "workspace": ((0, ".word"), (0, ".word")),  # 48 bytes after the first word of alloc, 16 after that of free
    "memset": (
        (0x4E010C20, "dup v0.16b, w1"),
        (0xAA0003E9, "mov x9, x0"),
        (0xF1010042, "subs x2, x2, #0x40"),
        (0x54000083, "b.lo #0x10"),
        (0xAC810120, "stp q0, q0, [x9], #0x20"),
        (0xAC810120, "stp q0, q0, [x9], #0x20"),
        (0x17FFFFFC, "b #0xfffffffffffffff0"),
        (0xB1010042, "adds x2, x2, #0x40"),
        (0x54000080, "b.eq #0x10"),
        (0x38001521, "strb w1, [x9], #1"),
        (0xF1000442, "subs x2, x2, #1"),
        (0x17FFFFFD, "b #0xfffffffffffffff4"),
        (0xD65F03C0, "ret"),
    ),
    "memcpy": (
        (0xAA0003E9, "mov x9, x0"),
        (0xF1008042, "subs x2, x2, #0x20"),
        (0x54000083, "b.lo #0x10"),
        (0xACC10420, "ldp q0, q1, [x1], #0x20"),
        (0xAC810520, "stp q0, q1, [x9], #0x20"),
        (0x17FFFFFC, "b #0xfffffffffffffff0"),
        (0xB1008042, "adds x2, x2, #0x20"),
        (0x540000A0, "b.eq #0x14"),
        (0x38401423, "ldrb w3, [x1], #1"),
        (0x38001523, "strb w3, [x9], #1"),
        (0xF1000442, "subs x2, x2, #1"),
        (0x17FFFFFC, "b #0xfffffffffffffff0"),
        (0xD65F03C0, "ret"),
    ),
}


# System V calling convention: arguments in rdi, rsi, rdx, rcx; the result in rax.
_X86_64: Mapping[str, tuple[tuple[str, str], ...]] = {
    "TVMBackendParallelLaunch": (
        ("4883ec18", "sub rsp, 0x18"),
        ("4889f8", "mov rax, rdi"),
        ("4889f2", "mov rdx, rsi"),
        ("48c7042400000000", "mov qword ptr [rsp], 0"),
        ("c744240801000000", "mov dword ptr [rsp + 8], 1"),
        ("4889e6", "mov rsi, rsp"),
        ("31ff", "xor edi, edi"),
        ("ffd0", "call rax"),
        ("4883c418", "add rsp, 0x18"),
        ("c3", "ret"),
    ),
    "TVMBackendAllocWorkspace": (
        ("488b051e000000", "mov rax, qword ptr [rip + 0x1e]"),
        ("4883c27f", "add rdx, 0x7f"),
        ("4883e2c0", "and rdx, 0xffffffffffffffc0"),
        ("4801c2", "add rdx, rax"),
        ("4889150c000000", "mov qword ptr [rip + 0xc], rdx"),
        ("c3", "ret"),
        ("90", "nop"),
    ),
    "TVMBackendFreeWorkspace": (
        ("48891503000000", "mov qword ptr [rip + 3], rdx"),
        ("31c0", "xor eax, eax"),
        ("c3", "ret"),
    ),
    "workspace": (("0000000000000000", ".quad"),),
    "memset": (
        ("4889f8", "mov rax, rdi"),
        ("c5f96ec6", "vmovd xmm0, esi"),
        ("c4e27d78c0", "vpbroadcastb ymm0, xmm0"),
        ("4883ea20", "sub rdx, 0x20"),
        ("720a", "jb 0x1c"),
        ("c5fc1107", "vmovups ymmword ptr [rdi], ymm0"),
        ("4883c720", "add rdi, 0x20"),
        ("ebf0", "jmp 0xc"),
        ("4883c220", "add rdx, 0x20"),
        ("4883ea01", "sub rdx, 1"),
        ("7209", "jb 0x2f"),
        ("408837", "mov byte ptr [rdi], sil"),
        ("4883c701", "add rdi, 1"),
        ("ebf1", "jmp 0x20"),
        ("c3", "ret"),
    ),
    "memcpy": (
        ("4889f8", "mov rax, rdi"),
        ("4883ea20", "sub rdx, 0x20"),
        ("7212", "jb 0x1b"),
        ("c5fc1006", "vmovups ymm0, ymmword ptr [rsi]"),
        ("c5fc1107", "vmovups ymmword ptr [rdi], ymm0"),
        ("4883c620", "add rsi, 0x20"),
        ("4883c720", "add rdi, 0x20"),
        ("ebe8", "jmp 3"),
        ("4883c220", "add rdx, 0x20"),
        ("4883ea01", "sub rdx, 1"),
        ("720e", "jb 0x33"),
        ("8a0e", "mov cl, byte ptr [rsi]"),
        ("880f", "mov byte ptr [rdi], cl"),
        ("4883c601", "add rsi, 1"),
        ("4883c701", "add rdi, 1"),
        ("ebec", "jmp 0x1f"),
        ("c3", "ret"),
    ),
}


@dataclass(frozen=True)
class Stubs:
    """Code to place at the start of an image: ``offsets`` of each stub by name, and what stands for an unknown function."""

    code: bytes
    offsets: Mapping[str, int]
    returns: bytes  # 16 bytes that return at once


def stubs_of(isa: str) -> Stubs:
    """The stubs of an instruction set."""
    code, offsets = bytearray(), {}
    if isa == "arm64":
        for name, words in _ARM64.items():
            offsets[name] = len(code)
            code += b"".join(word.to_bytes(4, "little") for word, _ in words)
        return Stubs(bytes(code), offsets, bytes.fromhex("c0035fd6" + 3 * "1f2003d5"))
    for name, encodings in _X86_64.items():
        offsets[name] = len(code)
        code += b"".join(bytes.fromhex(encoding) for encoding, _ in encodings)
    return Stubs(bytes(code), offsets, bytes.fromhex("c3" + 15 * "90"))
