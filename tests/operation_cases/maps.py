"""Pooling, resizing, windows, recurrent layers and other modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operation_cases.draw import (
    MAP,
    SEQ,
    VOL,
    X,
    case,
    floats,
    integers,
    module,
)

# ---------------------------------------------------------------- pooling, resizing, windows
for _name, _f in {
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d padding": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d ceil": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "max_pool2d dilation": lambda x: F.max_pool2d(x, 3, 1, dilation=2),
    "max_pool2d ceil padding": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max_pool2d indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "max_pool2d unbatched": lambda x: F.max_pool2d(x[0], 2),
    "max_pool2d same": lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 3, 2),
    "max_unpool-free": lambda x: F.interpolate(F.max_pool2d(x, (1, 3)), size=(7, 9)),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool2d padding": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool2d exclude": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg_pool2d ceil": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "avg_pool2d ceil include": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg_pool2d ceil exclude": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_pool2d divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "avg_pool2d wide": lambda x: F.avg_pool2d(x, (1, 3)),
    "avg_pool2d unbatched": lambda x: F.avg_pool2d(x[0], 2),
    "adaptive_avg_pool2d 1": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_avg_pool2d uneven": lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
    "adaptive_avg_pool2d None": lambda x: F.adaptive_avg_pool2d(x, (1, None)),
    "adaptive_avg_pool2d larger": lambda x: F.adaptive_avg_pool2d(x, (8, 12)),
    "adaptive_max_pool2d 1": lambda x: F.adaptive_max_pool2d(x, 1),
    "adaptive_max_pool2d uneven": lambda x: F.adaptive_max_pool2d(x, (3, 4)),
    "adaptive_avg_pool2d divides": lambda x: F.adaptive_avg_pool2d(x, (7, 3)),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 2, 2),
    "nearest 2": lambda x: F.interpolate(x, scale_factor=2),
    "nearest size": lambda x: F.interpolate(x, size=(10, 13)),
    "nearest down": lambda x: F.interpolate(x, size=(3, 4)),
    "nearest 1.5": lambda x: F.interpolate(x, scale_factor=1.5),
    "nearest-exact": lambda x: F.interpolate(x, size=(10, 13), mode="nearest-exact"),
    "bilinear 2": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear corners": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    "bilinear 1.5": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "bilinear size": lambda x: F.interpolate(x, size=(10, 13), mode="bilinear", align_corners=False),
    "bilinear down": lambda x: F.interpolate(x, size=(3, 4), mode="bilinear"),
    "bilinear down corners": lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", align_corners=True),
    "bilinear antialias": lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True),
    "bilinear antialias up": lambda x: F.interpolate(x, size=(10, 13), mode="bilinear", antialias=True),
    "bilinear recompute": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear", recompute_scale_factor=True),
    "bilinear 0.5": lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"),
    "bilinear two factors": lambda x: F.interpolate(x, scale_factor=(1.3, 2.6), mode="bilinear"),
    "bilinear to 1": lambda x: F.interpolate(x, size=1, mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, size=(10, 13), mode="bicubic"),
    "bicubic corners": lambda x: F.interpolate(x, size=(10, 13), mode="bicubic", align_corners=True),
    "bicubic down": lambda x: F.interpolate(x, size=(3, 4), mode="bicubic"),
    "bicubic antialias": lambda x: F.interpolate(x, size=(3, 4), mode="bicubic", antialias=True),
    "bicubic 1.5": lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"),
    "area": lambda x: F.interpolate(x, size=(3, 4), mode="area"),
    "upsample module": lambda x: torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)(x),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[..., :6, :8], 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "im2col": lambda x: F.unfold(x, 3, padding=1),
    "im2col stride": lambda x: F.unfold(x, (2, 3), stride=2),
    "fold": lambda x: F.fold(F.unfold(x, 2, stride=1), (7, 9), 2),
    "pad reflect 2d": lambda x: F.pad(x, (1, 2, 3, 1), mode="reflect"),
    "pad replicate 2d": lambda x: F.pad(x, (1, 2, 3, 1), mode="replicate"),
    "pad circular 2d": lambda x: F.pad(x, (1, 2, 3, 1), mode="circular"),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "instance_norm": lambda x: F.instance_norm(x),
    "group_norm": lambda x: F.group_norm(x, 2),
    "group_norm 1": lambda x: F.group_norm(x, 1, torch.ones(4) * 2, torch.ones(4)),
    "layer_norm channels": lambda x: F.layer_norm(x, x.shape[1:]),
    "layer_norm nhwc": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2),
    "window partition": lambda x: x[:, :, :6, :8].reshape(2, 4, 3, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 4),
    "flip maps": lambda x: x.flip(-1),
    "mean of maps": lambda x: x.mean((2, 3)),
    "max of maps": lambda x: x.amax((2, 3), keepdim=True),
    "std of maps": lambda x: x.std((2, 3)),
    "gem pool": lambda x: F.avg_pool2d(x.clamp(min=1e-6).pow(3), (7, 9)).pow(1 / 3),
    "unfold maps": lambda x: x.unfold(2, 3, 2).unfold(3, 3, 3),
    "rfft-free dct": lambda x: x @ torch.cos(torch.arange(9)[:, None] * torch.arange(5) * 0.3),
    "softmax over channels": lambda x: x.softmax(1),
    "argmax over channels": lambda x: x.argmax(1),
    "grid_sample": lambda x: F.grid_sample(
        x,
        F.affine_grid(
            torch.tensor([[[0.9, 0.1, 0.2], [-0.1, 1.1, 0.1]]]).expand(2, -1, -1), (2, 4, 5, 6), align_corners=False
        ),
        align_corners=False,
    ),
    "grid_sample corners": lambda x: F.grid_sample(
        x, torch.tanh(x[:, :2].permute(0, 2, 3, 1)) * 1.2, align_corners=True
    ),
    "grid_sample nearest": lambda x: F.grid_sample(
        x, torch.tanh(x[:, :2].permute(0, 2, 3, 1)) * 1.2, mode="nearest", align_corners=False
    ),
    "grid_sample border": lambda x: F.grid_sample(
        x, torch.tanh(x[:, :2].permute(0, 2, 3, 1)) * 1.2, padding_mode="border", align_corners=False
    ),
    "grid_sample reflection": lambda x: F.grid_sample(
        x, torch.tanh(x[:, :2].permute(0, 2, 3, 1)) * 1.2, padding_mode="reflection", align_corners=False
    ),
    "grid_sample bicubic": lambda x: F.grid_sample(
        x, torch.tanh(x[:, :2].permute(0, 2, 3, 1)) * 1.2, mode="bicubic", align_corners=False
    ),
    "affine_grid": lambda x: F.affine_grid(x[:, :2, 0, :3], (2, 1, 4, 5), align_corners=True),
}.items():
    case(_name, _f, MAP)
for _name, _f in {
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "max_pool1d padding": lambda x: F.max_pool1d(x, 3, 2, 1),
    "avg_pool1d": lambda x: F.avg_pool1d(x, 3, 2, 1),
    "avg_pool1d ceil": lambda x: F.avg_pool1d(x, 2, ceil_mode=True),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 3),
    "adaptive_avg_pool1d 1": lambda x: F.adaptive_avg_pool1d(x, 1),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 1),
    "nearest 1d": lambda x: F.interpolate(x, size=17),
    "linear 1d resize": lambda x: F.interpolate(x, size=17, mode="linear"),
    "linear corners": lambda x: F.interpolate(x, scale_factor=2, mode="linear", align_corners=True),
    "instance_norm 1d": lambda x: F.instance_norm(x),
    "group_norm 1d": lambda x: F.group_norm(x, 2),
    "unfold frames": lambda x: x.unfold(-1, 4, 3),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4) * 2),
    "layer_norm": lambda x: F.layer_norm(x, (11,), torch.ones(11) * 2, torch.ones(11)),
    "layer_norm eps": lambda x: F.layer_norm(x, (11,), eps=0.1),
    "rms_norm": lambda x: F.rms_norm(x, (11,), torch.ones(11) * 2),
    "rms_norm by hand": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "stft-free frames": lambda x: torch.matmul(x.unfold(-1, 4, 2), torch.ones(4, 3)),
    "max over time": lambda x: x.max(-1)[0],
    "pad reflect 1d": lambda x: F.pad(x, (3, 2), mode="reflect"),
    "relative shift": lambda x: F.pad(x, (1, 0)).reshape(2, 12, 4)[:, 1:].reshape(2, 4, 11),
    "causal pad": lambda x: F.pad(x, (2, 0)),
    "lp_pool1d": lambda x: F.lp_pool1d(x, 2, 3),
    "avg pool of ints": lambda x: F.avg_pool1d(x.round(), 2),
    "stats pool": lambda x: torch.cat([x.mean(-1), x.std(-1)], 1),
    "mask from lengths": lambda x: (torch.arange(11)[None] < torch.tensor([5, 9])[:, None])[:, None] * x,
    "fft magnitude": lambda x: torch.fft.rfft(x).abs(),
    "stft": lambda x: torch.stft(x[:, 0], 8, 4, window=torch.ones(8), return_complex=True).abs(),
}.items():
    case(_name, _f, SEQ)
for _name, _f in {
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "avg_pool3d padding": lambda x: F.avg_pool3d(x, 3, 2, 1),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 1),
    "adaptive_avg_pool3d uneven": lambda x: F.adaptive_avg_pool3d(x, (2, 3, 4)),
    "nearest 3d": lambda x: F.interpolate(x, scale_factor=2),
    "trilinear": lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
    "group_norm 3d": lambda x: F.group_norm(x, 2),
    "instance_norm 3d": lambda x: F.instance_norm(x),
    "pad 3d": lambda x: F.pad(x, (1, 1, 1, 1, 1, 1)),
    "max_pool3d padding": lambda x: F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, 1),
}.items():
    case(_name, _f, VOL)
case("max_pool2d of ints", lambda i: F.max_pool2d(i.float(), 2).long(), integers(1, 2, 4, 6))
case("max_pool2d of int64", lambda i: F.max_pool2d(i, 2), integers(1, 2, 4, 6))


# ---------------------------------------------------------------- recurrent layers and others with state of weights

module("nn.LSTM", lambda: nn.LSTM(4, 5, batch_first=True), floats(2, 3, 4))
module("nn.LSTM bidirectional", lambda: nn.LSTM(4, 5, 2, bidirectional=True), floats(3, 2, 4))
module("nn.LSTM proj", lambda: nn.LSTM(4, 6, proj_size=3), floats(3, 2, 4))
module("nn.LSTM unbatched", lambda: nn.LSTM(4, 6), floats(3, 4))
module("nn.GRU", lambda: nn.GRU(4, 5, batch_first=True), floats(2, 3, 4))
module("nn.GRU bidirectional", lambda: nn.GRU(4, 5, 2, bidirectional=True, bias=False), floats(3, 2, 4))
module("nn.RNN", lambda: nn.RNN(4, 5), floats(3, 2, 4))
module("nn.RNN relu", lambda: nn.RNN(4, 5, nonlinearity="relu"), floats(3, 2, 4))
module("nn.LSTMCell", lambda: nn.LSTMCell(4, 5), floats(2, 4))
module("nn.GRUCell", lambda: nn.GRUCell(4, 5), floats(2, 4))
module("nn.RNNCell", lambda: nn.RNNCell(4, 5), floats(2, 4))

module("nn.TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), floats(2, 5, 8))
module("nn.TransformerDecoderLayer", lambda: nn.TransformerDecoderLayer(8, 2, 16), floats(5, 2, 8), floats(4, 2, 8))
module("nn.BatchNorm1d 2d", lambda: nn.BatchNorm1d(4), floats(3, 4))
module("nn.BatchNorm2d", lambda: nn.BatchNorm2d(4), MAP)
module("nn.BatchNorm3d", lambda: nn.BatchNorm3d(2), VOL)
module("nn.BatchNorm no affine", lambda: nn.BatchNorm2d(4, affine=False), MAP)
module("nn.BatchNorm no statistics", lambda: nn.BatchNorm2d(4, track_running_stats=False), MAP)
module("nn.InstanceNorm2d tracked", lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), MAP)
module("nn.Embedding", lambda: nn.Embedding(7, 4), integers(2, 3, low=0, high=7))
module("nn.EmbeddingBag", lambda: nn.EmbeddingBag(7, 4, mode="sum"), integers(2, 3, low=0, high=7))
module("nn.ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), MAP)
module("nn.ConvTranspose1d", lambda: nn.ConvTranspose1d(4, 6, 4, 2, 1), SEQ)
module("nn.Conv2d reflect", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), MAP)
module("nn.Conv2d circular", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), MAP)
module("nn.Conv2d replicate", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), MAP)
module("nn.Conv2d same even", lambda: nn.Conv2d(4, 16, 4, padding="same"), MAP)
module("nn.Conv3d", lambda: nn.Conv3d(2, 16, 3, padding=1), VOL)
module("nn.Unfold", lambda: nn.Unfold(3), MAP)
module("nn.PixelShuffle", lambda: nn.PixelShuffle(2), MAP)
module("nn.Upsample", lambda: nn.Upsample(scale_factor=2), MAP)
module("nn.GLU", lambda: nn.GLU(), X)
module("nn.PReLU", lambda: nn.PReLU(4), MAP)
module("nn.Bilinear", lambda: nn.Bilinear(4, 4, 3), floats(2, 4), floats(2, 4))
module("nn.CosineSimilarity", lambda: nn.CosineSimilarity(), floats(2, 4), floats(2, 4))
module("nn.ZeroPad2d", lambda: nn.ZeroPad2d((1, 0, 2, 1)), MAP)
module("nn.LayerNorm 2 axes", lambda: nn.LayerNorm((4, 11)), SEQ)
module("nn.LayerNorm no affine", lambda: nn.LayerNorm(11, elementwise_affine=False), SEQ)
module("nn.LayerNorm no bias", lambda: nn.LayerNorm(11, bias=False), SEQ)
module("nn.RMSNorm", lambda: nn.RMSNorm(11), SEQ)
module("nn.GroupNorm", lambda: nn.GroupNorm(2, 4), MAP)
module("nn.AdaptiveMaxPool2d", lambda: nn.AdaptiveMaxPool2d((2, 2)), MAP)
module("nn.FractionalMaxPool-free nn.MaxPool2d", lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 0)), MAP)


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)


module("nn.MultiheadAttention", _SelfAttention, floats(2, 5, 8))
