"""The products of bfloat16 pairs in vector registers (AVX512-BF16): sixteen float32 sums, to each of which two products are added.

TVM makes floats of bfloat16 operands before LLVM sees them, so the instruction is called by a function of LLVM's own language that takes the
bits as integers and is inlined. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2 (VDPBF16PS).
"""

from __future__ import annotations

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
