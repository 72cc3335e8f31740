"""Random inputs that resemble data, and weights brought to where a trained model's would be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_Norms = (nn.BatchNorm1d, nn.BatchNorm2d)


def smooth_noise(*shape: int, seed: int = 0) -> Tensor:
    """Noise whose last two axes are smooth, as pictures and spectrograms are; about zero mean and unit variance."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(*shape[:-2], *(max(2, size // 8) for size in shape[-2:]), generator=generator)
    lead = coarse.reshape(-1, 1, *coarse.shape[-2:])
    smooth = functional.interpolate(lead, size=shape[-2:], mode="bilinear", align_corners=False).reshape(shape)
    return 1.3 * smooth + 0.3 * torch.randn(shape, generator=generator)


def like(examples: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Other inputs of the same shapes."""
    return tuple(smooth_noise(*x.shape, seed=seed) for x in examples)


@torch.no_grad()
def settle(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Set BatchNorm's statistics to the data's own, then disturb them and the affine factors; returns the model, evaluating.

    Random statistics that have nothing to do with the activations would let a deep network overflow or die out.
    """
    norms = [module for module in model.modules() if isinstance(module, _Norms)]
    generator = torch.Generator().manual_seed(7)
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
        norm.bias.copy_(0.2 * torch.randn(norm.num_features, generator=generator))
    if norms:
        model.train()(*inputs)
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        spread = norm.running_var.sqrt()
        norm.running_mean.add_(0.1 * spread * torch.randn(norm.num_features, generator=generator))
        norm.running_var.mul_(0.7 + 0.6 * torch.rand(norm.num_features, generator=generator)).clamp_(min=1e-3)
    return model.eval().requires_grad_(False)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
