"""Vector quantisation: weights as indices into codebooks of 256 centroids, decoded when a layer is run or compiled.

    vector[n, v] = sum over stages s of codebook[s, indices[n, s, v]]        codebook float16 [S, 256, d], indices uint8 [N, S, V]
    weight[n, k] = scale[n] * vector[n, k // d][k % d]                       scale float32 [N]; K is padded with zeros to V runs of d

The scale of a row keeps one codebook fit for all of them, and lets a BatchNorm fold in without touching the indices. What it wins is
size: no kernel reads indices, the decoded weight is multiplied in float32.

Centroids are found by k-means, every weight counting by the Hessian's diagonal and the Fisher information of its output; indices are then
chosen with the errors fed back (``rounding``; as GPTVQ, arXiv:2402.15319). Stages after the first quantise what the ones before left.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from autocomp.layers.convolution import Convolution, Geometry, OneRow, convolved
from autocomp.layers.form import Form
from autocomp.layers.part import Part, Place, Stored
from autocomp.records.precisions import CODEBOOK


def decode(indices: Tensor, codebook: Tensor, scale: Tensor, columns: int) -> Tensor:
    """The float32 weight [N, columns] that indices, codebooks and scales stand for."""
    centroids, chosen = codebook.float(), indices.long()
    vectors = centroids[0][chosen[:, 0]]
    for stage in range(1, len(centroids)):
        vectors = vectors + centroids[stage][chosen[:, stage]]
    return vectors.flatten(1)[:, :columns] * scale[:, None]


class _Codebook(Stored):
    """What layers of codebooks share."""

    family = CODEBOOK
    codebook: Tensor
    scale: Tensor

    def scale_rows(self, factor: Tensor) -> None:
        self.scale.copy_(self.scale.double() * factor)


class CodebookLinear(_Codebook):
    """A linear layer whose weight is ``weight`` (indices [N, S, V]), ``codebook`` and ``scale``; float32 ``bias`` [N]."""

    def __init__(self, weight: Tensor, codebook: Tensor, scale: Tensor, bias: Tensor, in_features: int) -> None:
        super().__init__()
        for name, value in {"weight": weight, "codebook": codebook, "scale": scale, "bias": bias}.items():
            self.register_buffer(name, value)
        self.in_features, self.out_features = in_features, weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.float_weight(), self.bias)

    def float_weight(self) -> Tensor:
        """The float32 weight [N, K] that is multiplied."""
        return decode(self.weight, self.codebook, self.scale, self.in_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, stages={len(self.codebook)}, dim={self.codebook.shape[2]}"


class CodebookConv2d(_Codebook, Convolution):
    """A convolution stored as `CodebookLinear` is; ``kernel`` is (inputs of a group, height, width), K their product."""

    def __init__(
        self,
        weight: Tensor,
        codebook: Tensor,
        scale: Tensor,
        bias: Tensor,
        kernel: tuple[int, ...],
        geometry: Geometry,
    ) -> None:
        super().__init__({"weight": weight, "codebook": codebook, "scale": scale, "bias": bias}, geometry)
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, self.float_weight(), self.bias, self.geometry)

    def float_weight(self) -> Tensor:
        """The float32 weight OIHW that is multiplied."""
        weight = decode(self.weight, self.codebook, self.scale, math.prod(self.kernel))
        result: Tensor = weight.unflatten(1, self.kernel)
        return result

    def extra_repr(self) -> str:
        return f"{self.sizes(self.kernel)}, stages={len(self.codebook)}, dim={self.codebook.shape[2]}"


class CodebookConv1d(OneRow, CodebookConv2d):
    """A convolution of ``[N, C, L]``."""


_TENSORS = ("weight", "codebook", "scale", "bias")
FORMS = (
    Form(CodebookLinear, ("in_features",), _TENSORS),
    *(Form(kind, ("kernel", "geometry"), _TENSORS) for kind in (CodebookConv1d, CodebookConv2d)),
)


def layer_of(part: Part, place: Place) -> Stored:
    """The module on a stored weight."""
    assert part.bias is not None
    assert part.scale is not None
    assert part.codebook is not None
    if place.linear:
        return CodebookLinear(part.weight, part.codebook, part.scale, part.bias, part.columns)
    kind = CodebookConv1d if place.one_d else CodebookConv2d
    return kind(part.weight, part.codebook, part.scale, part.bias, place.kernel, place.geometry)
