"""8- and 4-bit weights with float activations in training: levels of a learned scale for each row and group."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.compress.scales import quantise_groups
from autocomp.layers.part import Stored
from autocomp.layers.weight_only import HIGHEST, LOWEST, WeightOnlyConv2d, WeightOnlyLinear, pack_levels
from autocomp.recovery.forms.form import Training, divisor, levels


class TrainingGroups(Training):
    """The form of `WeightOnlyLinear` and `WeightOnlyConv2d`: ``latent`` [O, K] in float32; ``grown`` [O, G] are logarithms of what scales
    grew by."""

    scales: Tensor

    def __init__(self, layer: WeightOnlyLinear | WeightOnlyConv2d) -> None:
        super().__init__(layer)
        self.bits, self.group, self.make = layer.bits, layer.group, type(layer)
        self.register_buffer("scales", layer.scales.detach().clone())
        self.grown = nn.Parameter(torch.zeros_like(layer.scales))
        self.latent = nn.Parameter(layer.float_weight().detach().flatten(1).clone())

    def weight(self) -> Tensor:
        flat: Tensor = self.latent
        if self.rounding:
            whole, own = self._levels()
            flat = (whole * own[:, :, None]).flatten(1)[:, : self.latent.shape[1]]
        return flat if self.place.linear else flat.unflatten(1, self.place.kernel)

    def stored(self) -> Stored:
        columns = self.latent.shape[1]
        with torch.no_grad():
            whole, own = self._levels()
        kept = whole.flatten(1)[:, :columns].to(torch.int8)
        # as the database stores them: kernels of linear layers read whole groups, a convolution pads to whole bytes
        kept = functional.pad(kept, (0, -columns % (self.group if self.place.linear else 2 if self.bits == 4 else 1)))
        weight = pack_levels(kept) if self.bits == 4 else kept
        bias = self.bias.detach().clone()
        if self.place.linear:
            return WeightOnlyLinear(weight, own, bias, columns, self.bits, self.group).eval()
        assert issubclass(self.make, WeightOnlyConv2d)
        geometry = self.place.geometry
        return self.make(weight, own, bias, self.place.kernel, self.bits, self.group, geometry).eval()

    def refit(self) -> None:
        with torch.no_grad():
            self.scales.copy_(quantise_groups(self.latent, self.bits, self.group)[1])
            self.grown.zero_()

    def _levels(self) -> tuple[Tensor, Tensor]:
        """Levels [O, G, group], padded with zeros, and their scales [O, G]."""
        own = self.scales * torch.exp(self.grown)
        padded = functional.pad(self.latent, (0, -self.latent.shape[1] % self.group)).unflatten(1, (-1, self.group))
        return levels(padded / divisor(own)[:, :, None], LOWEST[self.bits], HIGHEST[self.bits]), own
