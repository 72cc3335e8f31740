"""The products of bfloat16 pairs in vector registers (AVX512-BF16): sixteen float32 sums, to each of which two products are added.

TVM makes floats of bfloat16 operands before LLVM sees them, so the instruction is called by a function of LLVM's own language that takes the
bits as integers and is inlined. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2 (VDPBF16PS).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocomp.kernels.intrinsics import DotProduct

NAME = "autocomp_dpbf16ps"
SOURCE = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define <16 x float> @{NAME}(<16 x float> %sums, <32 x i16> %a, <32 x i16> %b) alwaysinline nounwind "target-features"="+avx512bf16,+avx512f,+avx512bw,+avx512vl" {{
  %x = bitcast <32 x i16> %a to <32 x bfloat>
  %y = bitcast <32 x i16> %b to <32 x bfloat>
  %added = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sums, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %added
}}
"""  # noqa: E501
LANES, PAIR = 16, 2


def pair(dot: DotProduct) -> tuple[Any, Any]:
    """What a tensor intrinsic computes, and how."""
    from tvm.script import tirx as T

    widened = dot.widened

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((PAIR,), "uint16", offset_factor=1),
        B: T.Buffer((LANES, PAIR), "uint16", offset_factor=1),
        C: T.Buffer((LANES,), "float32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:LANES], A[0:PAIR], B[0:LANES, 0:PAIR])
            T.writes(C[0:LANES])
            for i in T.serial(0, LANES):
                for k in T.serial(0, PAIR):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + widened(A[vk]) * widened(B[vi, vk])

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((PAIR,), "uint16", offset_factor=1),
        B: T.Buffer((LANES, PAIR), "uint16", offset_factor=1),
        C: T.Buffer((LANES,), "float32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:LANES], A[0:PAIR], B[0:LANES, 0:PAIR])
            T.writes(C[0:LANES])
            C[T.ramp(T.int32(0), 1, LANES)] = T.call_extern(
                "float32x16",
                NAME,
                C.vload([0], dtype="float32x16"),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], "uint16x2"), dtype="int32"), LANES), dtype="uint16x32"
                ),
                B.vload([0, 0], dtype="uint16x32"),
            )

    return description, implementation
