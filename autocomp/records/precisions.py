"""What each precision stores: bits, groups and codebooks. One table, free of torch, that space, sizes and compression read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from autocomp.records.candidate import Precision

Kind = Literal["float", "integer", "grouped", "codebook"]

CENTROIDS = 256  # of every codebook: an index is one byte
GROUPS = (32, 64, 128)  # weights along K that may share a scale: those the kernels know


@dataclass(frozen=True)
class Format:
    """How a precision stores a weight matrix [N, K].

    ``float``: ``bits`` each. ``integer``: int8 weights, one float32 scale a row, and 8-bit activations. ``grouped``: levels of ``bits``
    bits, a float32 scale for each row and ``group`` columns. ``codebook``: for each run of ``dim`` columns ``stages`` one-byte indices
    into ``stages`` float16 codebooks of 256 centroids, and a float32 scale a row.
    """

    kind: Kind
    bits: float
    group: int = 0
    dim: int = 0
    stages: int = 0


def _codebook(dim: int, stages: int = 1) -> Format:
    return Format("codebook", 8 * stages / dim, dim=dim, stages=stages)


# Of codebooks, the number in the name is the bits a weight; rvq ones spend them on several stages over longer runs.
FORMATS: Mapping[Precision, Format] = {
    "fp32": Format("float", 32),
    "fp16": Format("float", 16),
    "w8a8": Format("integer", 8),
    "w8": Format("grouped", 8, group=64),
    "w8g32": Format("grouped", 8, group=32),
    "w8g128": Format("grouped", 8, group=128),
    "w4": Format("grouped", 4, group=64),
    "w4g32": Format("grouped", 4, group=32),
    "w4g128": Format("grouped", 4, group=128),
    "vq8": _codebook(1),
    "vq4": _codebook(2),
    "vq2": _codebook(4),
    "vq1": _codebook(8),
    "rvq4": _codebook(4, 2),
    "rvq3": _codebook(8, 3),
    "rvq2": _codebook(8, 2),
}


def group_of(precision: Precision, columns: int) -> int:
    """Return the columns that share a scale in a row of ``columns``: a row no longer than a smaller group takes that one."""
    asked = FORMATS[precision].group
    return next((group for group in GROUPS if group >= columns and group < asked), asked)
