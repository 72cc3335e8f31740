"""A compressed model → the model that is trained, and back."""

from __future__ import annotations

from torch import nn

from autocomp.layers.exchange import exchanged
from autocomp.layers.part import Stored
from autocomp.layers.recurrent import Recurrence
from autocomp.records.precisions import load
from autocomp.recovery.forms.form import Training


def trainable(model: nn.Module) -> nn.Module:
    """Return a copy of a compressed model in which everything trains that can: stored layers in their training forms, all floats learning.

    It begins where ``model`` is, to the last bit. What `frozen` names stays as it is.
    """
    left = {id(module) for module in _in_loops(model)}
    memo: dict[int, object] = {
        id(module): load(module.family.trains)(module)
        for module in model.modules()
        if isinstance(module, Stored) and id(module) not in left
    }
    return exchanged(model, memo).train().requires_grad_(True)


def converted(trained: nn.Module) -> nn.Module:
    """Return the model that is delivered, in evaluation mode: what ``trained`` computes in evaluation mode, to the last bit."""
    memo: dict[int, object] = {
        id(module): module.stored() for module in trained.modules() if isinstance(module, Training)
    }
    return exchanged(trained, memo).eval().requires_grad_(False)


def frozen(model: nn.Module) -> list[str]:
    """The layers that do not train: the stored weights of loops over time, whose op has no gradients of its own."""
    left = {id(module) for module in _in_loops(model)}
    return [name for name, module in model.named_modules() if id(module) in left]


def _in_loops(model: nn.Module) -> list[nn.Module]:
    loops = [module.hidden for module in model.modules() if isinstance(module, Recurrence)]
    return [hidden for hidden in loops if isinstance(hidden, Stored)]
