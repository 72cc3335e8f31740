"""Masks of single weights during a training: set at once, grown step by step, or moved to where weights are needed.

No kernel skips masked weights: what a mask saves is size. A masked weight is zero in the delivered layer too, as the level of zero is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from autocomp.layers.convolution import Layers
from autocomp.recovery.forms.form import Training
from autocomp.recovery.recipe import Phase

EVERY = 20  # steps between two changes of a mask
MOVED = 0.3  # of the weights that are left change places at first, of a mask that moves (RigL, arXiv:1911.11134); falls with a cosine
SETTLED = 0.75  # of a stage, after which masks stay: what is left learns


class Masks:
    """The masks of a model's weights along the stages of a recipe."""

    def __init__(self, form: nn.Module) -> None:
        self.weights = dict(maskable(form))
        self.kept: dict[str, Tensor] = {}  # by name: True where a weight stays
        self.stage, self.first = "", 0.0  # the stage under way, and the share that was masked when it began

    def begin(self, stage: Phase, step: int, within: float) -> None:
        """What a stage does at a step: a mask at once, by size; one that grows (cubic: Zhu & Gupta 2017, arXiv:1710.01878); one that moves."""
        if within == 0.0 or stage.name != self.stage:
            self.stage, self.first = stage.name, self.masked()
        wanted = stage.sparsity
        if stage.masks == "cubic" and within < SETTLED:
            if step % EVERY:
                return
            wanted = self.first + (wanted - self.first) * (1 - (1 - within / SETTLED) ** 3)
        if wanted > self.masked() + 1e-3:
            self.set(wanted, stage.together)

    def masked(self) -> float:
        """The share of weights that are masked."""
        total = sum(kept.numel() for kept in self.kept.values())
        return 1.0 - sum(int(kept.sum()) for kept in self.kept.values()) / total if total else 0.0

    def set(self, sparsity: float, together: bool) -> None:
        """Keep the largest weights: of all layers together, each measured by its own mean, or in each layer by itself."""
        sizes = {name: weight.detach().abs() for name, weight in self.weights.items()}
        for name, kept in self.kept.items():
            sizes[name] = sizes[name].masked_fill(~kept, 0.0)
        if together:
            scaled = {name: size / size.mean().clamp_min(1e-12) for name, size in sizes.items()}
            limit = _least(torch.cat([size.flatten() for size in scaled.values()]), sparsity)
            self.kept = {name: size > limit for name, size in scaled.items()}
        else:
            self.kept = {name: size > _least(size.flatten(), sparsity) for name, size in sizes.items()}
        self.apply()

    def move(self, stage: Phase, step: int, within: float) -> None:
        """Of a mask that moves: the smallest weights give way to masked ones of the largest gradients. To be called once these are there."""
        if stage.masks != "dynamic" or not self.kept or step % EVERY or within > SETTLED:
            return
        share = MOVED / 2 * (1 + math.cos(math.pi * min(1.0, within / SETTLED)))
        for name, kept in self.kept.items():
            weight = self.weights[name]
            count = min(int(share * int(kept.sum())), int((~kept).sum()))
            if not count or weight.grad is None:
                continue
            size = weight.detach().abs().masked_fill(~kept, math.inf).flatten()
            gradient = weight.grad.abs().masked_fill(kept, -1.0).flatten()
            flat = kept.flatten().clone()
            flat[size.topk(count, largest=False).indices] = False
            flat[gradient.topk(count).indices] = True
            self.kept[name] = flat.view_as(kept)
        self.apply()

    def apply(self) -> None:
        """Set what is masked to zero."""
        with torch.no_grad():
            for name, kept in self.kept.items():
                self.weights[name].mul_(kept)


def maskable(form: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights that may be masked: of convolutions and linear layers, in floats or as they are rounded; not of the last layer."""
    found: list[tuple[str, nn.Parameter]] = []
    for name, module in form.named_modules():
        if isinstance(module, Training) and isinstance(latent := getattr(module, "latent", None), nn.Parameter):
            found.append((f"{name}.latent", latent))
        elif isinstance(module, Layers) and isinstance(module.weight, nn.Parameter):
            found.append((f"{name}.weight", module.weight))
    yield from found[:-1]


def _least(values: Tensor, sparsity: float) -> float:
    """The largest of the values that a sparsity masks; less than any for none."""
    count = int(sparsity * len(values))
    return float(values.kthvalue(count).values) if count else -1.0
