"""Image models of timm, each under timm's own name; depths are cut where the model lets one, so that each takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from corpus.entry import Entry, Kind, image
from corpus.packages import timm


def _make(name: str, options: dict[str, Any]) -> nn.Module:
    model: nn.Module = timm().create_model(name, **{"num_classes": 10, **options})
    return model


def _entry(name: str, size: int, kind: Kind = "classifier", **options: Any) -> Entry:
    return Entry(f"timm/{name}", kind, partial(_make, name, options), image(size))


def _class(name: str, size: int, make: Callable[[], nn.Module]) -> Entry:
    return Entry(f"timm/{name}", "classifier", make, image(size))


def _of(name: str, options: dict[str, Any]) -> nn.Module:
    """A class of timm with fewer blocks than any of its named models."""
    model: nn.Module = getattr(timm().models, name)(num_classes=10, **options)
    return model


def _mlp(block: str) -> nn.Module:
    package = timm()
    options: dict[str, Any] = {"block_layer": getattr(package.models.mlp_mixer, block)}
    if block == "SpatialGatingBlock":
        options |= {"mlp_ratio": 6, "mlp_layer": package.layers.GatedMlp}
    if block == "ResBlock":
        options |= {"mlp_ratio": 4, "norm_layer": package.models.mlp_mixer.Affine}
    return _of("MlpMixer", {"img_size": 64, "patch_size": 16, "num_blocks": 2, "embed_dim": 128, **options})


def _bit() -> nn.Module:
    package = timm()
    standardised = partial(package.layers.StdConv2d, eps=1e-8)
    bit: nn.Module = package.models.ResNetV2([1, 1, 1, 1], num_classes=10, stem_type="fixed", conv_layer=standardised)
    return bit


def _metaformer() -> nn.Module:
    package = timm()
    return _of("MetaFormer", {
        "depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128), "downsample_norm": None, "use_mlp_head": False,
        "norm_layers": package.layers.GroupNorm1, "layer_scale_init_values": 1e-5, "res_scale_init_values": None,
    })  # fmt: skip


def _caformer() -> nn.Module:
    parts = timm().models.metaformer
    return _of("MetaFormer", {
        "depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128), "token_mixers": [parts.SepConv] * 2 + [parts.Attention] * 2,
        "norm_layers": [parts.LayerNorm2dNoBias] * 2 + [parts.LayerNormNoBias] * 2,
    })  # fmt: skip


_SHORT = {"depths": (1, 1, 2, 1)}
TIMM: tuple[Entry, ...] = (
    # residual networks and their relatives
    _entry("resnet10t", 64),
    _entry("seresnext26t_32x4d", 64, layers=(1, 1, 1, 1)),
    _entry("res2net50_48w_2s", 64, layers=(1, 1, 1, 1)),
    _entry("resnest14d", 64),
    _entry("skresnet18", 64, layers=(1, 1, 1, 1)),
    _entry("test_nfnet", 64),
    _entry("nf_regnet_b0", 64),
    _entry("repvgg_a0", 64),
    _entry("mobileone_s0", 64),
    _entry("lambda_resnet26t", 128),
    _entry("dpn48b", 64),
    _entry("dla46_c", 64),
    _entry("hrnet_w18_small", 64),
    _class("resnetv2_bit", 64, _bit),
    # mobile networks
    _entry("mixnet_s", 64),
    _entry("tf_efficientnet_b0", 64),
    _entry("test_efficientnet_evos", 64),
    _entry("mobilenetv4_conv_small", 64),
    _entry("ghostnet_050", 64),
    _entry("rexnet_100", 64),
    _entry("repvit_m0_9", 64),
    _entry("fasternet_t0", 64),
    _entry("starnet_s1", 64),
    # convolutions in the shape of transformers
    _entry("convnext_atto", 64, **_SHORT),
    _entry("convnextv2_atto", 64, **_SHORT),
    _entry("inception_next_atto", 64, **_SHORT),
    _entry("mambaout_femto", 64, **_SHORT),
    _class("focalnet", 64, partial(_of, "FocalNet", {"depths": (1, 1, 1, 1), "embed_dim": 48})),
    _class("poolformer", 64, _metaformer),
    _class("caformer", 64, _caformer),
    # hybrids
    _entry("fastvit_t8", 64),
    _entry("efficientformerv2_s0", 224),
    _entry("efficientvit_b0", 64),
    _entry("edgenext_xx_small", 64),
    _entry("mobilevitv2_050", 64),
    _entry("levit_128s", 224),
    _entry("test_coatnet", 160),
    _entry("test_maxvit", 160),
    _entry("swiftformer_xs", 224),
    _entry("tiny_vit_5m_224", 224),
    # vision transformers
    _entry("vit_tiny_patch16_224", 64, img_size=64, depth=3),
    _entry("vit_relpos_small_patch16_224", 64, img_size=64, depth=2),
    _entry("deit_tiny_distilled_patch16_224", 64, img_size=64, depth=3),
    _entry("beit_base_patch16_224", 64, img_size=64, depth=2, embed_dim=96, num_heads=3),
    _entry("eva02_tiny_patch14_224", 56, img_size=56, depth=3),
    _entry("samvit_base_patch16", 128, "encoder", img_size=128, depth=3, embed_dim=96, num_heads=3, global_attn_indexes=(2,)),
    _class("mixer", 64, partial(_mlp, "MixerBlock")),
    _class("gmlp", 64, partial(_mlp, "SpatialGatingBlock")),
    _class("resmlp", 64, partial(_mlp, "ResBlock")),
    _entry("pit_ti_224", 64, img_size=64),
    _entry("cait_xxs24_224", 64, img_size=64, depth=2),
    _entry("xcit_nano_12_p16_224", 64, img_size=64, depth=2),
    _entry("coat_lite_tiny", 64, img_size=64),
    _entry("convit_tiny", 64, img_size=64, depth=2, local_up_to_layer=1),
    _entry("crossvit_tiny_240", 240),
    _entry("pvt_v2_b0", 64),
    _entry("twins_svt_small", 64, img_size=64, **_SHORT),
    _entry("tnt_s_patch16_224", 64, img_size=64, depth=2),
    _class("volo", 64, partial(_of, "VOLO", {
        "img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (64, 128, 128, 128), "num_heads": (2, 4, 4, 4)})),
    _class("nest", 64, partial(_of, "Nest", {"img_size": 64, "embed_dims": (48, 96, 192), "num_heads": (2, 4, 8), "depths": (1, 1, 1)})),
    _class("gcvit", 64, partial(_of, "GlobalContextVit", {"img_size": 64, "window_ratio": (16, 16, 16, 32), "embed_dim": 32, "depths": (1,
        1, 1, 1), "num_heads": (2, 2, 4, 8)})),
    _class("davit", 64, partial(_of, "DaVit", {"depths": (1, 1, 1), "embed_dims": (32, 64, 96), "num_heads": (2, 4, 6)})),
    _entry("sequencer2d_s", 64, img_size=64, layers=(1, 1, 1, 1)),
)  # fmt: skip
