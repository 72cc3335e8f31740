"""Relax operations → fused functions: anchors from our own TE, everything else from TVM's, then fusion."""

from __future__ import annotations

import warnings
from typing import Any

from autocomp.compiler.expressions import array_of, is_constant, shape_of
from autocomp.hardware import Profile
from autocomp.kernels import compute


def lower(mod: Any, profile: Profile, target: Any) -> Any:
    """Return a module of fused functions, one for each group of operations that runs as one kernel."""
    import tvm
    from tvm import relax

    anchors = _Anchors(profile)
    passes = tvm.transform.Sequential(
        [
            relax.transform.CanonicalizeBindings(),
            relax.transform.FoldConstant(),
            relax.transform.LegalizeOps(
                {
                    "relax.nn.conv2d": anchors.conv2d,
                    "relax.matmul": anchors.matmul,
                },
                enable_warning=False,
            ),
            relax.transform.RewriteDataflowReshape(),  # a reshape of whole tensors is a view: keep it out of the kernels
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.EliminateCommonSubexpr(),
            relax.transform.DeadCodeElimination(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
        ]
    )
    with warnings.catch_warnings(), target:
        warnings.simplefilter("ignore")
        return passes(mod)


class _Anchors:
    """Legalisations of the operators that have templates."""

    def __init__(self, profile: Profile) -> None:
        self.lanes = profile.lanes

    def conv2d(self, builder: Any, call: Any) -> Any:
        from tvm import relax

        attrs = call.attrs
        data, weight = call.args
        if attrs.data_layout == "NHWC" and attrs.kernel_layout == "OHWI" and is_constant(weight) and shape_of(data):
            array = array_of(weight).transpose(0, 3, 1, 2)
            spec = compute.ConvSpec.of(
                shape_of(data) or (),
                array.shape,
                attrs.strides,
                attrs.padding,
                attrs.dilation,
                int(attrs.groups),
                self.lanes,
            )
            if spec.tileable:
                packed = relax.const(compute.pack_conv_weight(array, spec, None))
                return builder.call_te(
                    lambda x, w: compute.conv2d(x, w, spec), data, packed, primfunc_name_hint=_name(spec)
                )
        return _default(builder, call)

    def matmul(self, builder: Any, call: Any) -> Any:
        from tvm import relax

        a, b = call.args
        shape_a, shape_b = shape_of(a), shape_of(b)
        if shape_a is None or shape_b is None or len(shape_a) < 2 or len(shape_b) < 2:
            return _default(builder, call)
        if is_constant(b) and len(shape_b) == 2:
            spec = compute.DenseSpec.of(shape_a, shape_b[1], self.lanes)
            packed = relax.const(compute.pack_dense_weight(array_of(b).T, self.lanes, None))
            return builder.call_te(lambda x, w: compute.dense(x, w, spec), a, packed, primfunc_name_hint="dense")
        return builder.call_te(compute.batch_matmul, a, b, primfunc_name_hint="batch_matmul")


def _name(spec: compute.ConvSpec) -> str:
    return "depthwise" if spec.depthwise else "conv2d"


def _default(builder: Any, call: Any) -> Any:
    return call.op.get_attr("FLegalize")(builder, call)
