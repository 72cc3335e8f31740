"""Products, attention, convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from operation_cases.draw import (
    MAP,
    SEQ,
    VOL,
    bools,
    case,
    floats,
    integers,
)

# ---------------------------------------------------------------- products
case("matmul", torch.matmul, floats(2, 3, 4), floats(2, 4, 5))
case("matmul broadcast", torch.matmul, floats(2, 1, 3, 4), floats(3, 4, 5))
case("matmul vector", torch.matmul, floats(2, 3, 4), floats(4))
case("vector matmul", torch.matmul, floats(4), floats(4, 5))
case("dot", torch.matmul, floats(4), floats(4))
case("mv", torch.mv, floats(3, 4), floats(4))
case("mm", torch.mm, floats(3, 4), floats(4, 5))
case("bmm", torch.bmm, floats(2, 3, 4), floats(2, 4, 5))
case(
    "baddbmm",
    lambda a, b, c: torch.baddbmm(a, b, c, beta=0.5, alpha=2.0),
    floats(2, 3, 5),
    floats(2, 3, 4),
    floats(2, 4, 5),
)
case(
    "baddbmm beta 0",
    lambda a, b, c: torch.baddbmm(a, b, c, beta=0.0, alpha=0.3),
    floats(2, 3, 5),
    floats(2, 3, 4),
    floats(2, 4, 5),
)
case("addmm", lambda a, b, c: torch.addmm(a, b, c, beta=0.5, alpha=2.0), floats(5), floats(3, 4), floats(4, 5))
case("addmm 2d", torch.addmm, floats(3, 5), floats(3, 4), floats(4, 5))
case("addmv", torch.addmv, floats(3), floats(3, 4), floats(4))
case("addbmm-free", lambda a, b: (a @ b).sum(0), floats(2, 3, 4), floats(2, 4, 5))
case("linear", lambda x, w, b: F.linear(x, w, b), floats(2, 3, 4), floats(5, 4), floats(5))
case("linear 1d", lambda x, w, b: F.linear(x, w, b), floats(4), floats(5, 4), floats(5))
case(
    "bilinear layer", lambda x, y, w, b: F.bilinear(x, y, w, b), floats(3, 4), floats(3, 5), floats(6, 4, 5), floats(6)
)
case("int matmul", torch.matmul, integers(3, 4), integers(4, 5))
case("double matmul", lambda a, b: (a.double() @ b.double()).float(), floats(3, 4), floats(4, 5))
case("transposed matmul", lambda a, b: a @ b.transpose(-1, -2), floats(2, 3, 4), floats(2, 5, 4))
for _name, _equation, _shapes in (
    ("einsum bhid", "bhid,bhjd->bhij", ((1, 2, 3, 4), (1, 2, 5, 4))),
    ("einsum ij", "ij,jk->ik", ((3, 4), (4, 5))),
    ("einsum trace", "bii->b", ((2, 3, 3),)),
    ("einsum outer", "i,j->ij", ((3,), (4,))),
    ("einsum sum", "bij->bj", ((2, 3, 4),)),
    ("einsum three", "bij,bjk,bkl->bil", ((2, 3, 4), (2, 4, 5), (2, 5, 3))),
    ("einsum permute", "bchw->bhwc", ((1, 2, 3, 4),)),
    ("einsum nd", "...ij,...jk->...ik", ((2, 3, 4), (2, 4, 5))),
    ("einsum elementwise", "ij,ij->ij", ((3, 4), (3, 4))),
    ("einsum batch last", "ncl,nlv->ncv", ((2, 3, 4), (2, 4, 5))),
    ("einsum mixed", "nctv,vw->nctw", ((1, 2, 3, 4), (4, 5))),
):
    case(_name, lambda *xs, e=_equation: torch.einsum(e, *xs), *[floats(*shape) for shape in _shapes])
_QKV = (floats(1, 2, 5, 4), floats(1, 2, 6, 4), floats(1, 2, 6, 4))
case("attention", F.scaled_dot_product_attention, *_QKV)
case("attention scale", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), *_QKV)
case(
    "attention float mask",
    lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
    *_QKV,
    floats(1, 1, 5, 6),
)
case(
    "attention bool mask",
    lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m | (torch.arange(6) < 1)),
    *_QKV,
    bools(5, 6),
)
case("attention causal", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *_QKV)
case(
    "attention gqa",
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    floats(1, 4, 5, 4),
    floats(1, 2, 6, 4),
    floats(1, 2, 6, 4),
)
case("attention 3d", F.scaled_dot_product_attention, floats(2, 5, 4), floats(2, 6, 4), floats(2, 6, 4))
case(
    "attention row of nothing",
    lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.arange(5)[:, None] > torch.arange(6)[None] + 1
    ),
    *_QKV,
)
case(
    "attention value width", F.scaled_dot_product_attention, floats(1, 2, 5, 4), floats(1, 2, 6, 4), floats(1, 2, 6, 3)
)


# ---------------------------------------------------------------- convolutions on computed and given weights
for _name, _shape, _weight, _keys in (
    ("conv2d", (1, 4, 7, 9), (6, 4, 3, 3), {}),
    ("conv2d padding", (1, 4, 7, 9), (6, 4, 3, 3), {"padding": 1}),
    ("conv2d stride", (1, 4, 7, 9), (6, 4, 3, 3), {"stride": 2, "padding": (1, 0)}),
    ("conv2d same", (1, 4, 7, 9), (6, 4, 3, 3), {"padding": "same"}),
    ("conv2d same even", (1, 4, 7, 9), (6, 4, 4, 2), {"padding": "same"}),
    ("conv2d same small map", (1, 4, 2, 1), (6, 4, 5, 5), {"padding": "same"}),
    ("conv2d valid", (1, 4, 7, 9), (6, 4, 3, 3), {"padding": "valid"}),
    ("conv2d groups", (1, 4, 7, 9), (6, 2, 3, 3), {"groups": 2}),
    ("conv2d depthwise", (1, 4, 7, 9), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
    ("conv2d depthwise multiplier", (1, 4, 7, 9), (8, 1, 3, 3), {"groups": 4}),
    ("conv2d dilation", (1, 4, 9, 9), (6, 4, 3, 3), {"dilation": 2}),
    ("conv2d same dilated", (1, 4, 9, 9), (6, 4, 3, 3), {"dilation": 2, "padding": "same"}),
    ("conv2d unbatched", (4, 7, 9), (6, 4, 3, 3), {"padding": 1}),
    ("conv2d 1x1", (2, 4, 7, 9), (8, 4, 1, 1), {}),
    ("conv2d same even dilated", (1, 4, 9, 9), (6, 4, 2, 2), {"dilation": 3, "padding": "same"}),
    ("conv2d batch 2", (2, 16, 7, 9), (16, 16, 3, 3), {"padding": 1}),
):
    case(_name, lambda x, w, b, k=_keys: F.conv2d(x, w, b, **k), floats(*_shape), floats(*_weight), floats(_weight[0]))
for _name, _shape, _weight, _keys in (
    ("conv1d", (2, 4, 11), (6, 4, 3), {}),
    ("conv1d same even", (2, 4, 11), (6, 4, 4), {"padding": "same"}),
    ("conv1d stride", (2, 4, 11), (6, 4, 3), {"stride": 2, "padding": 1}),
    ("conv1d depthwise", (2, 4, 11), (4, 1, 5), {"groups": 4, "padding": 2}),
    ("conv1d dilated", (2, 4, 11), (6, 4, 3), {"dilation": 2}),
    ("conv1d unbatched", (4, 11), (6, 4, 3), {}),
    ("conv1d same small", (2, 4, 2), (6, 4, 9), {"padding": "same"}),
):
    case(_name, lambda x, w, b, k=_keys: F.conv1d(x, w, b, **k), floats(*_shape), floats(*_weight), floats(_weight[0]))
case("conv3d", lambda x, w, b: F.conv3d(x, w, b, padding=1), VOL, floats(3, 2, 3, 3, 3), floats(3))
case("conv3d stride", lambda x, w: F.conv3d(x, w, stride=2, groups=2), VOL, floats(4, 1, 2, 2, 2))
case("conv3d same", lambda x, w: F.conv3d(x, w, padding="same"), VOL, floats(4, 2, 3, 2, 3))
case(
    "conv_transpose1d",
    lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, padding=1, output_padding=1),
    SEQ,
    floats(4, 3, 3),
    floats(3),
)
case("conv_transpose1d groups", lambda x, w: F.conv_transpose1d(x, w, stride=3, groups=2), SEQ, floats(4, 3, 5))
case(
    "conv_transpose2d",
    lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1),
    MAP,
    floats(4, 3, 4, 4),
    floats(3),
)
case("conv_transpose2d 1", lambda x, w: F.conv_transpose2d(x, w), MAP, floats(4, 3, 3, 3))
case(
    "conv_transpose2d output_padding",
    lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1),
    MAP,
    floats(4, 3, 3, 3),
)
case("conv_transpose2d groups", lambda x, w: F.conv_transpose2d(x, w, stride=2, groups=2), MAP, floats(4, 3, 2, 2))
case("conv_transpose2d dilation", lambda x, w: F.conv_transpose2d(x, w, stride=2, dilation=2), MAP, floats(4, 3, 3, 3))
case("conv_transpose3d", lambda x, w: F.conv_transpose3d(x, w, stride=2), VOL, floats(2, 3, 2, 2, 2))
