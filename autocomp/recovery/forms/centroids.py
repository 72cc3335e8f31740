"""Codebooks in training: the centroids of every stage learn, and the scale of each row; indices stay what they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autocomp.layers.codebook import CodebookConv2d, CodebookLinear, decode, layer_of
from autocomp.layers.part import Part, Stored
from autocomp.recovery.forms.form import Training, in_half


class TrainingCentroids(Training):
    """The form of `CodebookLinear` and `CodebookConv2d`: ``centroids`` [S, 256, d] in float32, rounded to float16 on the way forward."""

    indices: Tensor
    scale: Tensor

    def __init__(self, layer: CodebookLinear | CodebookConv2d) -> None:
        super().__init__(layer)
        self.columns = layer.in_features if isinstance(layer, CodebookLinear) else math.prod(layer.kernel)
        self.register_buffer("indices", layer.weight.detach().clone())
        self.register_buffer("scale", layer.scale.detach().clone())
        self.centroids = nn.Parameter(layer.codebook.detach().float())
        self.grown = nn.Parameter(torch.zeros_like(layer.scale))

    def weight(self) -> Tensor:
        books = in_half(self.centroids) if self.rounding else self.centroids
        flat = decode(self.indices, books, self.scale * torch.exp(self.grown), self.columns)
        return flat if self.place.linear else flat.unflatten(1, self.place.kernel)

    def stored(self) -> Stored:
        with torch.no_grad():
            scale = self.scale * torch.exp(self.grown)
        books, bias = self.centroids.detach().half(), self.bias.detach().clone()
        part = Part(self.indices.clone(), bias, scale=scale, codebook=books, columns=self.columns)
        return layer_of(part, self.place).eval()
