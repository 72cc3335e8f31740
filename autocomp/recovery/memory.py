"""In how many parts a batch is gone through, so that what a step keeps for the way back stays small."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autocomp.layers.narrow import Norms

# Bytes that a step's layers keep: ViT-Ti at 224 then trains in less than 3 GB, teacher included (benchmarks/training_memory.py).
KEPT = 1 << 30
PROBED = 2  # samples that are looked at
TOGETHER = 16  # samples that a BatchNorm sees at once at least
PARTS = 64  # of a batch at most


def parts_of(form: nn.Module, samples: int, loss: Callable[[], Tensor]) -> int:
    """How many parts a batch of ``samples`` goes in; ``loss`` computes that of `PROBED` of them, and leaves nothing changed."""
    each = kept_bytes(form, loss) / PROBED
    least = TOGETHER if any(isinstance(module, Norms) for module in form.modules()) else 1
    parts = 1
    while each * samples / parts > KEPT and 2 * parts <= min(PARTS, samples // least):
        parts *= 2
    return parts


def kept_bytes(form: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that the layers of a model keep for the way back from a loss, its own tensors aside; buffers and chance stay as they were."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*form.parameters(), *form.buffers())}
    buffers = [(buffer, buffer.clone()) for buffer in form.buffers()]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = loss()
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    del held
    return sum(size for place, size in kept.items() if place not in own)
