"""Operations with constant weights → the module of torch.nn that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocomp.layers.convolution import FLOAT


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that does not depend on the inputs. ``path`` names it in the user's model, if it stands there as it is;
    ``made_of`` counts the elements of the weights it was computed from."""

    value: Tensor
    path: str
    made_of: int


@dataclass(frozen=True)
class Call:
    """A layer to make: its class, settings and tensors, and what it is called on, padded first where ``padding`` says so
    (as of ``constant_pad_nd``); ``others`` are more arguments of the call."""

    kind: type[nn.Module]
    settings: tuple[tuple[str, Any], ...]
    tensors: Mapping[str, Tensor | None]
    source: Any
    path: str = ""
    padding: Sequence[int] | None = None
    turned: bool = field(default=False, compare=False)  # the weight is the transpose of what was given
    others: tuple[Any, ...] = ()

    def make(self) -> nn.Module:
        """The module, in evaluation mode, with these very tensors."""
        with torch.device("meta"):
            module = self.kind(**dict(self.settings))
        for name, tensor in self.tensors.items():
            if tensor is None:
                continue
            holder, last = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            if last in holder._buffers:
                holder._buffers[last] = tensor.detach()
            elif self.turned and name == "weight":
                holder._parameters[last] = nn.Parameter(tensor.detach().t().contiguous(), tensor.requires_grad)
            else:
                own = isinstance(tensor, nn.Parameter) and tensor.is_contiguous()
                made = tensor if own else nn.Parameter(tensor.detach().contiguous().clone())
                holder.register_parameter(last, made)  # type: ignore[arg-type] # `own` says that it is a Parameter
        if "num_batches_tracked" in module._buffers:
            module._buffers["num_batches_tracked"] = torch.tensor(0)
        return module.eval()


Rule = Callable[[fx.Node, list[Any], dict[str, Any]], Call | None]


def _tensor(value: Any) -> Tensor | None:
    return value.value if isinstance(value, Constant) else None


def _argument(node: fx.Node, args: list[Any], kwargs: dict[str, Any], name: str, default: Any = None) -> Any:
    schema = node.target._schema  # type: ignore[union-attr]
    for index, argument in enumerate(schema.arguments):
        if argument.name == name:
            return args[index] if index < len(args) else kwargs.get(name, default)
    return default


def _constants(*values: Any) -> bool:
    """Whether all are constants or left out."""
    return all(value is None or isinstance(value, Constant) for value in values)


def _floating(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


def _linear(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Call | None:
    source, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
    return _dense(source, weight, bias, turned=False)


def _dense(source: Any, weight: Any, bias: Any, turned: bool) -> Call | None:
    w, b = _tensor(weight), _tensor(bias)
    if w is None or w.dim() != 2 or not _constants(bias) or not _floating(w, b) or not isinstance(source, fx.Node):
        return None
    outputs, inputs = w.shape[::-1] if turned else w.shape
    if b is not None and b.shape != (outputs,):
        return None
    settings = (("in_features", inputs), ("out_features", outputs), ("bias", b is not None))
    return Call(nn.Linear, settings, {"weight": w, "bias": b}, source, weight.path, turned=turned)


def _addmm(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Call | None:
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        return None
    return _dense(args[1], args[2], args[0], turned=True) if isinstance(args[0], Constant) else None


def _matmul(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Call | None:
    return _dense(args[0], args[1], None, turned=True)


def _spread(value: Any, rank: int) -> tuple[int, ...]:
    items = [value] * rank if isinstance(value, int) else list(value)
    return tuple(int(item) for item in (items * rank if len(items) == 1 else items))


def _convolution(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Call | None:
    def get(name: str, default: Any = None) -> Any:
        return _argument(node, args, kwargs, name, default)

    source, weight, bias = args[0], get("weight"), get("bias")
    w, b = _tensor(weight), _tensor(bias)
    if w is None or not _constants(bias) or not _floating(w, b) or not isinstance(source, fx.Node):
        return None
    rank = w.dim() - 2
    batched = node.args[0].meta["val"].dim() == w.dim()  # type: ignore[union-attr]
    transposed = "transpose" in str(node.target) or bool(get("transposed", False))
    if (rank, transposed) not in FLOAT or not batched:
        return None
    groups, kernel = int(get("groups", 1)), tuple(w.shape[2:])
    stride, dilation = _spread(get("stride", 1), rank), _spread(get("dilation", 1), rank)
    padding, extra = _padding(get("padding", 0), kernel, dilation, rank)
    settings: list[tuple[str, Any]] = [
        ("kernel_size", kernel), ("stride", stride), ("padding", padding), ("dilation", dilation), ("groups", groups),
        ("bias", b is not None),
    ]  # fmt: skip
    if transposed:
        channels = (w.shape[0], w.shape[1] * groups)
        settings.append(("output_padding", _spread(get("output_padding", 0), rank)))
    else:
        channels = (w.shape[1] * groups, w.shape[0])
    settings += [("in_channels", channels[0]), ("out_channels", channels[1])]
    kind = FLOAT[rank, transposed]
    return Call(kind, tuple(settings), {"weight": w, "bias": b}, source, weight.path, extra)


def _padding(
    padding: Any, kernel: Sequence[int], dilation: Sequence[int], rank: int
) -> tuple[tuple[int, ...], list[int] | None]:
    """A convolution's padding in numbers, and what must be padded before it where two sides differ ("same", even kernels)."""
    if padding == "valid":
        return (0,) * rank, None
    if padding != "same":
        return _spread(padding, rank), None
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    low = tuple(t // 2 for t in total)
    more = [t - 2 * left for t, left in zip(total, low, strict=True)]
    return low, [n for extra in reversed(more) for n in (0, extra)] if any(more) else None


def _batch_norm(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Call | None:
    source, weight, bias, mean, var, training, momentum, eps = args[:8]
    tensors = {
        "weight": _tensor(weight),
        "bias": _tensor(bias),
        "running_mean": _tensor(mean),
        "running_var": _tensor(var),
    }
    given = _constants(weight, bias) and isinstance(mean, Constant) and isinstance(var, Constant)
    if training or not given or not isinstance(source, fx.Node) or not _floating(*tensors.values()):
        return None
    if (weight is None) != (bias is None):
        return None
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank)
    if kind is None:
        return None
    settings = (
        ("num_features", mean.value.shape[0]), ("eps", float(eps)), ("momentum", float(momentum)),
        ("affine", weight is not None),
    )  # fmt: skip
    return Call(kind, settings, tensors, source, mean.path)


def _embedding(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Call | None:
    weight, indices = args[:2]
    table = _tensor(weight)
    if table is None or not _floating(table) or table.dim() != 2 or not isinstance(indices, fx.Node):
        return None
    settings = (("num_embeddings", table.shape[0]), ("embedding_dim", table.shape[1]))
    return Call(nn.Embedding, settings, {"weight": table}, indices, weight.path)


LAYER_CALLS: Mapping[str, Rule] = {
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    "aten.mm.default": _matmul,
    "aten.matmul.default": _matmul,
    **{f"aten.conv{rank}d.{kind}": _convolution for rank in (1, 2, 3) for kind in ("default", "padding")},
    **{f"aten.conv_transpose{name}": _convolution for name in ("1d.default", "2d.input", "3d.input")},
    "aten.convolution.default": _convolution,
    "aten.batch_norm.default": _batch_norm,
    "aten.embedding.default": _embedding,
}
