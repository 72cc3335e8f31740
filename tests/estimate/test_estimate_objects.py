"""Loading object files, running them, and the table of instructions: what is unknown is named, never guessed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from autocomp.errors import ObjectError, UsageError
from autocomp.estimate import compile_object, core_of, estimate_kernel, kernel, load_core, load_image, run_kernel, stubs
from autocomp.estimate.arm64 import decode_arm64
from autocomp.estimate.instruction import FLAGS
from autocomp.estimate.instructions import list_cores
from autocomp.hardware.profile import load_profile

NEON = load_profile("cortex-a76")
CORE = core_of(NEON)


def compiled(inputs: list[Any], *outputs: Any) -> bytes:
    from tvm import te

    return compile_object(te.create_prim_func([*inputs, *outputs]), NEON.target)


def elementwise(dtype: str, function: Any, size: int = 37) -> bytes:
    from tvm import te

    x = te.placeholder((size,), dtype, name="x")
    return compiled([x], te.compute((size,), lambda i: function(x[i]), name="y"))


@pytest.fixture(scope="module")
def doubling() -> bytes:
    return elementwise("float32", lambda x: x + x)


def test_every_stub_is_what_it_says() -> None:
    for name, words in stubs._ARM64.items():
        for word, text in words:
            if text != ".word":
                (instruction,) = decode_arm64(word.to_bytes(4, "little"), 0)
                assert instruction.text == text, name


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"])
def test_every_dtype_runs(dtype: str) -> None:
    from tvm import te

    x = te.placeholder((5, 7), dtype, name="x")
    code = compiled([x], te.compute((7, 5), lambda i, j: x[j, i], name="y"))
    array = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, (5, 7)).astype(dtype)
    _, result = run_kernel(code, [array, np.zeros((7, 5), dtype)])
    np.testing.assert_array_equal(result, array.T)


def test_half_precision_and_bytes_compute_as_numpy_does() -> None:
    from tvm import te, tirx

    rng = np.random.default_rng(1)
    half = rng.standard_normal((64,)).astype("float16")
    code = elementwise("float16", lambda x: x * x + tirx.const(1, "float16"), 64)
    _, result = run_kernel(code, [half, np.zeros(64, "float16")])
    np.testing.assert_allclose(result.astype("float32"), (half.astype("float32") ** 2 + 1), rtol=2e-3)
    a, b = te.placeholder((6, 32), "int8", name="a"), te.placeholder((8, 32), "int8", name="b")
    k = te.reduce_axis((0, 32), "k")
    product = te.compute((6, 8), lambda i, j: te.sum(a[i, k].astype("int32") * b[j, k].astype("int32"), k))
    left, right = (rng.integers(-128, 128, shape, "int8") for shape in ((6, 32), (8, 32)))
    *_, sums = run_kernel(compiled([a, b], product), [left, right, np.zeros((6, 8), "int32")])
    np.testing.assert_array_equal(sums, left.astype("int32") @ right.astype("int32").T)


def test_workspace_is_allocated_and_given_back() -> None:
    from tvm import te

    x = te.placeholder((400, 100), name="x")
    squares = te.compute((400, 100), lambda i, j: x[i, j] * x[i, j], name="squares")
    k = te.reduce_axis((0, 400), "k")
    array = np.random.default_rng(2).standard_normal((400, 100), "float32")
    code = compiled([x], te.compute((100,), lambda j: te.sum(squares[k, j], k), name="sums"))
    _, sums = run_kernel(code, [array, np.zeros(100, "float32")])
    np.testing.assert_allclose(sums, (array**2).sum(0), rtol=1e-4)


@pytest.mark.parametrize("name", ["exp", "tanh", "erf", "log"])
def test_the_c_library_is_emulated_and_its_cost_is_unknown(name: str) -> None:
    import math

    from tvm import tirx

    code = elementwise("float32", lambda x: tirx.call_pure_extern("float32", f"{name}f", x), 16)
    array = np.linspace(0.1, 2, 16, dtype="float32")
    _, result = run_kernel(code, [array, np.zeros(16, "float32")])
    np.testing.assert_allclose(result, [getattr(math, name)(value) for value in array], rtol=1e-6)
    estimate = estimate_kernel(code, [("float32", (16,))] * 2, CORE, store=False)
    assert estimate.calls == 16
    assert estimate.unknown == (f"{name}f",)
    assert estimate.unknown_share > 0.5


def test_an_unknown_function_is_named() -> None:
    from tvm import tirx

    code = elementwise("float32", lambda x: tirx.call_pure_extern("float32", "wavelet", x))
    with pytest.raises(ObjectError, match="wavelet"):
        run_kernel(code, [np.zeros(37, "float32")] * 2)
    assert "wavelet" in estimate_kernel(code, [("float32", (37,))] * 2, CORE, store=False).unknown


def test_an_unknown_relocation_is_named(doubling: bytes) -> None:
    from io import BytesIO

    from elftools.elf.elffile import ELFFile

    section = ELFFile(BytesIO(doubling)).get_section_by_name(".rela.text")
    data = bytearray(doubling)
    at = section["sh_offset"] + 8  # r_info of the first entry; its low half is the type
    data[at : at + 4] = (1024).to_bytes(4, "little")
    with pytest.raises(ObjectError, match=r"unknown relocation R_AARCH64_COPY at \.text\+0x"):
        load_image(bytes(data))


def test_what_is_no_kernel_is_refused(doubling: bytes) -> None:
    with pytest.raises(ObjectError, match="not an ELF"):
        load_image(b"hello, world")
    other = bytearray(doubling)
    other[18:20] = (243).to_bytes(2, "little")  # e_machine: RISC-V
    with pytest.raises(ObjectError, match="EM_RISCV"):
        load_image(bytes(other))


def test_wrong_arguments_are_refused_in_the_kernels_words(doubling: bytes) -> None:
    with pytest.raises(ObjectError, match="shape"):
        run_kernel(doubling, [np.zeros(36, "float32"), np.zeros(37, "float32")])
    with pytest.raises(ObjectError, match="refused its arguments"):
        estimate_kernel(doubling, [("float32", (36,)), ("float32", (37,))], CORE, store=False)


def test_an_instruction_without_a_row_is_counted_and_named(doubling: bytes) -> None:
    ignorant = dataclasses.replace(CORE, rows=tuple(row for row in CORE.rows if not row.mnemonic.fullmatch("fadd")))
    tensors = [("float32", (37,))] * 2
    known, unknown = (estimate_kernel(doubling, tensors, core, store=False) for core in (CORE, ignorant))
    assert known.unknown == ()
    assert known.unknown_share == 0
    assert unknown.unknown == ("fadd",)
    assert 0 < unknown.unknown_share < 0.2


def test_estimates_are_equal_run_to_run_and_kept(
    doubling: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    tensors = [("float32", (37,))] * 2
    first = estimate_kernel(doubling, tensors, CORE)
    assert estimate_kernel(doubling, tensors, CORE, store=False) == first
    monkeypatch.setattr(kernel, "load_image", None)  # no second run: it comes from disk
    assert estimate_kernel(doubling, tensors, CORE) == first
    monkeypatch.undo()
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    (stored,) = (tmp_path / "estimates").iterdir()
    stored.write_text("{")  # what cannot be read is made again
    assert estimate_kernel(doubling, tensors, CORE) == first
    slower = estimate_kernel(doubling, tensors, CORE.adapted(clock_hz=1.2e9))
    assert slower.seconds > first.seconds
    assert len(list((tmp_path / "estimates").iterdir())) == 2


def test_a_long_kernel_is_sampled_and_agrees_with_its_whole_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvm import te

    x, y = te.placeholder((48, 64), name="x"), te.placeholder((64, 48), name="y")
    k = te.reduce_axis((0, 64), "k")
    code = compiled([x, y], te.compute((48, 48), lambda i, j: te.sum(x[i, k] * y[k, j], k)))
    tensors = [("float32", (48, 64)), ("float32", (64, 48)), ("float32", (48, 48))]
    whole = estimate_kernel(code, tensors, CORE, store=False)
    for name, value in (("_WHOLE", 30_000), ("_START", 15_000), ("_WINDOW", 6_000), ("_FILLING", 2_000)):
        monkeypatch.setattr(kernel, name, value)
    sampled = estimate_kernel(code, tensors, CORE, store=False)
    assert sampled.instructions == whole.instructions > 200_000
    assert sampled.cycles == pytest.approx(whole.cycles, rel=0.1)
    assert sampled.sampled > 0.95


@pytest.mark.parametrize(
    ("word", "form", "reads", "writes"),
    [
        (0x4E829420, "sdot v.4s,v.16b,v.16b", {40, 41, 42}, {40}),
        (0x4E22CC20, "fmla v.4s,v.4s,v.4s", {40, 41, 42}, {40}),
        (0x4F821020, "fmla v.4s,v.4s,v.s[]", {40, 41, 42}, {40}),
        (0xF9400000, "ldr x,[x]", set(), {0}),
        (0x4DDFC820, "ld1r {v.4s},[x],#", set(), {40}),
        (0xF1000442, "subs x,x,#", {2}, {2, FLAGS}),
        (0x6B01001F, "cmp w,w", {0, 1}, {FLAGS}),
        (0x34000060, "cbz w,#", {0}, set()),
        (0x530D7D0A, "lsr w,w,#", {8}, {10}),
        (0x3D800020, "str q,[x]", {40}, set()),
    ],
)
def test_decoded_registers(word: int, form: str, reads: set[int], writes: set[int]) -> None:
    (instruction,) = decode_arm64(word.to_bytes(4, "little"), 0)
    assert instruction.form == form
    assert set(instruction.reads) == reads
    assert set(instruction.writes) == writes


@pytest.mark.parametrize(
    ("word", "latency", "forward", "pipelines"),
    [  # Arm Cortex-A76 Software Optimization Guide, chapter 3
        (0x4E22CC20, 4, 2, 1),  # fmla v0.4s, v1.4s, v2.4s
        (0x4E829420, 3, 2, 1),  # sdot v0.4s, v1.16b, v2.16b
        (0x6E22DC20, 3, 0, 1),  # fmul v0.4s, v1.4s, v2.4s
        (0x4E22D420, 2, 0, 1),  # fadd v0.4s, v1.4s, v2.4s
        (0x4EA29C20, 5, 0, 2),  # mul v0.4s, v1.4s, v2.4s
        (0x9B027C20, 4, 0, 1),  # mul x0, x1, x2
        (0x8B020020, 1, 0, 1),  # add x0, x1, x2
        (0x8B020C20, 1, 0, 1),  # add x0, x1, x2, lsl #3
        (0x8B021820, 2, 0, 1),  # add x0, x1, x2, lsl #6
    ],
)
def test_facts_of_the_table(word: int, latency: int, forward: int, pipelines: int) -> None:
    (instruction,) = decode_arm64(word.to_bytes(4, "little"), 0)
    timing = CORE.timing(instruction)
    assert (timing.latency, timing.forward, len(timing.operations)) == (latency, forward, pipelines)
    assert timing.known


def test_cores_are_found_by_name() -> None:
    assert "cortex-a76" in list_cores()
    with pytest.raises(UsageError, match="Did you mean 'cortex-a76'"):
        load_core("cortex-a67")
    with pytest.raises(UsageError, match="names no core model"):
        core_of(dataclasses.replace(NEON, core=""))
