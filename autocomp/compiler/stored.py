"""What the converters of layers with stored weights (bf16, fp16, w8a8) have in common: reading their weights, and rounding each input once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.hardware.profile import Profile

if TYPE_CHECKING:
    import torch


class StoredConverter:
    """Emits layers of one precision, convolutions or linear ones, from an exported graph that takes their weights as inputs."""

    def __init__(self, program: torch.export.ExportedProgram, profile: Profile, *, convolution: bool) -> None:
        signature = program.graph_signature
        self._names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._state = {**program.state_dict, **program.constants}
        self._made: dict[Hashable, tuple[Any, Any]] = {}
        self.lanes = profile.lanes
        self.convolution = convolution

    def array(self, node: Any) -> np.ndarray:
        """The array of a weight; numpy has no bfloat16, so that comes in float32."""
        import torch

        weight = self._state[self._names[node.name]].detach()
        result: np.ndarray = (weight.float() if weight.dtype == torch.bfloat16 else weight).numpy()
        return result

    def channels_last(self, builder: Any, x: Any) -> Any:
        """A convolution's input, as the kernels read it; a linear layer's as it is."""
        from tvm import relax

        return builder.emit(relax.op.permute_dims(x, [0, 2, 3, 1])) if self.convolution else x

    def once(self, source: Any, make: Callable[[], Any], *how: Hashable) -> Any:
        """What is made of ``source``, the same for all layers that read it so (``how``)."""
        key = (hash(source), *how)
        if key not in self._made:
            self._made[key] = (source, make())  # the source is held so that its hash stays taken
        return self._made[key][1]
