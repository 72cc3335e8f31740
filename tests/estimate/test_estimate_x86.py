"""The estimator on x86-64, where it can be compared with native time: stand-ins of vector instructions, decoding, the table."""

from __future__ import annotations

import pytest

from autocomp.errors import ObjectError
from autocomp.estimate import estimate_kernel, load_core, run_kernel, stubs
from autocomp.estimate.instruction import FLAGS, LOAD, LOAD_AND_STORE, NO_ACCESS, STORE
from autocomp.estimate.objects import compile_object
from autocomp.estimate.x86 import decode_x86, stand_in

CORE = load_core("zen5")
TARGET = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "znver4", "num-cores": 1}


def test_every_stub_is_what_it_says() -> None:
    for name, instructions in stubs._X86_64.items():
        at = 0
        for code, text in instructions:
            if text != ".quad":
                (instruction,) = decode_x86(bytes.fromhex(code), at)
                assert instruction.text == text, name
                at += instruction.length


@pytest.mark.parametrize(
    ("code", "form", "access", "reads", "writes"),
    [
        ("62f27d48b8c1", "vfmadd231ps zmm,zmm,zmm", NO_ACCESS, {40, 41}, {40}),
        ("62d17c48100424", "vmovups zmm,m64", LOAD, set(), {40}),
        ("62d17c48110424", "vmovups m64,zmm", STORE, {40}, set()),
        ("62d17cc9100424", "vmovups zmm,k,m64", LOAD, {81}, {40}),  # under a mask that clears the rest
        ("62d17c49100424", "vmovups zmm,k,m64", LOAD, {40, 81}, {40}),  # under a mask that leaves it
        ("4801d8", "add r64,r64", NO_ACCESS, {0, 3}, {0, FLAGS}),
        ("480118", "add m8,r64", LOAD_AND_STORE, {3}, {FLAGS}),
        ("483b18", "cmp r64,m8", LOAD, {3}, {FLAGS}),
        ("c5f857c0", "vxorps xmm,xmm,xmm", NO_ACCESS, set(), {40}),  # a zero idiom depends on nothing
    ],
)
def test_decoded_instructions(code: str, form: str, access: int, reads: set[int], writes: set[int]) -> None:
    (instruction,) = decode_x86(bytes.fromhex(code), 0)
    assert (instruction.form, instruction.access) == (form, access)
    assert set(instruction.reads) == reads
    assert set(instruction.writes) == writes


@pytest.mark.parametrize(
    ("code", "instead"),
    [
        ("62d17c48100424", "fadd dword ptr ds:[r12]"),  # vmovups zmm0, [r12]
        (
            "62d17c4811442401",
            "fst dword ptr ds:[r12 + 0x40]",
        ),  # vmovups [r12 + 0x40], zmm0: its displacement is in units of 64
        ("62517c48296c1637", "fst dword ptr [r14 + rdx + 0xdc0]"),  # vmovaps [r14 + rdx + 0xdc0], zmm13
        (
            "c5fc100510000000",
            "fadd dword ptr ds:[rip + 0x10]",
        ),  # vmovups ymm0, [rip + 0x10]: it ends where the old one did
        ("62f27d48b8c1", "nop"),  # vfmadd231ps zmm0, zmm0, zmm1
        ("c5f97ec0", "xor eax, eax"),  # vmovd eax, xmm0
        ("480118", "add qword ptr [rax], rbx"),  # not a vector instruction
    ],
)
def test_stand_ins_touch_the_same_memory_in_as_many_bytes(code: str, instead: str) -> None:
    new = stand_in(bytes.fromhex(code), 0)
    assert len(new) == len(bytes.fromhex(code))
    (instruction,) = decode_x86(new, 0)
    assert instruction.text == instead


def test_what_decides_by_data_is_refused_by_name() -> None:
    with pytest.raises(ObjectError, match="vucomiss"):
        stand_in(bytes.fromhex("c5f82ec1"), 0)


def test_a_kernel_with_512_bit_vectors_is_estimated_and_not_run() -> None:
    from tvm import s_tir, te

    x = te.placeholder((4096,), name="x")
    schedule = s_tir.Schedule(te.create_prim_func([x, te.compute((4096,), lambda i: x[i] * 2.0 + 1.0, name="y")]))
    (loop,) = schedule.get_loops(schedule.get_sblock("y"))
    schedule.vectorize(schedule.split(loop, [None, 16])[1])
    code = compile_object(schedule.mod["main"], TARGET)
    tensors = [("float32", (4096,))] * 2
    estimate = estimate_kernel(code, tensors, CORE, store=False)
    assert estimate.unknown == ()
    assert 256 <= estimate.cycles < 2000, "256 stores of 64 bytes, one a cycle"
    with pytest.raises(ObjectError, match="is x86-64 code"):
        estimate_kernel(code, tensors, load_core("cortex-a76"), store=False)
    with pytest.raises(ObjectError, match="run it on the machine itself"):
        run_kernel(code, [])
