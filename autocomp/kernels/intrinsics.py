"""The integer dot-product instructions of a target, as tensor intrinsics of our own.

A product of one input value with every lane needs that value in all lanes. x86 broadcasts it from memory at no cost; on Arm a
broadcasting load takes a slot of the vector pipes, so several inputs are loaded as one register and each instruction names
the one it multiplies by: one intrinsic then stands for several instructions (``steps``).

TVM's stock VNNI intrinsic is written for an older LLVM (its operand types changed with LLVM 22), and importing TVM's
collection of intrinsics takes more than ten seconds, so the few needed are registered here, when first used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autocomp.hardware.profile import Profile
from autocomp.kernels import bf16_dot
from autocomp.records.precisions import BFLOAT16, INT8


@dataclass(frozen=True)
class DotProduct:
    """One instruction's shape: ``lanes`` int32 sums, each over ``depth`` products of activation and weight.

    ``activation`` and ``weight`` are the element types the kernels store; ``intrinsic`` is LLVM's name, or that of a function that ``source``
    defines in LLVM's language. ``steps`` instructions,
    each over the next ``depth`` products, make one tensor intrinsic. ``matrix``: kernels may also run in registers of sixteen such depths
    (`kernels.matrix`), by ``tile``. ``sums`` is the type of the sums.
    """

    name: str
    lanes: int
    depth: int
    activation: str
    weight: str
    intrinsic: str
    steps: int = 1
    matrix: bool = False
    sums: str = "int32"
    arithmetic: str = INT8.name
    tile: str = "llvm.x86.tdpbusd"  # LLVM's name of the instruction on matrix registers
    source: str = ""

    def widened(self, value: Any) -> Any:
        """A stored element as a number of the sums' type."""
        from tvm import tirx

        if self.sums == "int32":
            return value.astype("int32")
        bits = value.astype("uint32") << tirx.const(16, "uint32")  # the upper half of a float32
        return tirx.reinterpret("float32", bits)

    @property
    def element_bytes(self) -> int:
        return 4 // self.depth

    @property
    def width(self) -> int:
        """Products of one lane in the tensor intrinsic; the reduced axis is padded to a multiple of it."""
        return self.depth * self.steps

    @property
    def offset(self) -> int:
        """What is taken off the specification's activations, which are 0 to 255, to store them."""
        return 128 if self.activation == "int8" else 0

    def fit(self, depth: int) -> DotProduct:
        """This instruction with the widest intrinsic that pads a reduction of ``depth`` no more than a narrower one does."""
        if self.steps == 1 or -(-depth // self.width) * 2 == -(-2 * depth // self.width):
            return self
        return self.of_width(self.width // 2)

    def of_width(self, width: int) -> DotProduct:
        """This instruction with an intrinsic over ``width`` products of each lane."""
        return replace(self, steps=width // self.depth)

    def register(self) -> str:
        """Register with TVM (once) and return the name to tensorize with."""
        from tvm.s_tir import TensorIntrin

        name = f"autocomp_{self.name}" + (f"_{self.steps}" if self.steps > 1 else "")
        if TensorIntrin.get(name, allow_missing=True) is None:
            pair = (_description(self), _implementation(self)) if self.steps == 1 else _by_lane(self)
            TensorIntrin.register(name, *pair)
        return name


# vpdpbusd: 4 products u8 x s8 added to each int32 lane, no intermediate saturation (Intel SDM vol. 2, VPDPBUSD).
_VNNI512 = DotProduct("vnni512", 16, 4, "uint8", "int8", "llvm.x86.avx512.vpdpbusd.512")
_VNNI256 = DotProduct("vnni256", 8, 4, "uint8", "int8", "llvm.x86.avx512.vpdpbusd.256")
# vpmaddwd: 2 products s16 x s16 into int32; exact, where vpmaddubsw would saturate at 16 bits (Intel SDM vol. 2).
_MADD256 = DotProduct("madd256", 8, 2, "int16", "int16", "llvm.x86.avx2.pmadd.wd")

# sdot by lane: 4 products s8 x s8 of each lane with one 32-bit lane of another register (Arm Architecture Reference Manual, SDOT (by element)).
_SDOT = DotProduct("sdot", 4, 4, "int8", "int8", "llvm.aarch64.neon.sdot.v4i32.v16i8", steps=4)


# Pairs of bfloat16, stored as their bits, into float32 (Intel SDM vol. 2, VDPBF16PS; TDPBF16PS in matrix registers).
_BRAIN = DotProduct(
    "brain", 16, 2, "uint16", "uint16", bf16_dot.NAME, sums="float32", arithmetic=BFLOAT16.name, tile="llvm.x86.tdpbf16ps",
    source=bf16_dot.SOURCE,
)  # fmt: skip


def dot_product(profile: Profile, arithmetic: str = INT8.name) -> DotProduct:
    """The instruction that a profile's kernels are built on, of an arithmetic that adds several products at once."""
    if arithmetic == _BRAIN.arithmetic:
        return replace(_BRAIN, matrix=profile.matrix)
    dot = {"vnni512": _VNNI512, "vnni256": _VNNI256, "sdot": _SDOT, "none": _MADD256}[profile.int8]
    return replace(dot, matrix=profile.matrix and dot is _VNNI512)


def _description(dot: DotProduct) -> Any:
    from tvm.script import tirx as T

    lanes, depth = dot.lanes, dot.depth
    activation, weight, sums, widened = dot.activation, dot.weight, dot.sums, dot.widened

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((depth,), activation, offset_factor=1),
        B: T.Buffer((lanes, depth), weight, offset_factor=1),
        C: T.Buffer((lanes,), sums, offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:depth], B[0:lanes, 0:depth])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, depth):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + widened(A[vk]) * widened(B[vi, vk])

    return description


def _implementation(dot: DotProduct) -> Any:
    from tvm import tirx
    from tvm.script import tirx as T

    lanes, depth = dot.lanes, dot.depth
    activation, weight, sums, intrinsic = dot.activation, dot.weight, dot.sums, dot.intrinsic
    accumulator, w_vector = f"{sums}x{lanes}", f"{weight}x{lanes * depth}"

    def added(A: Any, B: Any, C: Any) -> Any:
        """The sums with the products of one group of inputs, which all lanes share."""
        bits = tirx.reinterpret("int32", A.vload([0], f"{activation}x{depth}"))
        value, inputs = C.vload([0], accumulator), tirx.reinterpret(w_vector, tirx.Broadcast(bits, lanes))
        weights = B.vload([0, 0], w_vector)
        if dot.source:
            return tirx.call_extern(accumulator, intrinsic, value, inputs, weights)
        if dot.name == _MADD256.name:  # which adds to nothing
            return value + tirx.call_llvm_pure_intrin(accumulator, intrinsic, inputs, weights)
        return tirx.call_llvm_pure_intrin(accumulator, intrinsic, value, inputs, weights)

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((depth,), activation, offset_factor=1),
        B: T.Buffer((lanes, depth), weight, offset_factor=1),
        C: T.Buffer((lanes,), sums, offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:depth], B[0:lanes, 0:depth])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = added(A, B, C)

    return implementation


def _by_lane(dot: DotProduct) -> tuple[Any, Any]:
    """Description and implementation of ``steps`` instructions that take their input from successive lanes of one register."""
    from tvm import tirx
    from tvm.script import tirx as T

    lanes, depth, steps, width = dot.lanes, dot.depth, dot.steps, dot.width
    activation, weight, intrinsic = dot.activation, dot.weight, dot.intrinsic
    accumulator, w_vector = f"int32x{lanes}", f"{weight}x{lanes * depth}"

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((width,), activation, offset_factor=1),
        B: T.Buffer((steps, lanes, depth), weight, offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:width], B[0:steps, 0:lanes, 0:depth])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, width):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vk // depth, vi, vk % depth], "int32")

    def added(A: Any, B: Any, C: Any) -> Any:
        """The sums after all steps: one load of the inputs, of which LLVM then names a lane in each instruction."""
        inputs = [tirx.reinterpret(f"int32x{steps}", A.vload([0], f"{activation}x{width}"))] * (lanes // steps)
        value = C.vload([0], accumulator)
        for step in range(steps):
            lane = tirx.Shuffle(inputs, [tirx.const(step, "int32")] * lanes)
            value = tirx.call_llvm_pure_intrin(
                accumulator, intrinsic, value, B.vload([step, 0, 0], w_vector), tirx.reinterpret(w_vector, lane)
            )
        return value

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((width,), activation, offset_factor=1),
        B: T.Buffer((steps, lanes, depth), weight, offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:width], B[0:steps, 0:lanes, 0:depth])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = added(A, B, C)

    return description, implementation
