"""Finding attention in a Relax function: ``softmax(q k^T * scale + bias) v``, which becomes one kernel (`kernels.attention`).

Whatever scales scores by a constant and is added to them, masks and positions say, is taken in. Scores or weights that are read elsewhere too
must be there as a whole, so such an attention stays as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autocomp.compiler.expressions import calls, dtype_of, number_of, shape_of, turns_matrices
from autocomp.hardware.profile import Profile
from autocomp.kernels.attention import TEMPLATE, AttentionSpec, attention
from autocomp.kernels.templates import stating

_ABSORBS = -1e30  # to which any score may be added without a change
_VIEWS = ("relax.reshape", "relax.expand_dims", "relax.squeeze")


def fuse_attention(mod: Any, profile: Profile) -> Any:
    """A Relax module with one call in ``main`` for each attention that a kernel of the profile computes. Results are unchanged."""
    from tvm import relax

    function = mod["main"]
    found = _Reader(function).attentions()
    if not found:
        return mod

    @relax.expr_functor.mutator
    class Fuse(relax.PyExprMutator):
        def visit_call_(self, call: Any) -> Any:
            match = next((match for each, match in found if call.same_as(each)), None)
            return super().visit_call_(call) if match is None else _fused(self, match, call, profile)

    fuse = Fuse(mod)
    main = fuse.visit_expr(function)
    result = fuse.builder_.get()
    result[result.get_global_var("main")] = main
    return relax.transform.DeadCodeElimination()(result)


@dataclass(frozen=True)
class _Added:
    """What is added to scores of a shape, times a scale; of a mask, a number where it is true and another where it is not."""

    value: Any
    shape: tuple[int, ...]
    scale: float = 1.0
    masked: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Scores:
    """``queries keys * scale``, plus what is added."""

    queries: Any
    keys: Any
    scale: float
    added: tuple[_Added, ...] = ()


@dataclass(frozen=True)
class _Attention:
    """One attention; ``transposed`` where the keys are ``[columns, depth]``."""

    scores: _Scores
    transposed: bool
    values: Any


def _fused(fuse: Any, found: _Attention, call: Any, profile: Profile) -> Any:
    """The call of a kernel for an attention, whose product with the values is ``call``."""
    from tvm import relax

    scores, builder = found.scores, fuse.builder_
    *lead, rows, depth = _shape(scores.queries)
    *_, columns, width = _shape(found.values)
    arguments = [scores.queries, scores.keys, found.values]
    flat = [_flat(builder, fuse.visit_expr(each), _shape(each)) for each in arguments]
    bias_lead: tuple[int, ...] = ()
    bias_rows = 0
    if scores.added:
        lead = list(scores.added[0].shape[:-2])
        bias = _bias(fuse, scores.added)
        shape = (1,) * (len(lead) + 2 - len(_shape(bias))) + _shape(bias)
        bias_lead, bias_rows = shape[:-2], shape[-2]
        flat.append(_flat(builder, bias, shape))
    spec = AttentionSpec(tuple(lead), rows, columns, depth, width, found.transposed, scores.scale, bias_lead, bias_rows)
    function = stating(attention(spec, profile), TEMPLATE, (spec.heads, rows, columns), (depth + width,))
    called = builder.add_func(function.without_attr("global_symbol"), TEMPLATE)
    result = relax.call_tir(called, flat, out_ty=relax.TensorType([spec.heads, rows, width], "float32"))
    return relax.op.reshape(builder.emit(result), list(_shape(call)))


def _flat(builder: Any, value: Any, shape: tuple[int, ...]) -> Any:
    """A tensor with its leading axes as one; a view."""
    from tvm import relax

    return builder.emit(relax.op.reshape(value, [math.prod(shape[:-2]), *shape[-2:]]))


def _bias(fuse: Any, added: tuple[_Added, ...]) -> Any:
    """The sum of what is added to scores, each times its scale."""
    from tvm import relax

    total = None
    for each in added:
        term = fuse.visit_expr(each.value)
        if each.masked is not None:
            term = fuse.builder_.emit(relax.op.where(term, *(relax.const(np.float32(one)) for one in each.masked)))
        if each.scale != 1.0:
            term = fuse.builder_.emit(relax.op.multiply(term, relax.const(np.float32(each.scale))))
        total = term if total is None else fuse.builder_.emit(relax.op.add(total, term))
    return total


class _Reader:
    """The attentions of one function."""

    def __init__(self, function: Any) -> None:
        from tvm import relax

        bindings = [binding for block in function.body.blocks for binding in block.bindings]
        self.made = {binding.var: binding.value for binding in bindings}
        self.uses: Counter[Any] = Counter()

        def count(expression: Any) -> None:
            if isinstance(expression, relax.Var):
                self.uses[expression] += 1

        for value in [*self.made.values(), function.body.body]:
            relax.analysis.post_order_visit(value, count)

    def attentions(self) -> list[tuple[Any, _Attention]]:
        """The products with values, each with its attention."""
        found = ((value, self._attention(value)) for value in self.made.values())
        return [(value, each) for value, each in found if each is not None]

    def _attention(self, call: Any) -> _Attention | None:
        if not calls(call, "relax.matmul"):
            return None
        weights = self._alone(call.args[0])
        if (
            weights is None
            or not calls(weights, "relax.nn.softmax")
            or int(weights.attrs.axis) not in (-1, len(_shape(weights)) - 1)
        ):
            return None
        scores = self._scores(weights.args[0], 1.0)
        if scores is None:
            return None
        source = self._turned(scores.keys)
        found = _Attention(scores if source is None else replace(scores, keys=source), source is not None, call.args[1])
        return found if _fits(found, call) else None

    def _scores(self, value: Any, outside: float) -> _Scores | None:
        """The scores that a value is, all of it times ``outside``; None where it is something else, or read elsewhere too."""
        call = self._alone(value)
        if call is None:
            return None
        if calls(call, "relax.matmul"):
            return _Scores(call.args[0], call.args[1], outside)
        if calls(call, "relax.multiply") and (factor := number_of(call.args[1])) is not None:
            return self._scores(call.args[0], outside * factor)
        if calls(call, "relax.divide") and (factor := number_of(call.args[1])):
            return self._scores(call.args[0], outside / factor)
        for main, added in _sums(call):
            if _shape(main) == _shape(call) and (found := self._scores(main, outside)) is not None:
                return replace(found, added=(*found.added, replace(added, scale=outside)))
        return None

    def _alone(self, value: Any) -> Any:
        """What makes a value that is read once, behind views of it that keep its last two axes; None where there is no such thing."""
        shape = _shape(value)[-2:]
        while self.uses[value] == 1:
            call: Any = self.made.get(value)
            if not any(calls(call, name) for name in _VIEWS):
                return call if _shape(value)[-2:] == shape else None
            value = call.args[0]
        return None

    def _turned(self, keys: Any) -> Any:
        """What ``keys`` are with the last two axes in the other order; None if they are not made so."""
        call: Any = self.made.get(keys)
        if not calls(call, "relax.permute_dims"):
            return None
        rank = len(_shape(keys))
        axes = [int(axis) for axis in call.attrs.axes] if call.attrs.axes else [*range(rank)][::-1]
        return call.args[0] if turns_matrices(axes) else None


def _sums(call: Any) -> list[tuple[Any, _Added]]:
    """(scores, what is added to them): of a sum both ways round, of a ``where`` that puts so low a number in the place of scores that adding
    it comes to the same."""
    shape = _shape(call)
    if calls(call, "relax.add"):
        left, right = call.args
        return [(left, _Added(right, shape)), (right, _Added(left, shape))]
    if calls(call, "relax.where"):
        mask, yes, no = call.args
        if (lowest := number_of(no)) is not None and lowest <= _ABSORBS:
            return [(yes, _Added(mask, shape, masked=(0.0, lowest)))]
        if (lowest := number_of(yes)) is not None and lowest <= _ABSORBS:
            return [(no, _Added(mask, shape, masked=(lowest, 0.0)))]
    return []


def _fits(found: _Attention, call: Any) -> bool:
    """Whether the tensors are those that a kernel takes: float32, nothing broadcast but what is added, and more than one query."""
    scores, added = found.scores, found.scores.added
    operands = [scores.queries, scores.keys, found.values]
    queries, keys, values = map(_shape, operands)
    return (
        all(dtype_of(each) == "float32" for each in (*operands, *(one.value for one in added if one.masked is None)))
        and min(map(len, (queries, keys, values))) > 2
        and queries[:-2] == keys[:-2]
        and _shape(call.args[0])[:-2] == values[:-2]
        and all(one.shape == added[0].shape and _shape(one.value)[-1:] == values[-2:-1] for one in added)
        and math.isfinite(scores.scale)
        and queries[-2] > 1
    )


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor; of anything else that of a scalar."""
    return shape_of(value) or ()
