"""A tile: the sizes a kernel is cut into; and what a schedule of it holds on to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from autocomp.hardware.profile import Profile
from autocomp.kernels.intrinsics import dot_product
from autocomp.records.precisions import Arithmetic, arithmetic_of


@dataclass(frozen=True)
class Tile:
    """One point of a template's tuning space.

    ``rows`` output pixels by ``vectors`` registers of channels are accumulated at a time, ``unroll`` steps of the reduction are unrolled,
    and ``channels_outer`` sweeps all pixels for one block of weights before the next block (else the reverse). A depthwise kernel takes
    ``band`` output rows of one block of channels at a time, and pads only the inputs of those, which then lie in the nearest cache (0: the
    whole input first). ``matrix``: in matrix registers (`kernels.matrix`).
    """

    rows: int = 1
    vectors: int = 1
    unroll: int = 1
    channels_outer: bool = True
    rows_up: int = 1
    band: int = 0
    matrix: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def divisors(value: int, limit: int) -> list[int]:
    """The divisors of an extent up to a limit: what a loop is cut into without a rest."""
    return [divisor for divisor in range(1, min(value, limit) + 1) if value % divisor == 0]


@dataclass(frozen=True)
class Anchor:
    """What the scheduler must know of a fused function: its template, arithmetic, and the extents of its anchor's loops."""

    template: str
    flops: int
    spatial: tuple[int, ...] = ()
    reduction: tuple[int, ...] = ()


def lanes_in(arithmetic: Arithmetic, profile: Profile) -> int:
    """Elements of a vector of sums in an arithmetic: its operands fill a register, but for dot products, which add several to one sum."""
    return dot_product(profile, arithmetic.name).lanes if arithmetic.dot else profile.lanes * 32 // arithmetic.bits


def lanes_of(anchor: Anchor, profile: Profile) -> int:
    """Elements of a vector of the anchor's sums."""
    arithmetic = arithmetic_of(anchor.template)
    lanes = lanes_in(arithmetic, profile)
    if arithmetic.dot:
        return lanes
    if anchor.template.startswith(
        "depthwise"
    ):  # shorter vectors rather than a ragged one: channels are mostly multiples of 8
        shorter = math.gcd(anchor.spatial[-1], lanes)
        return shorter if shorter >= 4 else lanes
    return lanes
