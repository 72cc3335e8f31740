"""The table of precisions: what each stores, what it computes in, which layers have kernels for it, and where the code of each stage stands.

Free of torch and TVM. Code is named (``module:name``) and imported by `load` when a stage first asks for it, so that a precision is one entry
here and the modules that the entry names: no other module knows a precision by its name, which tests/records/test_one_entry.py holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal

from autocomp.records.recurrent import GATES, IN_8_BITS
from autocomp.records.tolerance import Errors

# fp16, bf16: weights and activations in 16 bits. w8a8: both in 8. w8, w4: weights alone, a scale for 64 of them unless g32 or g128 says other.
# vq, rvq: codebooks, the number being bits a weight; rvq ones spend them on several stages over longer runs.
Precision = Literal[
    "fp32", "fp16", "bf16", "w8a8", "w8", "w8g32", "w8g128", "w4", "w4g32", "w4g128",
    "vq8", "vq4", "vq2", "vq1", "rvq4", "rvq3", "rvq2",
]  # fmt: skip
FP32: Precision = "fp32"  # what a layer is in that is not compressed

CENTROIDS = 256  # of every codebook: an index is one byte
GROUPS = (32, 64, 128)  # weights along K that may share a scale: those the kernels know


@dataclass(frozen=True, eq=False)
class Arithmetic:
    """What kernels multiply in: operands of ``bits`` bits, in the ``templates`` it has of its own (``dense`` → ``dense_int8``).

    A compiled model may differ from torch by ``tolerance``; ``exact``: a layer by itself by no bit. ``product`` makes the product that
    the machine's peak is measured with. ``dot``: several products are added to a sum at once (`kernels.intrinsics`). ``runs``: sums in short
    runs that float32 adds up (`kernels.fp16`). ``result`` are the bytes of what a kernel writes.
    """

    name: str
    bits: int
    templates: tuple[str, ...]
    tolerance: Errors
    product: str
    exact: bool = False
    dot: bool = False
    runs: bool = False
    result: int = 4

    def template(self, operation: str) -> str:
        """The template of an operation; that of float32 where this arithmetic has none of its own."""
        return f"{operation}_{self.name}" if operation in self.templates else operation


FLOAT32 = Arithmetic("fp32", 32, (), Errors(1e-3, 1e-3, 1e-3, 1e-3), "autocomp.kernels.compute:float32_product")
# operands of 11 bits, and kernels may sum in them
FLOAT16 = Arithmetic(
    "fp16", 16, ("conv2d", "dense", "depthwise"), Errors(1e-2, 1e-2, 5e-2, 1e-3), "autocomp.kernels.fp16:product", runs=True, result=2
)  # fmt: skip
# operands of 8 bits, exact products summed in float32; between layers a value may be moved over a rounding step, as between integer ones
BFLOAT16 = Arithmetic(
    "bf16", 16, ("conv2d", "dense"), Errors(2e-2, 5e-2, 0.25, 1e-3), "autocomp.kernels.bf16:product", dot=True, result=2
)  # fmt: skip
# An 8-bit layer is exact by itself, but where a float layer feeds it, a sum in another order can move a value over a rounding step: a few
# activations then differ by one level of 255, and now and then an output by a percent or more. In a residual CNN of 20 quantised layers
# all outputs together differ by 1.3 to 1.7 % between runtimes, and by as much when it is nudged.
INT8 = Arithmetic(
    "int8", 8, ("conv2d", "dense", "loop"), Errors(2e-2, 5e-2, 0.25, 1e-3), "autocomp.kernels.compute:int8_product", exact=True, dot=True
)  # fmt: skip
ARITHMETICS: Mapping[str, Arithmetic] = {
    each.name: each for each in (FLOAT32, FLOAT16, BFLOAT16, INT8)
}  # the finest first


def arithmetic_of(template: str) -> Arithmetic:
    """What a kernel's template multiplies in."""
    return ARITHMETICS.get(template.rpartition("_")[2], FLOAT32)


@dataclass(frozen=True, eq=False)
class Family:
    """Precisions that store a weight in one way: what has kernels for it, and the code of each stage that knows how.

    ``layer`` makes the torch module of a stored weight (`layers.part`), ``forms`` are the modules that a file may hold (`layers.form`),
    ``store`` rounds a float weight (`database.store`), ``size`` is the bytes that it then takes. ``trains`` makes the form in which a module
    is trained (`recovery.forms`); torch's own layers train as they are. ``lowering`` translates the modules' custom
    ops to Relax, ``onnx`` to ONNX: modules that are made of torch's operations need none.

    ``covers`` are the layers with kernels: linear ones, plain convolutions (`Layer.is_plain`), other ones; ``loops`` the kinds of recurrent
    layers. The kernels are there on a profile that lists the precision, or ``everywhere``; ``needs`` is LLVM's name of an instruction set
    that they use, by architecture, and this machine offers them from ``detected`` float32 lanes on (0: not by itself). ``kernel`` states
    the loops of a linear layer's kernel that is none of the arithmetic's. What has no kernel ``decodes`` to float32, or is refused.
    ``flat``: the weight of a convolution, too, stays [O, K].
    """

    arithmetic: Arithmetic
    layer: str
    size: Callable[[Format, int, int, bool], int]
    store: str = ""
    forms: str = ""
    trains: str = ""
    lowering: str = ""
    onnx: str = ""
    covers: tuple[Literal["linear", "plain", "other"], ...] = ()
    loops: tuple[str, ...] = ()
    everywhere: bool = False
    decodes: bool = True
    needs: Mapping[str, str] = field(default_factory=dict)
    kernel: str = ""
    detected: int = 0
    flat: bool = False


@dataclass(frozen=True)
class Format:
    """A precision: ``bits`` a weight, in the way of its ``family``.

    Of a grouped one a float32 scale is for each row and ``group`` columns; of a codebook, for each run of ``dim`` columns there are ``stages``
    one-byte indices into as many float16 codebooks of 256 centroids. ``baseline``: uniform candidates in it stand beside every front.
    """

    name: Precision
    family: Family
    bits: float
    group: int = 0
    dim: int = 0
    stages: int = 0
    baseline: bool = False

    def weight_bytes(self, outputs: int, columns: int, linear: bool) -> int:
        """Bytes of a weight [outputs, columns] with its scales and codebooks, without the bias; ``linear``: of a linear layer."""
        return self.family.size(self, outputs, columns, linear)

    def needs(self, architecture: str) -> str:
        """LLVM's name of the instruction set that its kernels use on an architecture; empty where they use none but the common."""
        needed = self.family.needs
        return needed.get(architecture, next(iter(needed.values()), ""))

    @property
    def codebook_bytes(self) -> int:
        """Bytes of a layer's codebooks, whatever its size."""
        return self.stages * CENTROIDS * self.dim * 2


def _plain_bytes(form: Format, outputs: int, columns: int, linear: bool) -> int:
    return outputs * columns * int(form.bits) // 8


def _scaled_bytes(form: Format, outputs: int, columns: int, linear: bool) -> int:
    return outputs * (columns + 4)


def _grouped_bytes(form: Format, outputs: int, columns: int, linear: bool) -> int:
    group = group_of(form.name, columns)
    groups = -(-columns // group)
    stored = groups * group if linear else columns  # kernels read whole groups
    return outputs * ((stored if form.bits == 8 else -(-stored // 2)) + 4 * groups)


def _codebook_bytes(form: Format, outputs: int, columns: int, linear: bool) -> int:
    return outputs * (form.stages * -(-columns // form.dim) + 4) + form.codebook_bytes


FLOAT = Family(
    FLOAT32,
    layer="autocomp.layers.part:float_layer",
    size=_plain_bytes,
    covers=("linear", "plain", "other"),
    loops=tuple(GATES),
    detected=1,
)
HALF = Family(
    FLOAT16,
    layer="autocomp.layers.fp16:layer_of",
    size=_plain_bytes,
    store="autocomp.database.store:store_half",
    forms="autocomp.layers.fp16:FORMS",
    trains="autocomp.recovery.forms.half:TrainingHalf",
    lowering="autocomp.compiler.fp16:lowering",
    onnx="autocomp.export.onnx_fp16:translations",
    covers=("linear", "plain"),
    needs={"aarch64": "fullfp16", "x86_64": "avx512fp16"},
    detected=16,
)
BRAIN = Family(
    BFLOAT16,
    layer="autocomp.layers.bf16:layer_of",
    size=_plain_bytes,
    store="autocomp.database.store:store_brain",
    forms="autocomp.layers.bf16:FORMS",
    trains="autocomp.recovery.forms.half:TrainingBrain",
    lowering="autocomp.compiler.bf16:lowering",
    onnx="autocomp.export.onnx_bf16:translations",
    covers=("linear", "plain"),
    needs={"x86_64": "avx512bf16"},
    detected=16,
)
INTEGER = Family(
    INT8,
    layer="autocomp.layers.w8a8:layer_of",
    size=_scaled_bytes,
    store="autocomp.database.store:store_integers",
    forms="autocomp.layers.w8a8:FORMS",
    trains="autocomp.recovery.forms.integers:TrainingIntegers",
    lowering="autocomp.compiler.w8a8:lowering",
    onnx="autocomp.export.onnx_w8a8:translations",
    covers=("linear", "plain", "other"),
    loops=IN_8_BITS,
    decodes=False,
    detected=8,  # without a dot product eight-bit kernels widen, with AVX2's instructions at least
)
GROUPED = Family(
    FLOAT32,
    layer="autocomp.layers.weight_only:layer_of",
    size=_grouped_bytes,
    store="autocomp.database.store:store_groups",
    forms="autocomp.layers.weight_only:FORMS",
    trains="autocomp.recovery.forms.groups:TrainingGroups",
    lowering="autocomp.compiler.weight_only:lowering",
    onnx="autocomp.export.onnx_weight_only:translations",
    covers=("linear",),
    everywhere=True,
    kernel="autocomp.kernels.weight_only:loops",
    flat=True,
)
CODEBOOK = Family(
    FLOAT32,
    layer="autocomp.layers.codebook:layer_of",
    size=_codebook_bytes,
    store="autocomp.database.store:store_indices",
    forms="autocomp.layers.codebook:FORMS",
    trains="autocomp.recovery.forms.centroids:TrainingCentroids",
    flat=True,
)
FAMILIES = (FLOAT, HALF, BRAIN, INTEGER, GROUPED, CODEBOOK)


def _codebook(name: Precision, dim: int, stages: int = 1) -> Format:
    return Format(name, CODEBOOK, 8 * stages / dim, dim=dim, stages=stages)


FORMATS: Mapping[Precision, Format] = {
    form.name: form
    for form in (
        Format("fp32", FLOAT, 32, baseline=True),
        Format("fp16", HALF, 16),
        Format("bf16", BRAIN, 16),
        Format("w8a8", INTEGER, 8, baseline=True),
        Format("w8", GROUPED, 8, group=64),
        Format("w8g32", GROUPED, 8, group=32),
        Format("w8g128", GROUPED, 8, group=128),
        Format("w4", GROUPED, 4, group=64),
        Format("w4g32", GROUPED, 4, group=32),
        Format("w4g128", GROUPED, 4, group=128),
        _codebook("vq8", 1),
        _codebook("vq4", 2),
        _codebook("vq2", 4),
        _codebook("vq1", 8),
        _codebook("rvq4", 4, 2),
        _codebook("rvq3", 8, 3),
        _codebook("rvq2", 8, 2),
    )
}
PRECISIONS: tuple[Precision, ...] = tuple(FORMATS)
_BITS: Mapping[str, float] = {
    **{each.name: each.bits for each in ARITHMETICS.values()},
    **{form.name: form.bits for form in FORMATS.values()},
}


@cache
def load(reference: str) -> Any:
    """What a ``module:name`` of the table names."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def group_of(precision: Precision, columns: int) -> int:
    """Return the columns that share a scale in a row of ``columns``: a row no longer than a smaller group takes that one."""
    asked = FORMATS[precision].group
    return next((group for group in GROUPS if group >= columns and group < asked), asked)


def weight_bytes_of(template: str) -> float:
    """Bytes of one weight as a kernel of this template reads it: those of the precision, or the arithmetic, that its name ends with."""
    return _BITS.get(template.rpartition("_")[2], FLOAT32.bits) / 8
