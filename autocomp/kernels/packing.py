"""How constant weights lie in memory: packed when the module is built, for the templates' tiles to read in order.

Weights of contractions become ``[O/L][KH][KW][I][L]`` (floats) or ``[O/L][KH][KW][I/depth][L][depth]`` (integers; the steps of an
intrinsic that takes several stand before L), where L is one vector register's lanes: a tile of several registers reads several
such streams, so the packing does not depend on the tile that tuning picks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.kernels.intrinsics import DotProduct
from autocomp.kernels.specs import round_up

if TYPE_CHECKING:
    from autocomp.kernels.specs import ConvSpec


def pack_conv_weight(weight: np.ndarray, spec: ConvSpec, dot: DotProduct | None) -> np.ndarray:
    """OIHW weight → packed (see the module). Depthwise weights become ``[KH][KW][C]``."""
    if spec.depthwise:
        dtype = weight.dtype if dot is None else "int32" if dot.steps == 1 else "float32"
        return np.ascontiguousarray(weight[:, 0].transpose(1, 2, 0)).astype(dtype)
    if spec.is_dense:
        return pack_dense_weight(weight[:, :, 0, 0], spec.lanes, dot)
    if spec.folds(dot):
        o, i, kh, kw = weight.shape
        weight = weight.transpose(0, 3, 1, 2).reshape(o, kw * i, kh, 1)
    return _blocked(weight, spec.lanes, dot)


def pack_volume_weight(weight: np.ndarray, lanes: int, *, depthwise: bool) -> np.ndarray:
    """OIDHW weight → ``[O/L][KD][KH][KW][I][L]``; depthwise ones become ``[KD][KH][KW][C]``."""
    if depthwise:
        return np.ascontiguousarray(weight[:, 0].transpose(1, 2, 3, 0))
    outputs, inputs, depth, height, width = weight.shape
    flat = _blocked(weight.reshape(outputs, inputs, depth * height, width), lanes, None)
    return flat.reshape(len(flat), depth, height, width, inputs, lanes)


def pack_dense_weight(weight: np.ndarray, lanes: int, dot: DotProduct | None) -> np.ndarray:
    """``[N, K]`` weight → ``[N/L][K][L]`` or ``[N/L][K/depth][L][depth]``, zero-padded to whole blocks."""
    return _blocked(weight[:, :, None, None], lanes, dot)[:, 0, 0]


def _blocked(weight: np.ndarray, lanes: int, dot: DotProduct | None) -> np.ndarray:
    """OIHW weight → packed (see the module), zero-padded to whole blocks."""
    o, i, kh, kw = weight.shape
    if dot is None:
        dot_lanes, steps, depth = lanes, 1, 1
    else:
        dot = dot.fit(i)
        dot_lanes, steps, depth = dot.lanes, dot.steps, dot.depth
    padded = np.zeros((round_up(o, dot_lanes), round_up(i, steps * depth), kh, kw), weight.dtype)
    padded[:o, :i] = weight
    blocks = padded.reshape(-1, dot_lanes, padded.shape[1] // (steps * depth), steps, depth, kh, kw)
    blocks = blocks.transpose(0, 5, 6, 2, 3, 1, 4)
    blocks = blocks if steps > 1 else blocks[:, :, :, :, 0]
    return np.ascontiguousarray(blocks.astype(dot.weight) if dot else blocks[..., 0])


def tap_of(weight: Any, o: Any, at: Sequence[Any], ri: Any, dot: DotProduct) -> Any:
    """The weight of output ``o`` at position ``ri`` of an intrinsic's products; ``at`` leads to the block."""
    if dot.steps == 1:
        return weight[(o // dot.lanes, *at, o % dot.lanes, ri)]
    return weight[(o // dot.lanes, *at, ri // dot.depth, o % dot.lanes, ri % dot.depth)]
