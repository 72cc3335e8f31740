"""Encoders and vision models of transformers, from small configurations of their own classes, called as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from corpus.entry import Entry, Input, Kind, image, mask, tokens
from corpus.packages import transformers

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {**TINY, "vocab_size": 100, "max_position_embeddings": 64}
_VISION = {**TINY, "image_size": 32, "patch_size": 8}


def make(model: str, config: str, options: dict[str, Any]) -> nn.Module:
    """A model of a class of transformers and a configuration of it, by their names."""
    package = transformers()
    built: nn.Module = getattr(package, model)(getattr(package, config)(**options))
    return built


def entry(name: str, kind: Kind, calls: tuple[Input, ...], model: str, config: str = "", **options: Any) -> Entry:
    """``config`` is named after the model unless said: BertModel, BertConfig."""
    stem = model
    for ending in ("ForCausalLM", "ForCTC", "EncoderModel", "LMHeadModel", "VisionModel", "Model"):
        stem = stem.removesuffix(ending)
    return Entry(f"transformers/{name}", kind, partial(make, model, config or f"{stem}Config", options), calls)


def _text(
    name: str, model: str, config: str = "", calls: tuple[Input, ...] = (tokens(), mask()), **options: Any
) -> Entry:
    return entry(name, "encoder", calls, model, config, **{**TEXT, **options})


def _vision(name: str, model: str, config: str = "", kind: Kind = "encoder", **options: Any) -> Entry:
    return entry(name, kind, image(options.get("image_size", 32)), model, config, **{**_VISION, **options})


_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
_DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 10,
}  # fmt: skip


def _detr(model: str, config: str) -> nn.Module:
    package = transformers()
    backbone = package.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 96], depths=[1, 1, 1], layer_type="basic", out_features=["stage3"]
    )
    options = {**_DETR, "backbone_config": backbone, "backbone": None}
    built: nn.Module = getattr(package, model)(getattr(package, config)(**options))
    return built


def _depth_anything() -> nn.Module:
    package = transformers()
    backbone = package.Dinov2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=28, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = package.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=64, neck_hidden_sizes=[16, 24, 32, 48], fusion_hidden_size=32
    )
    depth: nn.Module = package.DepthAnythingForDepthEstimation(config)
    return depth


TRANSFORMERS: tuple[Entry, ...] = (
    # text encoders
    _text("bert", "BertModel"),
    _text("albert", "AlbertModel", embedding_size=32),
    _text("deberta", "DebertaModel", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=32),
    _text("deberta_v2", "DebertaV2Model", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16),
    entry("distilbert", "encoder", (tokens(), mask()), "DistilBertModel", vocab_size=100, dim=64, n_layers=2, n_heads=4, hidden_dim=128),
    _text("mobilebert", "MobileBertModel", embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32),
    _text("mpnet", "MPNetModel"),
    _text("squeezebert", "SqueezeBertModel", embedding_size=64),
    _text("convbert", "ConvBertModel", embedding_size=32),
    _text("fnet", "FNetModel", calls=(tokens(),)),
    _text("roformer", "RoFormerModel"),
    _text("modernbert", "ModernBertModel", pad_token_id=0, attn_implementation="sdpa", local_attention=8),
    _text("esm", "EsmModel", position_embedding_type="rotary", pad_token_id=1, emb_layer_norm_before=True),
    entry("xlnet", "encoder", (tokens(),), "XLNetModel", vocab_size=100, d_model=64, n_layer=2, n_head=4, d_inner=128),
    entry("t5_encoder", "encoder", (tokens(), mask()), "T5EncoderModel", vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2,
        num_heads=4),
    entry("funnel", "encoder", (tokens(), mask()), "FunnelBaseModel", "FunnelConfig", vocab_size=100, block_sizes=[1, 1], d_model=64,
        n_head=4, d_head=16, d_inner=128, num_decoder_layers=1),
    # image encoders and classifiers
    _vision("clip_vision", "CLIPVisionModel", "CLIPVisionConfig"),
    entry("clip_text", "encoder", (tokens(), mask()), "CLIPTextModel", "CLIPTextConfig", **{**TEXT, "eos_token_id": 99}),
    _vision("siglip_vision", "SiglipVisionModel", "SiglipVisionConfig"),
    _vision("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2),
    _vision("data2vec_vision", "Data2VecVisionModel", "Data2VecVisionConfig", use_relative_position_bias=True),
    entry("yolos", "detector", image(32), "YolosForObjectDetection", "YolosConfig", **{**_VISION, "image_size": (32, 32),
        "num_detection_tokens": 6}),
    entry("sam_encoder", "encoder", image(64), "SamVisionModel", "SamVisionConfig", hidden_size=64, output_channels=32,
        num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8, window_size=4, global_attn_indexes=[1], mlp_dim=128),
    entry("hiera", "encoder", image(64), "HieraModel", "HieraConfig", embed_dim=32, image_size=[64, 64], depths=[1, 1, 1], num_heads=[1, 2,
        4], patch_stride=[4, 4], patch_kernel=[7, 7], patch_padding=[3, 3], num_query_pool=2, query_stride=[2, 2], masked_unit_size=[4, 4],
        masked_unit_attention=[True, True, False]),
    entry("swinv2", "encoder", image(32), "Swinv2Model", **_SWIN),
    entry("swin2sr", "dense", image(32), "Swin2SRForImageSuperResolution", "Swin2SRConfig", image_size=32, patch_size=1, embed_dim=32,
        depths=[2], num_heads=[2], window_size=8, upscale=2),
    entry("segformer", "segmentation", image(64), "SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64], decoder_hidden_size=64, num_labels=5),
    entry("levit", "encoder", image(64), "LevitModel", image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1,
        1, 1], key_dim=[8, 8, 8]),
    Entry("transformers/depth_anything", "dense", _depth_anything, image(28)),
    Entry("transformers/detr", "detector", partial(_detr, "DetrForObjectDetection", "DetrConfig"), image(64)),
    Entry("transformers/conditional_detr", "detector", partial(_detr, "ConditionalDetrForObjectDetection", "ConditionalDetrConfig"),
        image(64)),
    entry("perceiver_text", "encoder", (tokens(32), mask(32)), "PerceiverForMaskedLM", "PerceiverConfig", vocab_size=100,
        max_position_embeddings=32, d_model=32, d_latents=64, num_latents=8, num_self_attends_per_block=2, num_self_attention_heads=4,
        num_cross_attention_heads=4),
    # video
    entry("videomae", "video", (Input((4, 3, 32, 32)),), "VideoMAEModel", "VideoMAEConfig", image_size=32, patch_size=8, num_frames=4,
        **TINY),
    entry("vivit", "video", (Input((4, 3, 32, 32)),), "VivitModel", image_size=32, num_frames=4, tubelet_size=[2, 8, 8], **TINY),
    entry("timesformer", "video", (Input((4, 3, 32, 32)),), "TimesformerModel", image_size=32, patch_size=8, num_frames=4, **TINY),
)  # fmt: skip
