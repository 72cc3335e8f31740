"""Which tiles suit Arm's 128-bit vectors: an analytic first guess for cores with two pipes of them (Cortex-A76).

A cycle issues four instructions, of which two may be vector arithmetic and two loads. A multiply-add takes one operand from a lane of a
register, so an input value is loaded, not broadcast; with the reduction unrolled by four or eight, weights are loaded in pairs. Source
of the widths: Arm Cortex-A76 Software Optimization Guide, sections 2.1 and 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.hardware.profile import Profile
from autocomp.kernels.intrinsics import dot_product
from autocomp.records.precisions import arithmetic_of

if TYPE_CHECKING:
    from autocomp.kernels.tile import Anchor, Tile

# Above so many sums LLVM spills some; where the reduction is unrolled too, that was seen of 8 x 3 and 4 x 6, not of 7 x 3.
_SUMS, _UNROLLED_SUMS = 27, 21
_SPILL = 1.5
_CHAIN = 2  # cycles between multiply-adds into one sum, by forwarding


def is_neon(profile: Profile) -> bool:
    return profile.int8 == "sdot"


def cost(tile: Tile, anchor: Anchor, profile: Profile) -> float:
    """Relative cycles a product; only the order matters."""
    rows, vectors = tile.rows * tile.rows_up, tile.vectors
    sums = rows * vectors
    if arithmetic_of(anchor.template).dot:
        steps = dot_product(profile).of_width(anchor.reduction[-1]).steps
        input_loads, weight_loads, broadcasts = rows, steps * vectors, 0
    else:
        steps = tile.unroll
        # a step by itself keeps its pointer by a load that broadcasts, which takes a slot of the arithmetic
        input_loads, weight_loads, broadcasts = rows * steps, vectors * steps, int(steps == 1)
        if steps > 1:
            weight_loads //= 2
    loads, products = input_loads + weight_loads, sums * steps
    cycles = max((products + broadcasts) / 2, loads / 2, (products + loads + 4) / 4, _CHAIN * steps)
    if sums > (_UNROLLED_SUMS if steps > 1 else _SUMS):
        cycles *= _SPILL
    # what is read anew for every tile should be the lesser: the inputs' values, or the weights' vectors
    streamed = rows if tile.channels_outer else 4 * vectors
    return cycles / products + 0.01 * loads / products + (0.05 + 0.004 * streamed) / sums


def depthwise_cost(tile: Tile) -> float:
    """As ``cost``: about 15 sums; short rows of more registers, for what is done once a pixel is then done less often."""
    sums = tile.rows * tile.vectors
    return abs(sums - 15) + (0 if tile.band else 8) + 0.1 * tile.rows + 0.01 * abs(tile.band - 7)
