"""``nn.MultiheadAttention`` written out, a linear layer for each projection, so that its heads and layers can be compressed.

torch's module holds the projections of queries, keys and values in one bare parameter and computes them in one function: no
layer is there to be quantised or factorised, and the number of heads is fixed. A `Task` therefore holds a copy of its model
in which `unpacked` has put an `Attention` in place of each such module that can be written out.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """What ``nn.MultiheadAttention`` computes, called as it is; made from one that `kept_because` has nothing against.

    ``num_heads`` is the number it was made with: how many heads are left, each of ``head_dim``, is read off the projections.
    """

    # nn.TransformerEncoderLayer and nn.TransformerEncoder read these: they say that its fused kernel cannot be used.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = source.embed_dim, source.num_heads
        self.head_dim = source.head_dim
        self.dropout, self.batch_first = source.dropout, source.batch_first
        weights = [
            getattr(source, f"{name}_proj_weight") for name in "qkv"
        ]  # where keys or values have sizes of their own
        if source._qkv_same_embed_dim:
            weights = _thirds(source.in_proj_weight)
        biases = [None] * 3 if source.in_proj_bias is None else _thirds(source.in_proj_bias)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, shaped as ``query``, and the weights ``[N, L, S]`` (``[N, heads, L, S]`` not averaged) or None.

        ``[N, L, E]`` with ``batch_first``, else ``[L, N, E]``; ``[L, E]`` without batch. ``is_causal`` is only torch's hint
        that ``attn_mask`` is causal. In training, dropout is on the output's weights and not on those returned.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal only says of attn_mask that it is causal: give the mask too")
        single = query.dim() == 2
        batch = 0 if self.batch_first else 1
        if single:
            query, key, value = (x.unsqueeze(batch) for x in (query, key, value))
        # [N, heads, length, size of a head], whichever way the input lies
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).permute(order)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = _merged(attn_mask, key_padding_mask, q)
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        back = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        output = self.out_proj(mixed.permute(back).flatten(2))
        weights = None
        if need_weights:
            # Apart from the output on purpose: where nobody reads the weights, which torch returns unless it is told not
            # to, export leaves all of this out, and what remains is plain attention.
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = weights.mean(1) if average_attn_weights else weights
        if single:
            output, weights = output.squeeze(batch), None if weights is None else weights.squeeze(0)
        return output, weights


def unpacked(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with an `Attention` for each ``nn.MultiheadAttention`` that can be written out.

    The model itself, not a copy, if it has none, or if it cannot be copied (which `analyse` then says). Outputs in evaluation
    mode are the same to rounding. Names of parameters change: ``in_proj_weight`` becomes ``q_proj.weight`` and so on.
    """
    if not any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        return model
    try:
        model = copy.deepcopy(model)
    except Exception:  # whatever a module holds
        return model
    made = {
        module: Attention(module)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention) and not kept_because(module, model)
    }
    if model in made:
        return made[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(part, Attention) for part in module.modules()):
            module.use_nested_tensor = False  # that way reads packed weights; export never takes it
    return model


def kept_because(module: nn.Module, model: nn.Module) -> str:
    """Why an ``nn.MultiheadAttention`` of ``model`` cannot be written out; empty if it can."""
    if type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__} is not nn.MultiheadAttention itself and may compute something else"
    if module.bias_k is not None or module.bias_v is not None:
        return "it adds a learned key and value (add_bias_kv)"
    if module.add_zero_attn:
        return "it adds a key and value of zeros (add_zero_attn)"
    if type(module.out_proj) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"its out_proj was exchanged for {type(module.out_proj).__name__}"
    if any(hooks for part in module.modules() for name, hooks in vars(part).items() if "_hooks" in name):
        return "it has hooks, which would be lost"
    uses = Counter(id(p) for part in model.modules() for p in part._parameters.values() if p is not None)
    if any(uses[id(parameter)] != 1 for parameter in module.parameters()):
        return "another module has the same weights"
    return ""


def _thirds(packed: Tensor) -> list[nn.Parameter]:
    return [nn.Parameter(part.clone(), packed.requires_grad) for part in packed.detach().chunk(3)]


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """A linear layer of these parameters, wherever and of whatever type they are."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Both masks as one that is added to scores ``[N, heads, L, S]``; None without any."""
    found = []
    if attn_mask is not None:  # [L, S] for all, or [N * heads, L, S]
        attn_mask = _added(attn_mask, query)
        found.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (len(query), -1)))
    if key_padding_mask is not None:  # [N, S], or [S] without batch
        padding = _added(key_padding_mask, query)
        found.append(padding.view(-1, 1, 1, padding.shape[-1]))
    return None if not found else found[0] if len(found) == 1 else found[0] + found[1]


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """A mask in numbers to add: a true one forbids, and becomes minus infinity."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(mask, float("-inf"))
