"""Channels filled up to whole vectors before a kernel, and cut off after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from autocomp.kernels.specs import round_up


def whole_vectors(weight: np.ndarray, groups: int, lanes: int) -> np.ndarray:
    """Grouped OIHW weight with each group's outputs padded by zero rows to whole vectors, so that no vector reads two groups' inputs."""
    outputs = len(weight) // groups
    if groups == 1 or weight.shape[1] == outputs == 1 or outputs % lanes == 0:
        return weight
    padded = np.zeros((groups, round_up(outputs, lanes), *weight.shape[1:]), weight.dtype)
    padded[:, :outputs] = weight.reshape(groups, outputs, *weight.shape[1:])
    return padded.reshape(-1, *weight.shape[1:])


def in_whole_vectors(
    builder: Any, weight: np.ndarray, groups: int, lanes: int, sums: Callable[[np.ndarray], Any]
) -> Any:
    """What ``sums`` emits with a weight of whole vectors, without the channels that fill them up."""
    tiled = whole_vectors(weight, groups, lanes)
    result = sums(tiled)
    if len(tiled) == len(weight):
        return result
    return builder.emit_te(without_padding, result, groups, len(weight), primfunc_name_hint="take_channels")


def without_padding(sums: Any, groups: int, channels: int) -> Any:
    """The sums of the channels that ``whole_vectors`` was given."""
    from tvm import te

    outputs, padded = channels // groups, int(sums.shape[-1]) // groups
    return te.compute(
        (*sums.shape[:-1], channels),
        lambda *i: sums[(*i[:-1], i[-1] // outputs * padded + i[-1] % outputs)],
        name="take",
    )
