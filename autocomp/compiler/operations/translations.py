"""Which function translates which operation to Relax, where TVM's own translation is missing, wrong or slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autocomp.compiler.operations import indexing, reductions, resampling, windows

Translation = Callable[[Any, Any], Any]  # (node of the exported graph, importer) → Relax expression

_RESAMPLED = (
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip


def _average(node: Any, importer: Any) -> Any:
    """Adaptive average pooling: one window where the sizes divide (TVM's), else a sum along each axis."""
    shape, target = node.args[0].meta["val"].shape, node.meta["val"].shape
    if all(before % after == 0 for before, after in zip(shape[2:], target[2:], strict=True)) and len(shape) == 4:
        return importer.convert_map["_adaptive_avg_pool2d.default"](node)
    return resampling.resample(node, importer)


OURS: dict[str, Translation] = {
    "index.Tensor": indexing.index,
    "_unsafe_index.Tensor": indexing.index,
    "index_put.default": indexing.index_put,
    "_unsafe_index_put.default": indexing.index_put,
    "gather.default": indexing.gather,
    "unfold.default": windows.unfold,
    "as_strided.default": windows.as_strided,
    "sort.default": indexing.sort,
    "sort.stable": indexing.sort,
    "embedding.default": indexing.embedding,
    "scatter.src": indexing.scatter("update"),
    "scatter.value": indexing.scatter("update"),
    "scatter_add.default": indexing.scatter("add"),
    "scatter_reduce.two": indexing.scatter("named"),
    "amax.default": reductions.reduction("max"),
    "amin.default": reductions.reduction("min"),
    "prod.default": reductions.reduction("prod"),
    "prod.dim_int": reductions.reduction("prod"),
    "argmax.default": reductions.position("argmax"),
    "argmin.default": reductions.position("argmin"),
    "cumsum.default": reductions.running("add"),
    "cumprod.default": reductions.running("multiply"),
    "cummax.default": reductions.running_extreme("max"),
    "cummin.default": reductions.running_extreme("min"),
    "logcumsumexp.default": reductions.running("logaddexp"),
    "div.Tensor_mode": reductions.divide_integers,
    "div.Scalar_mode": reductions.divide_integers,
    "remainder.Tensor": reductions.remainder_of_integers,
    "remainder.Scalar": reductions.remainder_of_integers,
    "fmod.Tensor": reductions.fmod,
    "fmod.Scalar": reductions.fmod,
    "bitwise_left_shift.Tensor": reductions.shift(left=True),
    "bitwise_left_shift.Tensor_Scalar": reductions.shift(left=True),
    "bitwise_right_shift.Tensor": reductions.shift(left=False),
    "bitwise_right_shift.Tensor_Scalar": reductions.shift(left=False),
    "__lshift__.Scalar": reductions.shift(left=True),
    "__rshift__.Scalar": reductions.shift(left=False),
    "mm.default": reductions.product,
    "bmm.default": reductions.product,
    "_adaptive_avg_pool3d.default": resampling.resample,
    "adaptive_avg_pool1d.default": resampling.resample,
    **{f"{name}.{overload}": resampling.resample for name in _RESAMPLED for overload in ("default", "vec")},
}
