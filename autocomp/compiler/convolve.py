"""Channels-last convolutions → the templates' own: weights packed now or by the module, groups made whole vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autocomp.compiler.expressions import array_of, is_constant, shape_of
from autocomp.kernels import packing, winograd
from autocomp.kernels.grouped import Regrouping
from autocomp.kernels.specs import ConvSpec


def spec_of(call: Any, lanes: int, kind: Any) -> Any:
    """The shapes of a convolution of ``data [N, *S, C]`` with ``weight [O, *K, I]``, as a ``kind`` (ConvSpec, VolumeSpec)."""
    attrs, (data, weight) = call.attrs, call.args
    outputs, *kernel, depth = shape_of(weight) or ()
    shape = (outputs, depth, *kernel)
    return kind.of(shape_of(data) or (), shape, attrs.strides, attrs.padding, attrs.dilation, int(attrs.groups), lanes)


def convolutions_of(mod: Any, lanes: int) -> list[ConvSpec]:
    """Those convolutions of a module, channels last, that have a choice of forms: of two axes, with constant weights."""
    from tvm import relax

    found: list[ConvSpec] = []

    def visit(call: Any) -> None:
        plain = isinstance(call, relax.Call) and getattr(call.op, "name", "") == "relax.nn.conv2d"
        if plain and channels_last(call) and is_constant(call.args[1]):
            found.append(spec_of(call, lanes, ConvSpec))

    for function in mod.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return found


def channels_last(call: Any) -> bool:
    """Whether a two-dimensional convolution is laid out as the templates read it, and of known size."""
    attrs = call.attrs
    return attrs.data_layout == "NHWC" and attrs.kernel_layout == "OHWI" and shape_of(call) is not None


def convolve(
    builder: Any, call: Any, lanes: int, kind: Any, compute: Any, forms: Mapping[ConvSpec, int] | None = None
) -> Any:
    """Emit ``call``, a convolution as `spec_of` has it; ``compute(data, packed, spec)`` is the template's operator.

    ``forms`` are the tiles of those that are computed by fewer products (`kernels.winograd`).
    """
    from tvm import relax

    data, weight = call.args
    outputs, *kernel, _ = shape_of(weight) or ()
    spec = spec_of(call, lanes, kind)
    if is_constant(weight) and (size := (forms or {}).get(spec, 0)):
        transformed = relax.const(winograd.transformed_weight(array_of(weight).transpose(0, 3, 1, 2), spec, size))
        return builder.call_te(
            lambda x, w: winograd.conv2d(x, w, spec, size), data, transformed, primfunc_name_hint=winograd.NAME
        )
    regrouping = None
    if not (spec.groups == 1 or spec.depthwise or outputs // spec.groups % lanes == 0):
        regrouping = Regrouping.of(spec.groups, outputs, lanes)
        spec = replace(spec, groups=regrouping.fewer, out_channels=regrouping.fewer * regrouping.padded)
    if is_constant(weight):
        array = array_of(weight).transpose(0, len(kernel) + 1, *range(1, len(kernel) + 1))
        array = regrouping.weight(array) if regrouping else array
        if isinstance(spec, ConvSpec):
            packed = relax.const(packing.pack_conv_weight(array, spec, None))
        else:
            packed = relax.const(packing.pack_volume_weight(array, lanes, depthwise=spec.depthwise))
    else:
        if regrouping:
            weight = builder.emit_te(regrouping.computed_weight, weight, primfunc_name_hint="regroup")
        packed = builder.emit_te(lambda w: _packed(w, spec), weight, primfunc_name_hint="pack")
    name = "depthwise" if spec.depthwise else f"conv{len(kernel)}d"
    result = builder.call_te(lambda x, w: compute(x, w, spec), data, packed, primfunc_name_hint=name)
    if regrouping and regrouping.pads:
        return builder.call_te(regrouping.drop, builder.emit(result), primfunc_name_hint="take_channels")
    return result


def _packed(weight: Any, spec: Any) -> Any:
    """``weight [O, *K, I]`` as ``kernels.packing`` packs constants."""
    from tvm import te, tirx

    outputs, *kernel, depth = (int(size) for size in weight.shape)
    if spec.depthwise:
        return te.compute((*kernel, outputs), lambda *i: weight[(i[-1], *i[:-1], 0)], name="pack")
    lanes, blocks = spec.lanes, -(-outputs // spec.lanes)
    kernel = [] if getattr(spec, "is_dense", False) else kernel

    def value(*i: Any) -> Any:
        block, *tap, channel, lane = i
        o = block * lanes + lane
        at = (o, *(tap or (0, 0)), channel)
        return (
            weight[at]
            if outputs % lanes == 0
            else tirx.if_then_else(o < outputs, weight[at], tirx.const(0, weight.dtype))
        )

    return te.compute((blocks, *kernel, depth, lanes), value, name="pack")
