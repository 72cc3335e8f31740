"""Relax operations → fused functions: anchors from our own TE, everything else from TVM's, then fusion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autocomp.compiler.attention import fuse_attention
from autocomp.compiler.convolve import channels_last, convolutions_of, convolve
from autocomp.compiler.expressions import array_of, dtype_of, is_constant, number_of, shape_of, turns_matrices
from autocomp.hardware.profile import Profile
from autocomp.kernels import compute, packing, rows, vector_math, volumes
from autocomp.kernels.specs import ConvSpec, DenseSpec

Forms = Mapping[ConvSpec, int]


def lower(mod: Any, profile: Profile, target: Any, choose: Callable[[Sequence[ConvSpec]], Forms] | None = None) -> Any:
    """Return a module of fused functions, one for each group of operations that runs as one kernel.

    ``choose`` says in which form each of the module's convolutions is computed (`tuning.forms`); None: all directly.
    """
    import tvm
    from tvm import relax

    constants = tvm.transform.Sequential([relax.transform.CanonicalizeBindings(), relax.transform.FoldConstant()])
    with target:
        mod = fuse_attention(constants(mod), profile)
    anchors = _Anchors(profile, choose(convolutions_of(mod, profile.lanes)) if choose else {})
    passes = tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(anchors.rules(), enable_warning=False),
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

    def __init__(self, profile: Profile, forms: Forms) -> None:
        self.lanes = profile.lanes
        self._forms = forms
        self._transposes: dict[str, list[int]] = {}  # axes by name of the function that transposes

    def rules(self) -> dict[str, Any]:
        """Legalisation by name of the Relax operation."""
        return {
            "relax.nn.conv2d": self.conv2d,
            "relax.nn.conv3d": self.conv3d,
            "relax.matmul": self.matmul,
            "relax.permute_dims": self.permute_dims,
            "relax.power": _power,
            "relax.nn.softmax": self.softmax,
            "relax.nn.layer_norm": self.layer_norm,
            **{f"relax.{name}": _vectorised(function) for name, function in _ELEMENTWISE.items()},
        }

    def conv2d(self, builder: Any, call: Any) -> Any:
        if not channels_last(call):
            return _default(builder, call)
        return convolve(builder, call, self.lanes, ConvSpec, compute.conv2d, self._forms)

    def conv3d(self, builder: Any, call: Any) -> Any:
        if call.attrs.data_layout != "NDHWC" or call.attrs.kernel_layout != "ODHWI" or shape_of(call) is None:
            return _default(builder, call)
        return convolve(builder, call, self.lanes, volumes.VolumeSpec, volumes.conv3d)

    def matmul(self, builder: Any, call: Any) -> Any:
        from tvm import relax

        a, b = call.args
        shape_a, shape_b = shape_of(a), shape_of(b)
        if shape_a is None or shape_b is None or len(shape_a) < 2 or len(shape_b) < 2:
            return _default(builder, call)
        if is_constant(b) and len(shape_b) == 2:
            spec = DenseSpec.of(shape_a, shape_b[1], self.lanes)
            packed = relax.const(packing.pack_dense_weight(array_of(b).T, self.lanes, None))
            return builder.call_te(lambda x, w: compute.dense(x, w, spec), a, packed, primfunc_name_hint="dense")
        source = self._transposed_source(builder, b)
        right = b if source is None else source
        return builder.call_te(
            lambda x, y: compute.batch_matmul(x, y, self.lanes, transposed=source is not None),
            a, right, primfunc_name_hint="batch_matmul",
        )  # fmt: skip

    def permute_dims(self, builder: Any, call: Any) -> Any:
        from tvm import topi

        axes = [int(axis) for axis in call.attrs.axes] if call.attrs.axes else None
        if axes is None or is_constant(call.args[0]):
            return _default(builder, call)
        result = builder.call_te(topi.transpose, call.args[0], axes, primfunc_name_hint="transpose")
        self._transposes[result.args[0].name_hint] = axes
        return result

    def _transposed_source(self, builder: Any, value: Any) -> Any:
        """What ``value`` transposes the last two axes of; None if it is no such transpose."""
        from tvm import relax

        binding = builder.lookup_binding(value) if isinstance(value, relax.Var) else None
        if not isinstance(binding, relax.Call) or not isinstance(binding.args[0], relax.GlobalVar):
            return None
        axes = self._transposes.get(binding.args[0].name_hint)
        return binding.args[1].fields[0] if turns_matrices(axes) else None

    def softmax(self, builder: Any, call: Any) -> Any:
        shape = shape_of(call.args[0])
        if shape is None or int(call.attrs.axis) not in (-1, len(shape) - 1) or dtype_of(call.args[0]) != "float32":
            return _default(builder, call)
        function = rows.softmax(math.prod(shape[:-1]), shape[-1], self.lanes)
        return _by_rows(builder, "softmax", function, [call.args[0]], shape)

    def layer_norm(self, builder: Any, call: Any) -> Any:
        shape, attrs = shape_of(call.args[0]), call.attrs
        axes = [int(axis) for axis in attrs.axes]
        last = shape is not None and axes in ([-1], [len(shape) - 1])
        if shape is None or not last or not (attrs.center and attrs.scale) or dtype_of(call.args[0]) != "float32":
            return _default(builder, call)
        function = rows.layer_norm(math.prod(shape[:-1]), shape[-1], float(attrs.epsilon), self.lanes)
        return _by_rows(builder, "layer_norm", function, list(call.args), shape)


_ELEMENTWISE = {
    "exp": vector_math.exp,
    "sigmoid": vector_math.sigmoid,
    "tanh": vector_math.tanh,
    "erf": vector_math.erf,
    "nn.silu": vector_math.silu,
    "nn.gelu": vector_math.gelu,
    "nn.gelu_tanh": vector_math.gelu_tanh,
}


def _vectorised(function: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """The legalisation of an elementwise operation that computes ``function`` of every element."""
    from tvm import te

    def legalise(builder: Any, call: Any) -> Any:
        if dtype_of(call.args[0]) != "float32":
            return _default(builder, call)
        name = call.op.name.rpartition(".")[2]
        return builder.call_te(
            lambda x: te.compute(x.shape, lambda *i: function(x[i]), name=name), call.args[0], primfunc_name_hint=name
        )

    return legalise


def _power(builder: Any, call: Any) -> Any:
    """A power with a constant exponent, as multiplications where they suffice."""
    from tvm import te

    base, exponent = call.args
    value = number_of(exponent)
    if (
        value is None
        or dtype_of(call.args[0]) != "float32"
        or len(shape_of(exponent) or ()) > len(shape_of(base) or ())
    ):
        return _default(builder, call)
    if not vector_math.has_power(value):
        return _default(builder, call)
    return builder.call_te(
        lambda x: te.compute(x.shape, lambda *i: vector_math.power(x[i], value), name="power"),
        base,
        primfunc_name_hint="power",
    )


def _by_rows(builder: Any, name: str, function: Any, arguments: list[Any], shape: tuple[int, ...]) -> Any:
    """Call a function over ``[rows, length]`` on a tensor of any rank; the reshapes are views."""
    from tvm import relax

    flat = [math.prod(shape[:-1]), shape[-1]]
    first = arguments[0] if list(shape) == flat else builder.emit(relax.op.reshape(arguments[0], flat))
    called = builder.add_func(function.without_attr("global_symbol"), name)
    result = relax.call_tir(called, [first, *arguments[1:]], out_ty=relax.TensorType(flat, "float32"))
    return result if list(shape) == flat else relax.op.reshape(builder.emit(result), list(shape))


def _default(builder: Any, call: Any) -> Any:
    return call.op.get_attr("FLegalize")(builder, call)
