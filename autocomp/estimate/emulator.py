"""Run a kernel's object code in an emulated processor: for its results, for how often each block runs, or for a trace.

For timing, vector arithmetic is replaced by no-operations: what a kernel does and where it reads do not depend on its data (which are
zeros then), and vector instructions are what emulation is slow at. Unicorn Engine (QEMU's translator) does the running.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocomp.errors import ObjectError
from autocomp.estimate import hooks
from autocomp.estimate.objects import BASE, Image, load_image

Tensor = tuple[str, tuple[int, ...]]  # dtype and shape

_RETURN = 0x0F00_0000  # where the kernel returns to, and the run ends
_STACK, _STACK_BYTES = 0x2000_0000, 8 << 20  # Linux gives a thread 8 MiB
_HEAP = 0x4000_0000
_WORKSPACE_BYTES = 1 << 30  # virtual: only pages that are written take memory
_PAGE = 4096
_LINE = 64
_TENSOR_INDEX = 7  # kTVMFFIDLTensorPtr of tvm/ffi/c_api.h
_CPU = 1  # kDLCPU of dlpack.h
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}  # DLDataTypeCode of dlpack.h


@dataclass(frozen=True)
class Counts:
    """How often each block of code ran: arrays over blocks. ``first`` is the bytes of code executed before its first run."""

    starts: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    first: np.ndarray

    @property
    def executed(self) -> int:
        """Bytes of code executed."""
        return int((self.sizes * self.counts).sum())


def run_kernel(object_bytes: bytes, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Execute an AArch64 kernel on copies of the arrays and return all of them as it left them, inputs and outputs alike.

    ObjectError if the object cannot be loaded, calls what is unknown, faults, or refuses its arguments (with its own message).
    """
    return run_image(load_image(object_bytes), arrays)


def run_image(image: Image, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``run_kernel`` of code that is loaded already, from its entry."""
    if image.isa != "arm64":
        raise ObjectError(
            f"only arm64 objects are run for their results, not {image.isa}: run it on the machine itself"
        )
    run = Emulation(image, [(_dtype_name(array.dtype), array.shape) for array in arrays])
    for view, array in zip(run.views, arrays, strict=True):
        view[...] = array
    run.watch_calls()
    run.start()
    return [np.array(view) for view in run.views]


def count_blocks(image: Image, tensors: Sequence[Tensor], limit: int) -> Counts:
    """Run the kernel with its arithmetic left out and count every block. ``limit`` is in bytes of code."""
    span = image.code_end - BASE
    counts, sizes, first = (np.zeros(span, np.int64) for _ in range(3))
    run = Emulation(image, tensors, timing=True)
    slots = run.slots
    slots[hooks.LIMIT] = limit
    slots[[hooks.COUNTS, hooks.SIZES, hooks.FIRST]] = [array.ctypes.data for array in (counts, sizes, first)]
    run.hook_blocks(hooks.count_block)
    run.start()
    if slots[hooks.STOPPED]:
        raise ObjectError(
            f"the kernel ran more than {limit / 4e9:.0f} thousand million instructions: it is not estimated"
        )
    (starts,) = np.nonzero(counts)
    return Counts(starts, sizes[starts], counts[starts], first[starts])


def trace_windows(
    image: Image, tensors: Sequence[Tensor], windows: Sequence[tuple[int, int]], capacity: int
) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Record blocks and accesses in the windows (from, to: bytes of code executed), as ``hooks`` writes them.

    Returns the records of each window, and the address ranges of the tensors.
    """
    run = Emulation(image, tensors, timing=True)
    slots = run.slots
    buffer = np.empty(capacity, np.int64)
    slots[hooks.BUFFER], slots[hooks.CAPACITY] = buffer.ctypes.data, capacity
    parts = []
    for start, end in windows:
        if start > slots[hooks.BYTES]:
            slots[hooks.LIMIT] = start
            skipping = run.hook_blocks(hooks.skip_block)
            run.start()
            run.remove(skipping)
        if run.finished:
            break
        slots[hooks.LIMIT] = end
        first = int(slots[hooks.RECORDS])
        tracing = [run.hook_blocks(hooks.trace_block), run.hook_memory(hooks.trace_access)]
        run.start()
        run.remove(*tracing)
        parts.append(buffer[first : slots[hooks.RECORDS]])
        if run.finished or slots[hooks.RECORDS] + hooks.BLOCK_ACCESSES >= capacity:
            break
    return parts, run.ranges


class Emulation:
    """One run of a kernel: memory, arguments and hooks. ``views`` are its tensors, in emulated memory."""

    def __init__(self, image: Image, tensors: Sequence[Tensor], *, timing: bool = False) -> None:
        import unicorn

        self.image = image
        self._machine = _MACHINES[image.isa]
        self.slots = hooks.new_slots()
        self.finished = False
        self._next = image.entry
        self._hooks: list[Any] = []
        self._message = ""
        code = bytearray(image.data)
        if timing:
            code[: image.code_end - BASE] = self._machine.without_arithmetic(bytes(code[: image.code_end - BASE]))
        places, end = _places(tensors)
        self._workspace = end
        self.memory = np.zeros(end + _WORKSPACE_BYTES - _HEAP, np.uint8)
        self.views = [
            self.memory[at - _HEAP : at - _HEAP + _bytes(tensor)].view(_numpy_type(tensor[0])).reshape(tensor[1])
            for at, tensor in zip(places, tensors, strict=True)
        ]
        self.ranges = [(at, at + _bytes(tensor)) for at, tensor in zip(places, tensors, strict=True)]
        self._write_arguments(places, tensors, end)
        code[image.workspace - BASE : image.workspace - BASE + 8] = self._workspace.to_bytes(8, "little")
        self.engine = engine = self._machine.engine()
        engine.mem_map(BASE, _round(len(code), _PAGE))
        engine.mem_write(BASE, bytes(code))
        engine.mem_map(_RETURN, _PAGE)
        engine.mem_map(_STACK, _STACK_BYTES)
        engine.mem_map_ptr(
            _HEAP, len(self.memory), unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE, self.memory.ctypes.data
        )
        self._machine.call(engine, (0, self._arguments, len(tensors), self._result))
        self.slots[hooks.STOP] = _address_of_stop()
        self.slots[hooks.LOW], self.slots[hooks.HIGH] = BASE, image.code_end

    def start(self) -> None:
        """Run from where the last run stopped, to the end or to where a hook stops it. ObjectError if the kernel fails."""
        import unicorn

        self.slots[hooks.STOPPED] = 0
        try:
            self.engine.emu_start(self._next, _RETURN)
        except unicorn.UcError as error:
            at = self._machine.program_counter(self.engine) - BASE
            raise ObjectError(f"the kernel failed at code offset {at:#x}: {error}") from error
        self._next = self._machine.program_counter(self.engine)
        if self._message:
            raise ObjectError(self._message)
        self.finished = not self.slots[hooks.STOPPED]
        if self.finished and self._machine.result(self.engine):
            raise ObjectError("the kernel refused its arguments: check the number, dtypes and shapes of the tensors")

    def hook_blocks(self, function: Any) -> int:
        from unicorn import UC_HOOK_BLOCK

        return self._hook(UC_HOOK_BLOCK, function)

    def hook_memory(self, function: Any) -> int:
        from unicorn import UC_HOOK_MEM_READ, UC_HOOK_MEM_WRITE

        return self._hook(UC_HOOK_MEM_READ | UC_HOOK_MEM_WRITE, function)

    def _hook(self, kind: int, function: Any) -> int:
        from unicorn.unicorn_py3.unicorn import uclib

        handle = ctypes.c_size_t()
        status = uclib.uc_hook_add(
            self.engine._uch,
            ctypes.cast(ctypes.byref(handle), ctypes.POINTER(ctypes.c_ulong)),
            kind,
            ctypes.c_void_p(function.address),
            ctypes.c_void_p(self.slots.ctypes.data),
            ctypes.c_ulong(1),  # begin after end: everywhere
            ctypes.c_ulong(0),
        )
        if status:
            raise RuntimeError(f"unicorn refused a hook: status {status}")
        return handle.value

    def remove(self, *handles: int) -> None:
        """Take hooks away; code translated with them is translated anew."""
        from unicorn.unicorn_py3.unicorn import uclib

        for handle in handles:
            uclib.uc_hook_del(self.engine._uch, ctypes.c_size_t(handle))
        self.engine.ctl_flush_tb()

    def watch_calls(self) -> None:
        """Serve calls of the C library's mathematics, and turn others into errors that name the function."""
        from unicorn import UC_HOOK_CODE

        from autocomp.estimate.mathematics import call_function

        for name, address in self.image.externals.items():

            def serve(engine: Any, _address: int, _size: int, _data: Any, name: str = name) -> None:
                self._message = call_function(engine, name)
                if self._message:
                    engine.emu_stop()

            self._hooks.append(self.engine.hook_add(UC_HOOK_CODE, serve, begin=address, end=address))

    def _write_arguments(self, places: Sequence[int], tensors: Sequence[Tensor], end: int) -> None:
        """TVMFFIAny arguments that point at DLTensors, after the tensors [tvm/ffi/c_api.h, dlpack.h]."""
        self._arguments = self._workspace
        at = self._arguments + 16 * len(tensors)
        for index, (place, (dtype, shape)) in enumerate(zip(places, tensors, strict=True)):
            code, bits = _type_code(dtype)
            shape_at, tensor_at = at, at + 8 * len(shape)
            self._put(shape_at, struct.pack(f"<{len(shape)}q", *shape))
            self._put(tensor_at, struct.pack("<QiiiBBHQQQ", place, _CPU, 0, len(shape), code, bits, 1, shape_at, 0, 0))
            self._put(self._arguments + 16 * index, struct.pack("<iiQ", _TENSOR_INDEX, 0, tensor_at))
            at = tensor_at + 48
        self._result = at
        self._workspace = _round(at + 16, _PAGE)

    def _put(self, address: int, data: bytes) -> None:
        self.memory[address - _HEAP : address - _HEAP + len(data)] = np.frombuffer(data, np.uint8)


class _Arm64:
    """AArch64 in the emulator: arguments in x0 to x3, the address to return to in x30."""

    @staticmethod
    def engine() -> Any:
        import unicorn
        from unicorn import arm64_const as arm

        engine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        engine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
        engine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point and SIMD are not trapped
        return engine

    @staticmethod
    def call(engine: Any, arguments: Sequence[int]) -> None:
        from unicorn import arm64_const as arm

        for number, value in enumerate(arguments):
            engine.reg_write(arm.UC_ARM64_REG_X0 + number, value)
        engine.reg_write(arm.UC_ARM64_REG_SP, _STACK + _STACK_BYTES - _PAGE)
        engine.reg_write(arm.UC_ARM64_REG_X30, _RETURN)

    @staticmethod
    def program_counter(engine: Any) -> int:
        from unicorn import arm64_const as arm

        return int(engine.reg_read(arm.UC_ARM64_REG_PC))

    @staticmethod
    def result(engine: Any) -> int:
        from unicorn import arm64_const as arm

        return int(engine.reg_read(arm.UC_ARM64_REG_W0))

    @staticmethod
    def without_arithmetic(code: bytes) -> bytes:
        return without_arithmetic(code)


class _X86:
    """x86-64 in the emulator: arguments in rdi, rsi, rdx and rcx, the address to return to on the stack."""

    @staticmethod
    def engine() -> Any:
        import unicorn

        return unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)

    @staticmethod
    def call(engine: Any, arguments: Sequence[int]) -> None:
        from unicorn import x86_const as x86

        registers = (x86.UC_X86_REG_RDI, x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDX, x86.UC_X86_REG_RCX)
        for register, value in zip(registers, arguments, strict=True):
            engine.reg_write(register, value)
        stack = _STACK + _STACK_BYTES - _PAGE - 8
        engine.mem_write(stack, _RETURN.to_bytes(8, "little"))
        engine.reg_write(x86.UC_X86_REG_RSP, stack)

    @staticmethod
    def program_counter(engine: Any) -> int:
        from unicorn import x86_const as x86

        return int(engine.reg_read(x86.UC_X86_REG_RIP))

    @staticmethod
    def result(engine: Any) -> int:
        from unicorn import x86_const as x86

        return int(engine.reg_read(x86.UC_X86_REG_EAX))

    @staticmethod
    def without_arithmetic(code: bytes) -> bytes:
        from autocomp.estimate.x86 import stand_in

        return stand_in(code, BASE)


_MACHINES: dict[str, type[_Arm64] | type[_X86]] = {"arm64": _Arm64, "x86-64": _X86}


def without_arithmetic(code: bytes) -> bytes:
    """AArch64 code with SIMD and floating-point data processing replaced by no-operations, but for what writes other registers or flags.

    Source: Arm Architecture Reference Manual for A-profile, C4.1.96 (Data Processing - Scalar Floating-Point and Advanced SIMD).
    """
    words = np.frombuffer(code, "<u4").copy()
    arithmetic = (words >> 25) & 7 == 7
    kept = (
        (words & 0x5F20_FC00 == 0x1E20_0000)  # conversions between floating point and integer registers
        | (words & 0x5F20_0000 == 0x1E00_0000)  # conversions between floating and fixed point
        | (words & 0xBFE0_EC00 == 0x0E00_2C00)  # smov, umov
        | (words & 0xFF20_FC07 == 0x1E20_2000)  # fcmp
        | (words & 0xFF20_0C00 == 0x1E20_0400)  # fccmp
    )
    words[arithmetic & ~kept] = 0xD503_201F
    return words.tobytes()


def _address_of_stop() -> int:
    from unicorn.unicorn_py3.unicorn import uclib

    return int(ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p).value or 0)


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Addresses of tensors, aligned as TVM aligns them (to 64 bytes), and the first page after them."""
    places, at = [], _HEAP
    for tensor in tensors:
        places.append(at)
        at = _round(at + _bytes(tensor), _LINE) + _LINE
    return places, _round(at, _PAGE)


def _bytes(tensor: Tensor) -> int:
    return int(np.prod(tensor[1], dtype=np.int64)) * _numpy_type(tensor[0]).itemsize


def _round(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _numpy_type(dtype: str) -> np.dtype:
    if dtype == "bfloat16":
        import ml_dtypes

        result: np.dtype = np.dtype(ml_dtypes.bfloat16)
        return result
    try:
        return np.dtype(dtype)
    except TypeError:
        raise ObjectError(f"tensors of dtype {dtype} cannot be emulated") from None


def _dtype_name(dtype: np.dtype) -> str:
    return dtype.name


def _type_code(dtype: str) -> tuple[int, int]:
    kind = dtype.rstrip("0123456789")
    if kind not in _CODES:
        raise ObjectError(f"tensors of dtype {dtype} cannot be emulated; known: {', '.join(_CODES)} of any width")
    return _CODES[kind], 8 * _numpy_type(dtype).itemsize
