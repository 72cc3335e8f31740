"""Operations written as others before they are translated: torch's own decompositions, and some of ours.

The reason is always the same: TVM lacks the operation, or translates some of its arguments wrongly and says nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# torch's own decomposition is right and takes nothing away that TVM would make fast
FROM_TORCH = (
    "elu", "celu", "logit", "xlogy", "linalg_vector_norm", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "col2im", "im2col", "grid_sampler_2d", "affine_grid_generator",
    "select_scatter", "index_add", "index_copy", "index_fill", "isin", "pixel_shuffle", "pixel_unshuffle", "frac", "sgn", "logical_xor",
    "repeat", "roll", "rot90", "diag_embed", "tril", "triu", "diagonal_scatter", "logaddexp", "sinc", "nan_to_num", "heaviside",
    "aminmax", "lerp", "addcmul", "addcdiv", "special_entr", "special_ndtr", "renorm", "trace", "unbind", "logsumexp", "nansum", "softplus",
    "softshrink", "hardshrink", "mish", "linalg_cross", "log_sigmoid_forward", "rsub",
)  # fmt: skip


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Decomposition by operation: torch's default ones with the changes above and below."""
    table = dict(torch.export.default_decompositions().items())
    for name in FROM_TORCH:
        packet = getattr(aten, name)
        for overload in packet.overloads():
            operation = getattr(packet, overload)
            if operation in torch._decomp.decomposition_table and "out" not in overload:
                table[operation] = torch._decomp.decomposition_table[operation]
    table.update(OURS)
    return table


def _axes(x: Tensor, dim: Any) -> list[int]:
    """The axes that a reduction names: one, several, or (None, or an empty list) all."""
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return list(range(x.dim()))
    return list(dim) if isinstance(dim, Sequence) else [dim]


def _any(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return (x != 0).to(torch.int32).amax(_axes(x, dim), keepdim) != 0


def _all(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return (x != 0).to(torch.int32).amin(_axes(x, dim), keepdim) != 0


def _max_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amax([dim], keepdim), x.argmax(dim, keepdim)


def _min_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amin([dim], keepdim), x.argmin(dim, keepdim)


def _float_remainder(a: Any, b: Any) -> Tensor:
    """``a - b * floor(a / b)`` without the rounding of the quotient: the sign is that of ``b``."""
    rest = torch.fmod(a, b)
    other = (rest != 0) & ((rest < 0) != (b < 0))
    return torch.where(other, rest + b, rest)


def _remainder(a: Any, b: Any) -> Any:
    if torch.result_type(a, b).is_floating_point:
        return _float_remainder(*_promoted(a, b))
    return NotImplemented


def _promoted(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    kind = torch.result_type(a, b)
    device = a.device if isinstance(a, Tensor) else b.device
    return tuple(  # type: ignore[return-value]
        x.to(kind) if isinstance(x, Tensor) else torch.full((), x, dtype=kind, device=device) for x in (a, b)
    )


def _divide(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    """Quotients of floats rounded as torch does, by the remainder; those of integers are translated as they are."""
    if rounding_mode is None:
        return torch.true_divide(a, b)
    if not torch.result_type(a, b).is_floating_point:
        return NotImplemented
    if rounding_mode == "trunc":
        return torch.trunc(torch.true_divide(a, b))
    a, b = _promoted(a, b)
    rest = torch.fmod(a, b)
    quotient = (a - rest) / b
    quotient = torch.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)
    whole = torch.floor(quotient)
    return torch.where(quotient - whole > 0.5, whole + 1, whole)


def _floor_divide(a: Any, b: Any) -> Any:
    return torch.div(a, b, rounding_mode="floor")


def _pow_scalar(x: Tensor, exponent: float) -> Any:
    """Small whole powers as products; halves as roots."""
    kind = torch.result_type(x, exponent)
    x = x.to(kind)
    if exponent in (0.5, -0.5) and kind.is_floating_point:
        return x.sqrt() if exponent > 0 else x.rsqrt()
    if exponent == int(exponent) and abs(exponent) <= 8 and (exponent >= 0 or kind.is_floating_point):
        result = None
        square, left = x, abs(int(exponent))
        while left:
            if left % 2:
                result = square if result is None else result * square
            left //= 2
            square = square * square if left else square
        if result is None:
            return torch.ones_like(x)
        return result.reciprocal() if exponent < 0 else result.clone()
    return _pow(x, exponent)


def _pow(x: Any, exponent: Any) -> Any:
    """Powers of integers go through 64-bit floats, which TVM has them for."""
    kind = torch.result_type(x, exponent)
    if kind.is_floating_point:
        return NotImplemented
    a, b = (value.double() if isinstance(value, Tensor) else float(value) for value in (x, exponent))
    return torch.pow(a, b).round().to(kind)  # type: ignore[arg-type] # one of them is a tensor


def _square(x: Tensor) -> Tensor:
    return x * x


def _searchsorted(
    boundaries: Tensor, x: Any, *, out_int32: bool = False, right: bool = False, side: str | None = None, sorter: Tensor | None = None
) -> Any:  # fmt: skip
    """How many boundaries lie below each value."""
    if sorter is not None:
        return NotImplemented
    if not isinstance(x, Tensor):
        x = torch.full((), x, dtype=boundaries.dtype)
    right = right or side == "right"
    rows = boundaries if boundaries.dim() == 1 else boundaries.unsqueeze(-2)
    below = rows <= x.unsqueeze(-1) if right else rows < x.unsqueeze(-1)
    return below.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def _bucketize(x: Any, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Any:
    return _searchsorted(boundaries, x, out_int32=out_int32, right=right)


def _kth(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=dim, stable=True)
    values, indices = values.narrow(dim, k - 1, 1), indices.narrow(dim, k - 1, 1)
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


def _median_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _kth(x, (x.shape[dim] + 1) // 2, dim, keepdim)


def _median(x: Tensor) -> Tensor:
    return _kth(x.reshape(-1), (x.numel() + 1) // 2)[0]


def _cdist(a: Tensor, b: Tensor, p: float, _mode: int | None) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, dim=-1)
    return result


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """What is empty adds nothing (a key-value cache before its first token), and may even be of another rank."""
    kept = [tensor for tensor in tensors if tensor.numel()]
    if len(kept) == len(tensors):
        return NotImplemented
    kind = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    if not kept:
        return NotImplemented
    joined = kept[0].clone() if len(kept) == 1 else torch.cat(kept, dim)
    return joined.to(kind)


def _average(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Any:  # fmt: skip
    """An average with a divisor of its own is the plain one, scaled."""
    if divisor_override is None or ceil_mode:
        return NotImplemented
    size = kernel[0] * kernel[-1]
    return aten.avg_pool2d(x, kernel, stride, padding, False, True) * (size / divisor_override)


def _argmax_flat(operation: Any) -> Callable[..., Any]:
    def flat(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is not None:
            return NotImplemented
        index = operation(x.reshape(-1), 0)
        return index.reshape([1] * x.dim()) if keepdim else index

    return flat


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as products and a softmax. A query whose mask leaves it no key attends to nothing, as torch has it: its row is zero."""
    if enable_gqa:
        key, value = (_repeated(each, query.shape[-3] // each.shape[-3]) for each in (key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return scores.softmax(-1) @ value
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf
    scores = torch.where(attn_mask, scores, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    mixed = scores.softmax(-1) @ value
    return mixed if is_causal else torch.where(allowed.any(-1, keepdim=True), mixed, 0.0)


def _repeated(heads: Tensor, times: int) -> Tensor:
    """Each of the heads, ``[..., heads, tokens, width]``, several times in a row."""
    if times == 1:
        return heads
    shape = heads.shape
    return (
        heads.unsqueeze(-3).expand(*shape[:-2], times, *shape[-2:]).reshape(*shape[:-3], shape[-3] * times, *shape[-2:])
    )


def _adaptive_max(x: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The largest element of each window, and where it lies in its map; windows overlap where sizes do not divide."""
    axes, lead = len(size), x.dim() - len(size)
    spans = [
        [(place * full // wanted, -(-(place + 1) * full // wanted)) for place in range(wanted)]
        for full, wanted in zip(x.shape[lead:], size, strict=True)
    ]
    values, places = [], []
    for window in itertools.product(*spans):
        part = x
        for axis, (start, stop) in enumerate(window):
            part = part.narrow(lead + axis, start, stop - start)
        value, inside = part.flatten(lead).max(-1)
        place, rest = torch.zeros_like(inside), inside
        for axis in reversed(range(axes)):
            start, stop = window[axis]
            place = place + (rest % (stop - start) + start) * math.prod(x.shape[lead + axis + 1 :])
            rest = rest // (stop - start)
        values.append(value)
        places.append(place)
    shape = (*x.shape[:lead], *size)
    return torch.stack(values, -1).reshape(shape), torch.stack(places, -1).reshape(shape)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, channels: int, size: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A GroupNorm is a LayerNorm over each group, which has a fast kernel."""
    length = channels // groups * size
    ones, zeros = x.new_ones(length), x.new_zeros(length)
    y = torch.layer_norm(x.reshape(n, groups, length), [length], ones, zeros, eps).reshape(x.shape)
    along = [1, channels] + [1] * (x.dim() - 2)
    if weight is not None:
        y = y * weight.reshape(along)
    if bias is not None:
        y = y + bias.reshape(along)
    unused = x.new_zeros(n, groups)  # mean and reciprocal deviation, which only training reads
    return y, unused, unused.clone()


def _same_padding(operation: Any) -> Callable[..., Tensor]:
    """Convolutions with ``padding="same"``: where the two sides differ, torch puts the larger one behind."""

    def convolution(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: str = "valid", dilation: Any = 1, groups: int = 1
    ) -> Tensor:  # fmt: skip
        axes = weight.dim() - 2
        steps, stride = (
            [each] * axes if isinstance(each, int) else list(each) * (axes // len(each)) for each in (dilation, stride)
        )
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(steps, weight.shape[2:], strict=True)]
        sides = [(each // 2, each - each // 2) for each in total]
        if any(left != right for left, right in sides):
            x = torch.nn.functional.pad(x, [side for pair in reversed(sides) for side in pair])
            result: Tensor = operation(x, weight, bias, stride, [0] * axes, steps, groups)
            return result
        result = operation(x, weight, bias, stride, [left for left, _ in sides], steps, groups)
        return result

    return convolution


def _float(x: Tensor) -> Tensor:
    return x if x.dtype.is_floating_point else x.float()


def _sinh(x: Tensor) -> Tensor:
    grown = _float(x).abs().expm1()  # exact near zero; of the size, since of a large negative number it is -1
    return torch.where(x < 0, -0.5, 0.5) * (grown + grown / (grown + 1))


def _cosh(x: Tensor) -> Tensor:
    return (_float(x).exp() + (-_float(x)).exp()) / 2


def _exp2(x: Tensor) -> Tensor:
    return torch.exp(_float(x) * math.log(2))


def _hypot(a: Tensor, b: Tensor) -> Tensor:
    return torch.sqrt(a * a + b * b)


def _copysign(a: Tensor, b: Any) -> Tensor:
    return torch.where(torch.as_tensor(b) < 0, -a.abs(), a.abs())


def _of_numbers(extreme: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``fmax`` and ``fmin``: where one of the two is no number, the other."""

    def decomposition(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(torch.isnan(a), b, torch.where(torch.isnan(b), a, extreme(a, b)))

    return decomposition


def _var_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    axes = _axes(x, dim)
    return aten.var.correction(x, axes, correction=correction, keepdim=keepdim), x.mean(axes, keepdim)


def _std_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    variance, mean = _var_mean(x, dim, correction=correction, keepdim=keepdim)
    return variance.sqrt(), mean


def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, new_a: Sequence[int], new_b: Sequence[int], new_c: Sequence[int], summed: Sequence[int], unroll_dim: int = 1
) -> Tensor:  # fmt: skip
    """Three tensors with axes of size 1 put in, multiplied, and summed over some axes."""
    for axis in new_a:
        a = a.unsqueeze(axis)
    for axis in new_b:
        b = b.unsqueeze(axis)
    for axis in new_c:
        c = c.unsqueeze(axis)
    return (a * b * c).sum(list(summed)) if summed else a * b * c


def _dist(a: Tensor, b: Tensor, p: Any = 2) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(a - b, p)
    return result


def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Any:
    """Between tensors: the larger and the smaller; between numbers it stays one step, but for integers without one of the bounds."""
    if not isinstance(min, Tensor) and not isinstance(max, Tensor):
        whole = not torch.result_type(x, max if min is None else min).is_floating_point
        if not (whole and (min is None or max is None)):
            return NotImplemented
        min, max = (
            None if bound is None else torch.full((), bound, dtype=x.dtype, device=x.device) for bound in (min, max)
        )
    x = x if min is None else torch.maximum(x, min)
    return x if max is None else torch.minimum(x, max)


def _scaled_sum(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``beta * x + alpha * (a @ b)`` without the factors that are 1."""

    def decomposition(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        result = product(a, b)
        result = result if alpha == 1 else result * alpha
        if beta == 0:
            return result.clone()
        return (x if beta == 1 else x * beta) + result

    return decomposition


def _rrelu(
    x: Tensor, noise: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> Any:  # fmt: skip
    if training:
        return NotImplemented
    return torch.nn.functional.leaky_relu(x, (lower + upper) / 2), noise


OURS: dict[Any, Callable[..., Any]] = {
    aten.any.default: _any, aten.any.dim: _any, aten.any.dims: _any,
    aten.all.default: _all, aten.all.dim: _all, aten.all.dims: _all,
    aten.max.dim: _max_dim, aten.min.dim: _min_dim,
    aten.max.other: lambda a, b: torch.maximum(a, b), aten.min.other: lambda a, b: torch.minimum(a, b),
    aten.max.default: lambda x: x.amax(_axes(x, None)), aten.min.default: lambda x: x.amin(_axes(x, None)),
    aten.argmax.default: _argmax_flat(torch.argmax), aten.argmin.default: _argmax_flat(torch.argmin),
    aten.remainder.Tensor: _remainder, aten.remainder.Scalar: _remainder, aten.remainder.Scalar_Tensor: _remainder,
    aten.div.Tensor_mode: _divide, aten.div.Scalar_mode: _divide,
    aten.floor_divide.default: _floor_divide, aten.floor_divide.Scalar: _floor_divide,
    aten.pow.Tensor_Scalar: _pow_scalar, aten.pow.Tensor_Tensor: _pow, aten.pow.Scalar: _pow, aten.square.default: _square,
    aten.sinh.default: _sinh, aten.cosh.default: _cosh, aten.exp2.default: _exp2, aten.special_exp2.default: _exp2,
    aten.erfc.default: lambda x: 1 - torch.erf(_float(x)), aten.special_erfc.default: lambda x: 1 - torch.erf(_float(x)),
    aten.signbit.default: lambda x: x < 0,
    aten.clamp.default: _clamp, aten.clamp.Tensor: _clamp, aten.clamp_min.Tensor: lambda x, low: torch.maximum(x, low),
    aten.clamp_max.Tensor: lambda x, high: torch.minimum(x, high), aten.clamp_min.default: lambda x, low: torch.clamp(x, low, None),
    aten.clamp_max.default: lambda x, high: torch.clamp(x, None, high),
    aten.hardtanh.default: lambda x, low=-1.0, high=1.0: torch.clamp(x, low, high),
    aten.addmm.default: _scaled_sum(torch.mm), aten.baddbmm.default: _scaled_sum(torch.bmm), aten.addmv.default: _scaled_sum(torch.mv),
    aten.hypot.default: _hypot,
    aten.copysign.Tensor: _copysign,
    aten.copysign.Scalar: _copysign,
    aten.fmax.default: _of_numbers(torch.maximum),
    aten.fmin.default: _of_numbers(torch.minimum),
    aten.var_mean.correction: _var_mean,
    aten.std_mean.correction: _std_mean,
    aten.dist.default: _dist,
    aten._trilinear.default: _trilinear,
    aten.rrelu_with_noise_functional.default: _rrelu,
    aten.searchsorted.Tensor: _searchsorted, aten.searchsorted.Scalar: _searchsorted,
    aten.bucketize.Tensor: _bucketize, aten.bucketize.Scalar: _bucketize,
    aten.kthvalue.default: _kth, aten.median.dim: _median_dim, aten.median.default: _median,
    aten._cdist_forward.default: _cdist, aten.cat.default: _cat, aten.avg_pool2d.default: _average,
    aten.scaled_dot_product_attention.default: _attention, aten.native_group_norm.default: _group_norm,
    aten.conv1d.padding: _same_padding(aten.conv1d.default), aten.conv2d.padding: _same_padding(aten.conv2d.default),
    aten.adaptive_max_pool1d.default: _adaptive_max, aten.adaptive_max_pool2d.default: _adaptive_max,
    aten.adaptive_max_pool3d.default: _adaptive_max, aten.conv3d.padding: _same_padding(aten.conv3d.default),
}  # fmt: skip
