"""The integer dot-product instructions of a target, as tensor intrinsics of our own.

TVM's stock VNNI intrinsic is written for an older LLVM (its operand types changed with LLVM 22), and importing TVM's
collection of intrinsics takes more than ten seconds, so the few needed are registered here, when first used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autocomp.hardware import Profile


@dataclass(frozen=True)
class DotProduct:
    """One instruction's shape: ``lanes`` int32 sums, each over ``depth`` products of activation and weight.

    ``activation`` and ``weight`` are the element types the kernels store; ``intrinsic`` is LLVM's name.
    """

    name: str
    lanes: int
    depth: int
    activation: str
    weight: str
    intrinsic: str

    def register(self) -> str:
        """Register with TVM (once) and return the name to tensorize with."""
        from tvm.s_tir import TensorIntrin

        name = f"autocomp_{self.name}"
        if TensorIntrin.get(name, allow_missing=True) is None:
            TensorIntrin.register(name, _description(self), _implementation(self))
        return name


# vpdpbusd: 4 products u8 x s8 added to each int32 lane, no intermediate saturation (Intel SDM vol. 2, VPDPBUSD).
_VNNI512 = DotProduct("vnni512", 16, 4, "uint8", "int8", "llvm.x86.avx512.vpdpbusd.512")
_VNNI256 = DotProduct("vnni256", 8, 4, "uint8", "int8", "llvm.x86.avx512.vpdpbusd.256")
# vpmaddwd: 2 products s16 x s16 into int32; exact, where vpmaddubsw would saturate at 16 bits (Intel SDM vol. 2).
_MADD256 = DotProduct("madd256", 8, 2, "int16", "int16", "llvm.x86.avx2.pmadd.wd")


def dot_product(profile: Profile) -> DotProduct:
    """The instruction that a profile's int8 kernels are built on."""
    return {"vnni512": _VNNI512, "vnni256": _VNNI256, "none": _MADD256}[profile.int8]


def _description(dot: DotProduct) -> Any:
    from tvm.script import tirx as T

    lanes, depth = dot.lanes, dot.depth
    activation, weight = dot.activation, dot.weight

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((depth,), activation, offset_factor=1),
        B: T.Buffer((lanes, depth), weight, offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:depth], B[0:lanes, 0:depth])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, depth):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    return description


def _implementation(dot: DotProduct) -> Any:
    from tvm.script import tirx as T

    lanes, depth = dot.lanes, dot.depth
    activation, weight, intrinsic = dot.activation, dot.weight, dot.intrinsic
    accumulator = f"int32x{lanes}"
    a_vector = f"{activation}x{depth}"
    w_vector = f"{weight}x{lanes * depth}"

    if dot.depth == 4:

        @T.prim_func(s_tir=True)
        def implementation(
            A: T.Buffer((depth,), activation, offset_factor=1),
            B: T.Buffer((lanes, depth), weight, offset_factor=1),
            C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
        ) -> None:
            with T.sblock("root"):
                T.reads(C[0:lanes], A[0:depth], B[0:lanes, 0:depth])
                T.writes(C[0:lanes])
                C[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id(intrinsic),
                    C.vload([0], dtype=accumulator),
                    T.reinterpret(
                        T.broadcast(T.reinterpret(A.vload([0], a_vector), dtype="int32"), lanes), dtype=w_vector
                    ),
                    B.vload([0, 0], dtype=w_vector),
                    dtype=accumulator,
                )

        return implementation

    @T.prim_func(s_tir=True)
    def widened(
        A: T.Buffer((depth,), activation, offset_factor=1),
        B: T.Buffer((lanes, depth), weight, offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:depth], B[0:lanes, 0:depth])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = C.vload([0], dtype=accumulator) + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(intrinsic),
                T.reinterpret(T.broadcast(T.reinterpret(A.vload([0], a_vector), dtype="int32"), lanes), dtype=w_vector),
                B.vload([0, 0], dtype=w_vector),
                dtype=accumulator,
            )

    return widened
