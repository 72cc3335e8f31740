"""``autocomp::linear_weight_only`` → Relax: weights repacked for the kernel, the bias left to fusion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.hardware.profile import Profile
from autocomp.kernels import weight_only

if TYPE_CHECKING:
    import torch


def lowering(program: torch.export.ExportedProgram, profile: Profile) -> dict[str, Any]:
    """The translation of the op, by its name."""
    return {"linear_weight_only.default": WeightOnlyConverter(program, profile)}


class WeightOnlyConverter:
    """Emit the product with packed low-bit weights, then the addition of the bias."""

    def __init__(self, program: torch.export.ExportedProgram, profile: Profile) -> None:
        signature = program.graph_signature
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.state = {**program.state_dict, **program.constants}
        self.lanes = profile.lanes

    def __call__(self, node: Any, importer: Any) -> Any:
        from tvm import relax

        from autocomp.layers.weight_only import unpack_levels

        builder = importer.block_builder
        data = importer.env[node.args[0]]
        weight, scales, bias = (self.state[self.names[argument.name]].detach() for argument in node.args[1:4])
        bits, group = map(int, node.args[4:6])
        levels = (unpack_levels(weight) if bits == 4 else weight).numpy()
        *leading, depth = (int(size) for size in data.ty.shape)
        spec = weight_only.WeightOnlySpec(tuple(leading), depth, len(levels), bits, group, self.lanes)
        packed = weight_only.pack_weight(levels, spec)
        product = builder.emit_te(
            lambda x, w, s: weight_only.dense(x, w, s, spec),
            data, relax.const(packed), relax.const(weight_only.pack_scales(scales.numpy(), spec)),
            primfunc_name_hint=spec.template,
        )  # fmt: skip
        return builder.emit(relax.op.add(product, relax.const(np.ascontiguousarray(bias.numpy()))))
