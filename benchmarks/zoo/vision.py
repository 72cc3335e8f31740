"""Image models: ResNet, MobileNetV2, EfficientNet, ViT. Each function returns (model in evaluation mode, example inputs)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.attention import PreNormBlock
from zoo.inputs import settle, smooth_noise

Built = tuple[nn.Module, tuple[Tensor, ...]]


def _conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class _Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``; the body is basic (two 3x3) or a bottleneck (1x1, strided 3x3, 1x1 to four times the width)."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = width * 4 if bottleneck else width
        if bottleneck:
            body = [
                _conv_norm(inputs, width, 1),
                _conv_norm(width, width, 3, stride),
                _conv_norm(width, outputs, 1, act=None),
            ]
        else:
            body = [_conv_norm(inputs, width, 3, stride), _conv_norm(width, width, 3, act=None)]
        self.body = nn.Sequential(*body)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _resnet(blocks: Sequence[int], bottleneck: bool, small: bool, batch: int, image: int) -> Built:
    torch.manual_seed(0)
    widths, blocks, image = ((16, 24, 32, 48), (1, 1, 1, 1), 32) if small else ((64, 128, 256, 512), blocks, image)
    layers: list[nn.Module] = [_conv_norm(3, widths[0], 7, 2), nn.MaxPool2d(3, 2, 1)]
    channels = widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for index in range(count):
            layers.append(_Residual(channels, width, 2 if stage and not index else 1, bottleneck))
            channels = width * 4 if bottleneck else width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    return settle(nn.Sequential(*layers), smooth_noise(4, 3, 96, 96, seed=1)), (smooth_noise(batch, 3, image, image),)


def resnet18(*, small: bool = False, batch: int = 1, image: int = 224) -> Built:
    """ResNet-18, 11.69 M parameters (He et al. 2016, arXiv:1512.03385, table 1)."""
    return _resnet((2, 2, 2, 2), False, small, batch, image)


def resnet50(*, small: bool = False, batch: int = 1, image: int = 224) -> Built:
    """ResNet-50, 25.56 M parameters (ibid.), the stride on the 3x3 convolution as is now usual."""
    return _resnet((3, 4, 6, 3), True, small, batch, image)


class _SqueezeExcite(nn.Module):
    """Channels scaled by a gate computed from their means (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = nn.functional.silu(self.down(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.up(gate))


class _Inverted(nn.Module):
    """1x1 expansion, depthwise, optional squeeze-excite, linear 1x1; the input is added where shapes agree."""

    def __init__(
        self, inputs: int, outputs: int, expand: int, kernel: int, stride: int, act: type[nn.Module], squeeze: bool
    ) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = [] if expand == 1 else [_conv_norm(inputs, hidden, 1, act=act)]
        layers.append(_conv_norm(hidden, hidden, kernel, stride, hidden, act))
        if squeeze:
            layers.append(_SqueezeExcite(hidden, max(1, inputs // 4)))
        layers.append(_conv_norm(hidden, outputs, 1, act=None))
        self.body, self.residual = nn.Sequential(*layers), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def _inverted_net(
    stem: int, rows: Sequence[tuple[int, int, int, int, int]], last: int, act: type[nn.Module], squeeze: bool
) -> nn.Module:
    """``rows`` hold expansion, outputs, repeats, stride, kernel."""
    layers: list[nn.Module] = [_conv_norm(3, stem, 3, 2, act=act)]
    channels = stem
    for expand, outputs, repeats, stride, kernel in rows:
        for index in range(repeats):
            layers.append(_Inverted(channels, outputs, expand, kernel, stride if not index else 1, act, squeeze))
            channels = outputs
    layers += [_conv_norm(channels, last, 1, act=act), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 1000)]
    return nn.Sequential(*layers)


_V2 = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3),
)  # fmt: skip
_B0 = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip
_SMALL = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 5))


def mobilenet_v2(*, small: bool = False, batch: int = 1, image: int = 224) -> Built:
    """MobileNetV2 1.0 with ReLU6, 3.50 M parameters (Sandler et al. 2018, arXiv:1801.04381, table 2)."""
    torch.manual_seed(0)
    rows, last, image = (_SMALL, 96, 32) if small else (_V2, 1280, image)
    model = _inverted_net(16 if small else 32, rows, last, nn.ReLU6, squeeze=False)
    return settle(model, smooth_noise(4, 3, 96, 96, seed=1)), (smooth_noise(batch, 3, image, image),)


def efficientnet_b0(*, small: bool = False, batch: int = 1, image: int = 224) -> Built:
    """EfficientNet-B0 with squeeze-excite and SiLU, 5.29 M parameters (Tan & Le 2019, arXiv:1905.11946, table 1)."""
    torch.manual_seed(0)
    rows, last, image = (_SMALL, 96, 32) if small else (_B0, 1280, image)
    model = _inverted_net(16 if small else 32, rows, last, nn.SiLU, squeeze=True)
    return settle(model, smooth_noise(4, 3, 96, 96, seed=1)), (smooth_noise(batch, 3, image, image),)


class _ViT(nn.Module):
    def __init__(self, image: int, patch: int, dim: int, heads: int, depth: int, plain: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(PreNormBlock(dim, heads, 4 * dim, eps=1e-6, plain=plain) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def vit_tiny(*, small: bool = False, batch: int = 1, image: int = 224, plain: bool = False) -> Built:
    """ViT-Ti/16, 5.72 M parameters (Dosovitskiy et al. 2021, arXiv:2010.11929; Ti of Touvron et al. 2021, arXiv:2012.12877).

    ``plain`` writes attention as products and a softmax instead of ``scaled_dot_product_attention``.
    """
    torch.manual_seed(0)
    image = 64 if small else image
    model = _ViT(image, 16, 48 if small else 192, 3, 2 if small else 12, plain)
    return settle(model), (smooth_noise(batch, 3, image, image),)
