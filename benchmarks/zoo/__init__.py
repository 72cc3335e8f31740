"""Model families of the benchmarks and of the corpus test, written with torch alone; weights are random, sizes the published ones."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from zoo.inputs import like as like
from zoo.sequence import bert_x4, conformer_s, gru, lstm, whisper_tiny
from zoo.vision import efficientnet_b0, mobilenet_v2, resnet18, resnet50, vit_tiny

ZOO: dict[str, Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_b0": efficientnet_b0,
    "vit_tiny": vit_tiny,
    "bert_x4": bert_x4,
    "whisper_tiny": whisper_tiny,
    "conformer_s": conformer_s,
    "lstm": lstm,
    "gru": gru,
}
# Those whose latency is compared with other runtimes', by the name they are shown under.
BENCHMARKED = {
    "resnet18": "ResNet-18 @224",
    "resnet50": "ResNet-50 @224",
    "mobilenet_v2": "MobileNetV2 @224",
    "efficientnet_b0": "EfficientNet-B0 @224",
    "vit_tiny": "ViT-Ti/16 @224",
    "bert_x4": "BERT-base layer x4, 128 tokens",
    "whisper_tiny": "Whisper-tiny encoder, 30 s",
    "conformer_s": "Conformer-S encoder, 4 s",
}
