"""What a model may come as → what everything else here works on: an ``nn.Module`` in fp32 on the CPU.

Converted, always on a copy: models in half precision, bfloat16 or fp64, models on another device, what ``torch.compile`` or
``DataParallel`` wrapped. Refused, in one message that says what to give instead: what has no values (meta and fake tensors, lazy
parameters), no source (scripted modules), or numbers that no kernel computes in (complex, 8-bit floats, torch's quantised tensors).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.errors import UsageError
from autocomp.layers.hooks import hooked

WHOLE, SHORT = (
    1e-3,
    0.1,
)  # of an output's range, that a float32 copy may differ by: of float64 models, and of those in 16 bits
CONVERTED = (torch.float16, torch.bfloat16, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
_KEPT = (torch.float32, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_WRAPPERS = (
    "_orig_mod",
    "module",
)  # where torch.compile and (Distributed)DataParallel keep the model that they were given


def plain(
    model: nn.Module, inputs: Sequence[Tensor], what: str = "the model", which: str = "the example inputs"
) -> tuple[nn.Module, tuple[Tensor, ...], list[str]]:
    """Return the model and its inputs in fp32 on the CPU, and a note for each kind of change; both as given where nothing is to change.

    The model given is never changed: what needs a conversion is copied first. UsageError names the parameter, module or input
    that cannot be converted, and says what to give instead.
    """
    notes: list[str] = []
    if not isinstance(model, nn.Module):
        if callable(getattr(model, "module", None)) and hasattr(model, "graph_signature"):
            raise UsageError(f"{what} is an exported program: give its module, program.module()")
        raise UsageError(f"{what} must be a torch.nn.Module, got a value of type {type(model).__name__}")
    original = _unwrapped(model)
    if original is not model:
        notes.append(f"{what} was wrapped ({type(model).__name__}): the model inside is taken")
        model = original
    _refuse_scripted(model, what)
    named = list(_named_tensors(model))
    for name, tensor in named:
        check_tensor(tensor, f"{name} of {what}", "load or initialise the weights first", held=True)
    for index, tensor in enumerate(inputs):
        check_tensor(tensor, f"{which}[{index}]")
    tensors = [tensor for _, tensor in named]
    if any(_foreign(tensor) for tensor in tensors) or _is_compiled_inside(model) or _has_sealed_mode(model):
        notes += _said(tensors, what)
        model = _converted(model, what)
    notes += _said(inputs, which)
    return model, tuple(_bare(plain_tensor(tensor)) for tensor in inputs), notes


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode meanwhile, each of its modules as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def refuse_another(
    given: nn.Module, its_inputs: Sequence[Tensor], model: nn.Module, inputs: Sequence[Tensor], what: str
) -> None:
    """UsageError if what `plain` made of a model computes something else than the model: hooks of a wrapper that was taken off, code that looks
    at its own precision. Left at that where the model cannot be run as it is (its device is not here)."""
    try:
        with torch.no_grad(), evaluating(given):
            expected = given(*(tensor.clone() for tensor in its_inputs))
            found = model.eval()(*(tensor.clone() for tensor in inputs))
    except Exception:
        return
    short = any(t.dtype in (torch.float16, torch.bfloat16) for t in (*given.parameters(), *its_inputs))
    for theirs, ours in zip(_tensors_in(expected), _tensors_in(found), strict=False):
        theirs, ours = plain_tensor(theirs.detach()).double(), plain_tensor(ours.detach()).double()
        range_ = float(theirs[torch.isfinite(theirs)].abs().max()) if bool(torch.isfinite(theirs).any()) else 0.0
        allowed = (SHORT if short else WHOLE) * range_
        if theirs.shape != ours.shape or bool(((theirs - ours).abs() > allowed).any()):
            raise UsageError(
                f"{what} differs from what it was taken for (a plain model in float32 on the CPU): a hook or code of the wrapper around it, or "
                "code that looks at its own precision, changes what it computes. Give the plain model, with that in its forward"
            )


def check_tensor(tensor: Tensor, what: str, remedy: str = "give real values", held: bool = False) -> None:
    """UsageError if a tensor has no values, or values of a kind that no kernel here computes in; of one that a model holds, complex ones are
    computed with in their parts (`graph.complex_numbers`)."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.nn.parameter import is_lazy
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_lazy(tensor):
        raise UsageError(f"{what} is lazy, its shape is not known yet: run the model once on an example")
    if tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        raise UsageError(f"{what} has no values (it is a {'meta' if tensor.is_meta else 'fake'} tensor): {remedy}")
    if is_traceable_wrapper_subclass(tensor):
        raise UsageError(f"{what} is a {type(tensor).__name__}, no plain tensor: give the model as it was before")
    if tensor.is_quantized or tensor.dtype not in (*_KEPT, *CONVERTED, *(COMPLEX if held else ())):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UsageError(
            f"{what} is of {dtype}: models are taken in fp32, fp16, bf16 or fp64, and their inputs in these, integers or bool"
        )
    if tensor.layout is not torch.strided:
        raise UsageError(f"{what} is sparse ({tensor.layout}): give it dense, as tensor.to_dense()")


def plain_tensor(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, half precision, bfloat16 and fp64 as fp32; itself where that is what it is."""
    return tensor.to("cpu", torch.float32 if tensor.dtype in CONVERTED else tensor.dtype)


@contextmanager
def taking_any(model: nn.Module) -> Iterator[None]:
    """While this lasts, ``model`` converts its inputs as `plain_tensor`: who wrote a bfloat16 model evaluates it on bfloat16."""

    def convert(_module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return _mapped(arguments), _mapped(keywords)

    with hooked([model.register_forward_pre_hook(convert, with_kwargs=True)]):
        yield


class PlainBatches:
    """Training data whose inputs are converted as `plain_tensor`, as often as it is gone through; targets are left as they are."""

    def __init__(self, batches: Iterable[tuple[tuple[Tensor, ...], Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        return ((_mapped(tuple(inputs)), target) for inputs, target in self.batches)


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, _wrapper_types()):
        model = next(inner for name in _WRAPPERS if isinstance(inner := getattr(model, name, None), nn.Module))
    return model


def _wrapper_types() -> tuple[type, ...]:
    from torch._dynamo import OptimizedModule

    return (OptimizedModule, nn.DataParallel, nn.parallel.DistributedDataParallel)


def _refuse_scripted(model: nn.Module, what: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"module {name!r} of {what}" if name else what
            raise UsageError(
                f"{where} was scripted or traced by torch.jit, which cannot be exported: give the nn.Module that it was made from"
            )


def _bare(tensor: Tensor) -> Tensor:
    """An input without its gradient and its class (an image of torchvision's)."""
    return tensor if type(tensor) is Tensor and not tensor.requires_grad else tensor.detach().as_subclass(Tensor)


def _foreign(tensor: Tensor) -> bool:
    return tensor.dtype in CONVERTED or tensor.device.type != "cpu"


def _is_compiled_inside(model: nn.Module) -> bool:
    wrappers = _wrapper_types()
    return any(isinstance(m, wrappers) or m._compiled_call_impl is not None for m in model.modules())


def _has_sealed_mode(model: nn.Module) -> bool:
    """Whether torch put functions that refuse in the place of ``train`` and ``eval``, as it does in the module of an exported program."""
    return any("eval" in vars(module) or "train" in vars(module) for module in model.modules())


def _said(tensors: Sequence[Tensor], what: str) -> list[str]:
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.dtype in CONVERTED}
    devices = {tensor.device.type for tensor in tensors if tensor.device.type != "cpu"}
    notes = [f"{what}: {' and '.join(sorted(dtypes))} taken as float32, on a copy; sizes are of that"] if dtypes else []
    return [*notes, f"{what}: taken from {' and '.join(sorted(devices))} to the CPU, on a copy"] if devices else notes


def _converted(model: nn.Module, what: str) -> nn.Module:
    """A copy in fp32 on the CPU, every wrapper inside it taken off. Tied tensors stay tied."""
    # What deepcopy finds in its memo it does not copy, so that no second copy is ever made in the dtype and place of the first.
    memo: dict[int, Any] = {}
    for _, tensor in _named_tensors(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = _copied(tensor)
    for module in model.modules():
        for name, value in vars(module).items():
            if name == "_compiled_call_impl" and value is not None:
                memo[id(value)] = None
    try:
        model = copy.deepcopy(model, memo)
    except Exception as error:
        raise UsageError(
            f"{what} cannot be copied ({type(error).__name__}: {error}), so it cannot be taken to fp32 on the CPU: give it so"
        ) from error
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _unwrapped(child)
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.dtype | torch.device):  # what a forward casts to
                setattr(module, name, _plain_constant(value))
            elif name in ("train", "eval"):
                del vars(module)[name]
        if isinstance(module, torch.fx.GraphModule):
            _retype(module)
    return model


def _retype(module: torch.fx.GraphModule) -> None:
    """Casts that were written down when a model in bfloat16 was exported become casts to fp32."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
            continue
        node.args = torch.fx.node.map_aggregate(node.args, _plain_constant)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _plain_constant)
    module.recompile()


def _plain_constant(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value in CONVERTED:
        return torch.float32
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _copied(tensor: Tensor) -> Tensor:
    value = plain_tensor(tensor.detach())
    value = value.clone() if value.data_ptr() == tensor.data_ptr() else value
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors that modules keep as plain attributes, each with what a message calls it."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield f"parameter {name!r}", parameter
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield f"buffer {name!r}", buffer
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                for tensor in _tensors_in(value):
                    yield f"attribute {f'{path}.{name}'.lstrip('.')!r}", tensor


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item)


def _mapped(value: Any, function: Callable[[Tensor], Tensor] = plain_tensor) -> Any:
    """A function applied to every tensor of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_mapped(item, function) for item in value)
    return value
