"""Which modules a delivered model is made of, and how each is made again from plain settings and tensors: no file holds code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.layers.convolution import Convolutions, Geometry, Transposed
from autocomp.layers.form import Form
from autocomp.layers.narrow import Norms
from autocomp.layers.recurrent import Recurrence
from autocomp.records.precisions import FAMILIES, load

_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_EMBEDDING = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type")
FORMS: Mapping[str, Form] = {
    form.kind.__name__: form
    for form in (
        Form(nn.Linear, ("in_features", "out_features"), bias=True),
        *(
            Form(kind, _CONVOLUTION + (("output_padding",) if kind in Transposed else ()), bias=True)
            for kind in Convolutions
        ),
        *(Form(kind, _NORM) for kind in Norms),
        Form(nn.Embedding, _EMBEDDING),
        Form(nn.Sequential, ()),
        Form(Recurrence, ("kind", "reverse", "batch_first"), others={"width": 1, "bias": False}),
        *(form for family in FAMILIES if family.forms for form in load(family.forms)),
    )
}


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The settings of a module as JSON can hold them. TypeError if it is of no kind that a delivered model is made of."""
    form = FORMS.get(type(module).__name__)
    if form is None or form.kind is not type(module):
        raise TypeError(f"a delivered model has no {type(module).__module__}.{type(module).__qualname__}")
    return {name: getattr(module, name) for name in form.settings}


def make(kind: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module as `settings_of` described it, on these tensors. KeyError, TypeError or ValueError if it cannot be."""
    form = FORMS[kind]
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    if set(given) != set(form.settings):
        raise ValueError(f"a {kind} has the settings {', '.join(form.settings)}, not {', '.join(given)}")
    if "geometry" in given:
        parts: list[Any] = [tuple(part) if isinstance(part, list) else part for part in given["geometry"]]
        given["geometry"] = Geometry(*parts)
    if form.tensors:
        return form.kind(**{name: tensors[name] for name in form.tensors}, **given)
    if form.bias:
        given["bias"] = "bias" in tensors
    given |= form.others
    with torch.device("meta"):
        module = form.kind(**given)
    for name, tensor in tensors.items():
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        elif name in module._buffers:
            module._buffers[name] = tensor
        else:
            raise ValueError(f"a {kind} has no tensor {name!r}")
    return module
