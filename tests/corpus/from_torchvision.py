"""Models of torchvision: classifiers, segmentation, detectors up to their raw boxes, video, optical flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from corpus.entry import Entry, Input, Kind, image
from corpus.packages import torchvision


def _named(name: str, options: dict[str, Any]) -> nn.Module:
    model: nn.Module = torchvision().models.get_model(name, weights=None, **options)
    return model


def _entry(name: str, size: int, kind: Kind = "classifier", **options: Any) -> Entry:
    return Entry(f"torchvision/{name}", kind, partial(_named, name, {"num_classes": 10, **options}), image(size))


def _made(name: str, make: Callable[[], nn.Module], size: int, kind: Kind = "classifier") -> Entry:
    return Entry(f"torchvision/{name}", kind, make, image(size))


def _densenet() -> nn.Module:
    densenet: nn.Module = torchvision().models.DenseNet(16, (2, 3, 3, 2), 32, num_classes=10)
    return densenet


def _resnext() -> nn.Module:
    package = torchvision().models.resnet
    resnext: nn.Module = package.ResNet(package.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=32, width_per_group=4)
    return resnext


def _convnext() -> nn.Module:
    package = torchvision().models.convnext
    stages = [package.CNBlockConfig(48, 96, 1), package.CNBlockConfig(96, 192, 1), package.CNBlockConfig(192, None, 1)]
    convnext: nn.Module = package.ConvNeXt(stages, num_classes=10)
    return convnext


def _vit() -> nn.Module:
    vit: nn.Module = torchvision().models.VisionTransformer(64, 16, 3, 4, 128, 256, num_classes=10)
    return vit


def _swin(version: int) -> nn.Module:
    swin = torchvision().models.swin_transformer
    blocks: dict[str, Any] = {
        1: {},
        2: {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2},
    }[version]
    model: nn.Module = swin.SwinTransformer(
        [4, 4], 48, [1, 2, 1], [3, 6, 12], [4, 4], num_classes=10, norm_layer=partial(nn.LayerNorm, eps=1e-5), **blocks
    )
    return model


def _maxvit() -> nn.Module:
    model: nn.Module = torchvision().models.MaxVit(
        input_size=(64, 64), stem_channels=32, partition_size=4, block_channels=[32, 64], block_layers=[1, 1], head_dim=16,
        stochastic_depth_prob=0.0, num_classes=10,
    )  # fmt: skip
    return model


class _Raw(nn.Module):
    """A detector's backbone and heads on one feature pyramid: what it knows before boxes are decoded and thinned out."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head if hasattr(detector, "head") else detector.rpn.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def _detector(name: str, options: dict[str, Any]) -> nn.Module:
    make = getattr(torchvision().models.detection, name)
    return _Raw(make(weights=None, weights_backbone=None, **options))


def _pyramid(name: str) -> nn.Module:
    detection = torchvision().models.detection
    backbone = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return _Raw(getattr(detection, name)(backbone, num_classes=10))


def _detects(name: str, size: int, **options: Any) -> Entry:
    return Entry(f"torchvision/{name}", "detector", partial(_detector, name, options), image(size))


def _video(name: str) -> nn.Module:
    from torchvision.models.video import resnet as video

    block, convolutions, stem = {
        "r3d": (video.BasicBlock, [video.Conv3DSimple] * 4, video.BasicStem),
        "mc3": (video.BasicBlock, [video.Conv3DSimple] + [video.Conv3DNoTemporal] * 3, video.BasicStem),
        "r2plus1d": (video.BasicBlock, [video.Conv2Plus1D] * 4, video.R2Plus1dStem),
    }[name]
    return video.VideoResNet(block, convolutions, [1, 1, 1, 1], stem, num_classes=10)


def _mvit() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(1, 32, 64, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        MSBlockConfig(2, 64, 64, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    return MViT(
        (32, 32),
        4,
        blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=10,
    )


def _swin3d() -> nn.Module:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 32, [1, 2], [2, 4], [2, 4, 4], num_classes=10)


class _Flow(nn.Module):
    """RAFT with two updates instead of twelve; both pictures are inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.raft = torchvision().models.optical_flow.raft_small()

    def forward(self, first: Tensor, second: Tensor) -> Any:
        return self.raft(first, second, num_flow_updates=2)


def _clips(name: str, make: Callable[[], nn.Module], frames: int = 8, size: int = 32) -> Entry:
    return Entry(f"torchvision/{name}", "video", make, (Input((3, frames, size, size)),))


TORCHVISION: tuple[Entry, ...] = (
    _entry("squeezenet1_1", 64),
    _entry("resnet18", 64),
    _made("resnext", _resnext, 64),
    _made("densenet", _densenet, 64),
    _entry("googlenet", 64, aux_logits=False, init_weights=False),
    _entry("mobilenet_v2", 64),
    _entry("mobilenet_v3_small", 64),
    _entry("mnasnet0_5", 64),
    _entry("shufflenet_v2_x0_5", 64),
    _entry("efficientnet_b0", 64),
    _entry("regnet_y_400mf", 64),
    _made("convnext", _convnext, 64),
    _made("vit", _vit, 64),
    _made("swin", partial(_swin, 1), 64),
    _made("swin_v2", partial(_swin, 2), 64),
    _made("maxvit", _maxvit, 64),
    _entry("fcn_resnet50", 64, "segmentation", weights_backbone=None),
    _entry("deeplabv3_mobilenet_v3_large", 64, "segmentation", weights_backbone=None),
    _entry("lraspp_mobilenet_v3_large", 64, "segmentation", weights_backbone=None),
    _detects("ssdlite320_mobilenet_v3_large", 128),
    _made("retinanet", partial(_pyramid, "RetinaNet"), 64, "detector"),
    _made("fcos", partial(_pyramid, "FCOS"), 64, "detector"),
    _detects("fasterrcnn_mobilenet_v3_large_320_fpn", 64),
    _clips("r3d", partial(_video, "r3d")),
    _clips("mc3", partial(_video, "mc3")),
    _clips("r2plus1d", partial(_video, "r2plus1d")),
    _clips("mvit", _mvit, 4),
    _clips("swin3d", _swin3d, 4),
    Entry("torchvision/raft_small", "dense", _Flow, (Input((3, 128, 128)), Input((3, 128, 128)))),
)
