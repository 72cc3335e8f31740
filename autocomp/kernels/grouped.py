"""Grouped convolutions whose groups are no whole vectors of output channels: made of fewer, wider groups, or of padded ones.

A vector of output channels reads the inputs of one group. ``m`` groups become one by zero weights between them (``m`` times the products),
or each group's outputs are padded with zero rows and dropped again; whichever multiplies less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocomp.kernels.specs import round_up


@dataclass(frozen=True)
class Regrouping:
    """``groups`` groups of ``outputs`` channels each, ``merged`` of which are taken as one whose outputs are padded to ``padded``."""

    groups: int
    outputs: int
    merged: int
    padded: int

    @classmethod
    def of(cls, groups: int, channels: int, lanes: int) -> Regrouping:
        """For ``channels`` output channels of all groups together."""
        each = channels // groups
        options = [
            cls(groups, each, merged, round_up(merged * each, lanes))
            for merged in range(1, lanes + 1)
            if groups % merged == 0
        ]
        return min(options, key=lambda option: (option.padded, -option.merged))

    @property
    def fewer(self) -> int:
        """Groups that are left."""
        return self.groups // self.merged

    @property
    def pads(self) -> bool:
        return self.padded != self.merged * self.outputs

    def weight(self, weight: np.ndarray) -> np.ndarray:
        """A grouped ``[O, I, *K]`` weight → ``[fewer * padded, merged * I, *K]``."""
        depth, *kernel = weight.shape[1:]
        wide = np.zeros((self.fewer, self.padded, self.merged * depth, *kernel), weight.dtype)
        split = weight.reshape(self.fewer, self.merged, self.outputs, depth, *kernel)
        for member in range(self.merged):
            rows, columns = (slice(member * size, (member + 1) * size) for size in (self.outputs, depth))
            wide[:, rows, columns] = split[:, member]
        return wide.reshape(self.fewer * self.padded, self.merged * depth, *kernel)

    def computed_weight(self, weight: Any) -> Any:
        """The same of a weight ``[O, *K, I]`` that is computed at run time → ``[fewer * padded, *K, merged * I]``."""
        from tvm import te, tirx

        kernel, depth = [int(size) for size in weight.shape[1:-1]], int(weight.shape[-1])

        def value(o: Any, *index: Any) -> Any:
            *tap, i = index
            group, row = o // self.padded, o % self.padded
            inside = tirx.all(row < self.merged * self.outputs, row // self.outputs == i // depth)
            channel = (group * self.merged + i // depth) * self.outputs + row % self.outputs
            return tirx.if_then_else(inside, weight[(channel, *tap, i % depth)], tirx.const(0, weight.dtype))

        return te.compute((self.fewer * self.padded, *kernel, self.merged * depth), value, name="regroup")

    def drop(self, sums: Any) -> Any:
        """The sums ``[..., fewer * padded]`` without those of zero rows."""
        from tvm import te

        shape: Sequence[int] = [int(size) for size in sums.shape[:-1]]
        wide = self.merged * self.outputs
        return te.compute(
            (*shape, self.groups * self.outputs),
            lambda *i: sums[(*i[:-1], i[-1] // wide * self.padded + i[-1] % wide)],
            name="take",
        )
